"""The best validation of a run and what has come since, and the record of the model kept of it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ldm.config import ConfigError, Figure, load_run
from ldm.config.reading import BEST
from ldm.errors import FolderError, UserError
from ldm.files.json import read_json, write_json
from ldm.runs.checkpoints.folder import remove
from ldm.runs.records import is_count, read_metrics, scalar_series

RISEN = 3  # validations in a row that make a rise


@dataclass
class BestValidation:
    """The best validation so far, and the later ones compared with it.

    Validations that are not finite are left out.

    Attributes:
        step, value, error: the update of the best (0: none yet), its figure, and that one's standard error.
        waited: validations since.
        worse: of them those in a row, up to the last, that were worse by more than one standard error of the best
            (the rule of Breiman et al. 1984, "Classification and Regression Trees", 3.4.3). From RISEN on it counts
            every one that is, and stays until there is a better one: a rise is noticed once.
    """

    step: int = 0
    value: float = 0.0
    error: float = 0.0
    waited: int = 0
    worse: int = 0

    def add(self, figure: Figure, step: int, value: float | None, error: float | None) -> bool:
        """Add the validation after update ``step``; returns True if it is the best so far."""
        if value is None or not math.isfinite(value):
            return False
        gap = figure.gap(value, self.value)
        if self.step == 0 or gap < 0:
            self.step, self.value, self.waited, self.worse = step, value, 0, 0
            self.error = error if error is not None and math.isfinite(error) else 0.0
            return True
        self.waited += 1
        if gap > self.error:
            self.worse += 1
        elif self.worse < RISEN:
            self.worse = 0
        return False

    @property
    def risen(self) -> bool:
        """True if the figure has been worse than its best for RISEN validations in a row."""
        return self.worse >= RISEN

    def text(self, figure: Figure) -> str:
        """The best validation in words."""
        error = f" ± {self.error:.2g}" if self.error else ""
        return f"{figure.name} {self.value:.4g}{error} at update {self.step}"

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> BestValidation:
        """From a ``state()``. Raises KeyError, TypeError or ValueError for anything else."""
        kinds = {"step": int, "value": float, "error": float, "waited": int, "worse": int}
        return cls(**{field.name: kinds[field.name](state[field.name]) for field in fields(cls)})


def best_logged(figure: Figure, logged: Sequence[Mapping[str, Any]]) -> BestValidation:
    """The best validation in lines of ``metrics.jsonl``, as the training saw it."""
    best, series, name = BestValidation(), scalar_series(logged), f"validation/{figure.name}"
    errors = dict(series.get(f"{name}_error", []))
    for step, value in series.get(name, []):
        best.add(figure, step, value, errors.get(step))
    return best


def best_text(run: Path) -> str | None:
    """The best validation of a run, and that those since are worse, in words; None if there is none to tell."""
    with suppress(ConfigError, UserError):  # a damaged configuration or record
        if (figure := load_run(run).figure) is not None:
            best = best_logged(figure, read_metrics(run))
            since = f" (worse in {best.worse} validations since)" if best.risen else ""
            return f"{best.text(figure)}{since}" if best.step else None
    return None


def write_best(folder: Path, figure: Figure, best: BestValidation) -> None:
    """Write the record of RUN/best. Raises OSError."""
    write_json(folder / BEST, {"step": best.step, "figure": figure.name, "value": best.value, "error": best.error})


def forget_best(folder: Path, step: int) -> None:
    """Delete RUN/best if it is of a later update: the run has been cut back. Raises OSError."""
    with suppress(FolderError):  # there is none
        found = read_json(folder / BEST).get("step", 0)
        if is_count(found) and found > step:
            remove(folder)
