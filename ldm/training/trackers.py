"""TensorBoard and Weights & Biases. A tracker never stops a training."""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from ldm.config import ConfigError


@runtime_checkable
class Tracker(Protocol):
    """Takes scalars and images by update number."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`; entries that a resumed run will log again are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise ConfigError(
                "train.trackers: tensorboard is not installed: pip install tensorboard, or leave it out"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run, continued under the same id (kept in `<run>/wandb-id`) when training resumes."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError("train.trackers: wandb is not installed: pip install wandb, or leave it out") from None
        file = folder / "wandb-id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._image = wandb.Image
        self._run = wandb.init(
            project="latent-diffusion",
            name=folder.name,
            dir=str(folder),
            id=file.read_text(encoding="utf-8"),
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")  # its own counter cannot go back on a resume

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        self._run.log({"step": step, name: self._image(image)})

    def close(self) -> None:
        self._run.finish()


OPENERS: dict[str, Callable[[Path, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Trackers:
    """Several trackers as one. A tracker that fails is dropped with a warning, and training continues."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers still in use."""
        return tuple(self._trackers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers; trackers cannot draw NaN and infinity, so these are left out."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._each(lambda tracker: tracker.scalars(step, finite))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Log one picture."""
        self._each(lambda tracker: tracker.image(step, name, image))

    def close(self) -> None:
        """Flush and close all of them."""
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _each(self, call: Callable[[Tracker], Any]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._trackers[name]
                _warn(name, error)


def open_trackers(names: Sequence[str], folder: Path, step: int = 0) -> Trackers:
    """Open trackers by name for the run in ``folder``, resumed at update ``step``.

    Raises ConfigError for one that is unknown or not installed; one that does not start is dropped with a warning.
    """
    opened: dict[str, Tracker] = {}
    for name in names:
        if name not in OPENERS:
            raise ConfigError(f"train.trackers: {name!r} is none of {', '.join(OPENERS)}")
        try:
            opened[name] = OPENERS[name](folder, step)
        except ConfigError:
            raise
        except Exception as error:  # no network, no account, no space: whatever a foreign library raises
            _warn(name, error)
    return Trackers(opened)


def _warn(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split())
    warnings.warn(
        f"tracker {name} failed and is dropped, training continues: {type(error).__name__}: {reason}", stacklevel=3
    )
