"""Choice of the checkpoint to resume: newest intact or given, equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ldm.distributed.processes import Processes
from ldm.errors import CheckpointError
from ldm.files.disk import file_hash, resolved
from ldm.runs.checkpoints.folder import MANIFEST, check, newest_valid, step_of, steps

ASIDE = "set-aside-"  # prefix of folders with checkpoints that the run no longer continues from


def choose(folder: Path, asked: str | None = None) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, verified (None: there is none), and the faults of newer ones.

    ``asked``: the update or folder of the checkpoint to take. Raises CheckpointError if that is
    missing or damaged, or if no checkpoint is intact: a run never starts over automatically.
    """
    if asked is not None:
        path = _named(folder, asked)
        if problems := check(path):
            raise CheckpointError(f"the checkpoint that was asked for is damaged: {'; '.join(problems)}")
        return path, []
    path, problems = newest_valid(folder)
    if path is None and problems:
        raise CheckpointError(
            f"{folder}: none of its {len(steps(folder))} checkpoints is intact: {'; '.join(problems)}:"
            " restore a copy of one, or move them away to start over"
        )
    return path, problems


def _named(folder: Path, asked: str) -> Path:
    """The folder of a checkpoint of this run, given its update or path."""
    if asked.isdecimal():
        path = folder / f"step-{int(asked):08d}"
        if not path.is_dir():
            raise CheckpointError(f"no checkpoint of update {int(asked)} in {folder}: {_listed(folder)}")
        return path
    path = Path(asked)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}: {folder} holds {_listed(folder)}")
    if resolved(path).parent != resolved(folder):
        if resolved(path).parent.parent == resolved(folder):
            raise CheckpointError(f"{path} has been set aside: move it back to {folder} first")
        advice = "to start from the weights of another run, name that as init: in a new run"
        raise CheckpointError(f"{path} is not a checkpoint of this run ({folder}): {advice}")
    step_of(path)
    return folder / resolved(path).name


def _listed(folder: Path) -> str:
    return f"there are {', '.join(str(step_of(p)) for p in found)}" if (found := steps(folder)) else "there is none"


def agreed(processes: Processes, folder: Path, asked: str | None, say: Callable[[str], None]) -> Path | None:
    """``choose`` on the main process.

    Raises CheckpointError, on all, if one does not see the same files.
    """

    def pick() -> tuple[Path, str] | None:
        if not processes.main:
            return None
        found, problems = choose(folder, asked)
        for problem in problems:
            say(f"skipped a damaged checkpoint: {problem}")
        return None if found is None else (found, file_hash(found / MANIFEST))

    chosen = processes.each(pick)[0]
    if chosen is None:
        return None
    path, digest = chosen

    def see() -> None:
        if problems := check(path, fast=True):
            raise CheckpointError(f"{'; '.join(problems)}: every process must see the run directory")
        if file_hash(path / MANIFEST) != digest:
            advice = "every process must see the same run directory"
            raise CheckpointError(f"{path}: is another checkpoint than on the main process: {advice}")

    processes.each(see)
    return path


def set_aside(path: Path) -> str | None:
    """Move checkpoints after ``path`` aside, so that no start takes them; returns a message."""
    later = [p for p in steps(path.parent) if step_of(p) > step_of(path)]
    if not later:
        return None
    place = path.parent / f"{ASIDE}{max(map(_number, set_asides(path.parent)), default=0) + 1}"
    place.mkdir()
    # The newest first: after a kill in between, the remaining ones are still in order.
    for p in reversed(later):
        p.rename(place / p.name)
    return f"set aside in {place}: the checkpoints of {_updates(later)}"


def set_asides(folder: Path) -> list[Path]:
    """Folders made by ``set_aside``, oldest first."""
    return sorted((p for p in folder.glob(f"{ASIDE}*") if p.name.removeprefix(ASIDE).isdecimal()), key=_number)


def _number(place: Path) -> int:
    return int(place.name.removeprefix(ASIDE))


def _updates(paths: Sequence[Path]) -> str:
    return f"update{'s' if len(paths) > 1 else ''} {', '.join(str(step_of(p)) for p in paths)}"
