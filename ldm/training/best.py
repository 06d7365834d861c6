"""The best validation of a training: its averaged weights, a rise since, and the end by ``train.patience``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config import Figure, TrainConfig
from ldm.distributed.processes import Processes
from ldm.files.disk import whole
from ldm.runs.best import BestValidation, write_best
from ldm.runs.checkpoints.files import snapshot
from ldm.runs.checkpoints.folder import remove
from ldm.training.ema import EMA


class BestModel:
    """Compares each validation with the best so far, the same on every process.

    All of it is part of the checkpoint, weights included, so it is resumed and cut back with the run.

    Args:
        figure: by which validations are compared; None: not at all.
        say: prints one line for the user.

    Attributes:
        weights: averaged weights of the best validation, on the CPU of the main process; None without
            ``train.keep_best``, or before the first validation.
    """

    def __init__(
        self, figure: Figure | None, config: TrainConfig, ema: EMA, processes: Processes, say: Callable[[str], None]
    ) -> None:
        self.figure, self.config, self._ema, self._processes, self._say = figure, config, ema, processes, say
        self.best = BestValidation()
        self.weights: dict[str, Tensor] | None = None

    @property
    def over(self) -> bool:
        """True if the run ends by ``train.patience``."""
        return self.config.patience is not None and self.best.waited >= self.config.patience

    @property
    def end(self) -> dict[str, Any]:
        """Entries of `status.json` for a run that ends so: ``waited``, and the ``reason`` in words."""
        assert self.figure is not None
        reason = f"ended by train.patience: none of the last {self.best.waited} validations was better than"
        return {"waited": self.best.waited, "reason": f"{reason} {self.best.text(self.figure)}"}

    def validated(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take in the metrics of the validation after update ``step``; every process calls it."""
        if self.figure is None:
            return
        name, had_risen = self.figure.name, self.best.risen
        value, error = self._processes.gather((metrics[name], metrics.get(f"{name}_error")))[0]  # the main process's
        if self.best.add(self.figure, step, value, error) and self.config.keep_best and self._processes.main:
            old = None if self.weights is None else {"best": self.weights}
            self.weights = snapshot({"best": self._ema.state()}, old)["best"]
        if self.best.risen and not had_risen:
            self._say(self._warning(self.figure, step, value))

    def _warning(self, figure: Figure, step: int, value: float) -> str:
        side, best = "below" if figure.higher else "above", self.best
        if self.config.keep_best:
            then = (
                f"the model of update {best.step} is kept for best/;"
                f" to end the run here, stop it and give the same command train.patience={best.waited}"
            )
        else:
            then = "train.keep_best keeps the best model and train.patience ends such a run"
        return (
            f"validation {figure.name} is {value:.4g} after update {step}, for {best.worse} validations in a row {side}"
            f" its best, {best.text(figure)}. The model may be memorising its images: use more of them or stop"
            f" earlier; or train.lr is too high; {then} (docs/training.md)"
        )

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The group of a checkpoint that holds the kept weights; none without."""
        return {} if self.weights is None else {"best": self.weights}

    def state(self) -> dict[str, Any]:
        """The state of a checkpoint beside the kept weights, as JSON."""
        return self.best.state()

    def load(self, state: Mapping[str, Any] | None, weights: dict[str, Tensor] | None) -> None:
        """Take over a checkpoint's ``state()`` and kept weights; None: it has none.

        Raises KeyError, TypeError or ValueError for another state.
        """
        best = BestValidation() if state is None else BestValidation.of(state)
        if self.config.keep_best and weights is None and best.step:
            self._say(f"train.keep_best was off at the best validation (update {best.step}): the next one begins anew")
            best = BestValidation()
        self.best = best
        self.weights = None
        if weights is not None and self.config.keep_best and self._processes.main:
            self.weights = snapshot({"best": weights})["best"]  # not the file's own memory: it is written into

    @contextmanager
    def folder(self, target: Path) -> Iterator[Path]:
        """Folder to export the kept weights into; it replaces ``target`` (RUN/best) when it is complete."""
        assert self.figure is not None
        with whole(target) as place:
            write_best(place, self.figure, self.best)
            yield place
            if target.exists():
                remove(target)
