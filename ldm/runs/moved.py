"""Runs whose data or models have moved: hashes in the checkpoint show if they are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.config import NONE
from ldm.files.disk import read_bytes
from ldm.runs.records import newest_checkpoint, parse

Problem = str | None


def moved_problem(key: str, run: Path, old: Any, new: Any) -> Problem:
    """Difference of the data or model at ``key`` of ``new`` from the run's; None: none.

    ``key``: one of ``PLACES``. Raises DataError, FolderError or ConfigError if ``new`` names
    nothing usable.
    """
    if None in (places := [_at(key, config) for config in (old, new)]) or NONE in places:
        return "one of them is empty"
    newest = newest_checkpoint(run)
    if newest is None:
        return "the run has no checkpoint, which would identify what it used"
    try:
        state = parse(read_bytes(newest[1] / "state.json").decode())
        return PLACES[key](state, new)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        if hasattr(error, "exit_code"):
            raise
        return f"{newest[1]} does not identify what the run used"


def _at(key: str, config: Any) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _data(state: Mapping[str, Any], new: Any) -> Problem:
    from ldm.data.sources import open_source

    if new.data.accept_changes:
        return None
    same = all(open_source(new.data, split).fingerprint == state["data"][split] for split in ("train", "validation"))
    return None if same else "other images or captions: to continue with them, add data.accept_changes=true"


def _autoencoder(state: Mapping[str, Any], new: Any) -> Problem:
    from ldm.pipeline.codec import autoencoder_hash

    return _compared(autoencoder_hash(new.autoencoder), state["task"]["autoencoder"])


def _text(state: Mapping[str, Any], new: Any) -> Problem:
    from ldm.interop.text import read_text  # transformers: seconds

    return _compared(read_text(new.text).hash, state["task"]["text"])


def _init(state: Mapping[str, Any], new: Any) -> Problem:
    from ldm.pipeline.info import ModelInfo

    return _compared(ModelInfo.read(new.init).hash, state["task"]["init" if new.train.lora is None else "base"])


def _diffusion(state: Mapping[str, Any], new: Any) -> Problem:
    from ldm.interop.bundle import VAE
    from ldm.pipeline.codec import files_hash
    from ldm.pipeline.info import ModelInfo, schedule_hash

    info = ModelInfo.read(new.diffusion)
    if schedule_hash(info.schedule) != state["task"]["schedule"]:
        return "another noise schedule"
    weights = files_hash(info.bundle.parts[VAE].files) if info.autoencoder else None
    return _compared(weights, state["task"]["autoencoder"])


def _compared(now: str | None, then: str | None) -> Problem:
    if now == then:
        return None
    return f"other weights: sha256 {(now or 'of none')[:12]}, {(then or 'of none')[:12]} when the run began"


PLACES: dict[str, Callable[[Mapping[str, Any], Any], Problem]] = {
    "data.folder": _data,
    "autoencoder": _autoencoder,
    "text": _text,
    "init": _init,
    "diffusion": _diffusion,
}
