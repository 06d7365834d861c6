"""Records of non-finite updates in `<run>/incidents/update-XXXXXXXX/`, from which they can be computed again.

Such an update changes nothing, so its weights are still in place when the host learns of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.data.dataset import BatchPlan
from ldm.errors import FolderError, RunError
from ldm.files.json import read_json, write_json
from ldm.files.tensors.archive import open_archive, write_tensors
from ldm.runs.directory import RunDirectory
from ldm.runs.records import is_count
from ldm.training.task import Task

KEPT = 3  # newest incidents whose weights are kept
FILE = "incident.json"


@dataclass(frozen=True)
class Incident:
    """A non-finite update (numbered from 0), the split of its batch, and the task's state.

    ``weights`` names the folder, beside this one, that holds its weights.
    """

    update: int
    batch_size: int
    micro_batch: int
    processes: int
    task: dict[str, Any]
    weights: str

    @property
    def positions(self) -> range:
        """Positions of the batch in the training stream."""
        return range(self.update * self.batch_size, (self.update + 1) * self.batch_size)


class NonFiniteRecorder:
    """Writes incidents; ``run`` is None on all but the main process. A failure to write does not end the training."""

    def __init__(self, run: RunDirectory | None, task: Task, split: BatchPlan, say: Callable[[str], None]) -> None:
        self.folder = None if run is None else run.path / "incidents"
        self.task, self.split, self.say = task, split, say
        self.newest: Path | None = None

    def record(self, update: int, first: bool) -> None:
        """Record a non-finite ``update`` before any weight changes.

        ``first``: it is the first in a row; those after it have the same weights.
        """
        if self.folder is None:
            return
        place = self.folder / f"update-{update:08d}"
        weights = place.name if first or self.newest is None else self._read_weights_of()
        split = self.split
        incident = Incident(update, split.batch_size, split.micro_batch, split.processes, self.task.state(), weights)
        try:
            if place.exists():  # of an earlier attempt at this update
                shutil.rmtree(place)
            if weights == place.name:
                for name, network in self.task.networks.items():
                    write_tensors(
                        place / f"{name}.safetensors", {k: v.detach().cpu() for k, v in network.state_dict().items()}
                    )
            positions = incident.positions
            write_json(place / FILE, {**asdict(incident), "positions": [positions.start, positions.stop - 1]})
            self._thin_out()
        except (OSError, FolderError) as error:
            self.say(
                f"update {update} was not finite and changed nothing; {place} cannot be written:"
                f" {' '.join(str(error).split())}"
            )
            return
        self.newest = place
        self.say(f"update {update} was not finite and changed nothing: `ldm replay {place}` names the module")

    def _read_weights_of(self) -> str:
        assert self.newest is not None
        return str(read_json(self.newest / FILE)["weights"])

    def _thin_out(self) -> None:
        """Delete all weights but the newest; the records stay."""
        assert self.folder is not None
        held = sorted(folder for folder in self.folder.glob("update-*") if any(folder.glob("*.safetensors")))
        for folder in held[:-KEPT]:
            for file in folder.glob("*.safetensors"):
                file.unlink()


def read(folder: Path) -> tuple[Incident, dict[str, dict[str, Any]]]:
    """Read an incident and its weights, by network. Raises RunError."""
    try:
        values = read_json(folder / FILE)
        values.pop("positions")
        incident = Incident(**values)
        _check(incident)
        files = sorted((folder.parent / incident.weights).glob("*.safetensors"))
        weights = {file.stem: dict(open_archive(file).tensors) for file in files}
    except (FolderError, KeyError, TypeError, ValueError, OSError) as error:
        raise RunError(f"{folder} is not an incident of a run (runs/…/incidents/update-…): {error}") from None
    if not weights:
        raise RunError(f"{folder}: its weights were deleted (a run keeps those of its newest {KEPT})")
    return incident, weights


def _check(incident: Incident) -> None:
    """Raise ValueError for impossible values."""
    counts = {name: getattr(incident, name) for name in ("batch_size", "micro_batch", "processes")}
    for name, value in {"update": incident.update, **counts}.items():
        if not is_count(value) or (name in counts and value == 0):
            raise ValueError(f"{name} is {value!r}")
    if incident.batch_size % incident.micro_batch:
        raise ValueError(f"batch_size {incident.batch_size} is not a multiple of micro_batch {incident.micro_batch}")
    if not isinstance(incident.task, dict) or not isinstance(incident.weights, str) or "\0" in incident.weights:
        raise ValueError("task or weights are damaged")
