"""Differences between two runs: samples read, learning rates, logged metrics, final state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

FACTOR = 10  # on a GPU without `deterministic`: allowed ratio to the distance between two identical runs
TIMED = ("updates_per_second",)  # metrics that depend on time

Reads = Mapping[int, Mapping[int, Sequence[str]]]  # update → position → digests of what was read there


@dataclass(frozen=True)
class Difference:
    """A deviation, relative to the largest value, or a count; infinite if something is missing.

    ``where`` names the first difference.
    """

    size: float
    where: str = ""

    @property
    def none(self) -> bool:
        """True if everything is equal."""
        return self.size == 0


@dataclass(frozen=True)
class Row:
    """One row of the comparison.

    Attributes:
        restored: after the resume, against before the cut.
        apart, twin: at the end, the interrupted run and the repeated one against the unbroken run.
        exact: must be equal whatever the device's rounding.
    """

    name: str
    restored: Difference | None  # number of tensors
    apart: Difference
    twin: Difference
    exact: bool = False

    def line(self) -> str:
        """For the table."""
        restored = (
            "" if self.restored is None else "equal" if self.restored.none else f"{self.restored.size:.0f} differ"
        )
        return f"{self.name:<36}{restored:>14}{_number(self.apart, self.exact):>16}{_number(self.twin, self.exact):>16}"


HEADER = f"{'':<36}{'as restored':>14}{'interrupted':>16}{'two unbroken':>16}"


def _number(difference: Difference, count: bool) -> str:
    return "0" if difference.none else f"{difference.size:.0f} differ" if count else f"{difference.size:.1e}"


def verdict(rows: Sequence[Row], rounding: bool) -> tuple[bool, str]:
    """Return the verdict on a resume and a sentence; ``rounding``: the device's results vary in the last bits."""
    for row in rows:
        if row.restored is not None and not row.restored.none:
            return False, f"{row.name}, as restored: {row.restored.where}"
    if all(row.apart.none for row in rows):
        return True, "exact"
    if rounding and all(row.apart.size <= (0 if row.exact else FACTOR * row.twin.size) for row in rows):
        return True, "as close as two unbroken runs"
    first = next(row for row in rows if row.apart.size > (FACTOR * row.twin.size if rounding and not row.exact else 0))
    also = "" if rounding or first.twin.none else " (two unbroken runs differ too)"
    return False, f"{first.name}: {first.apart.where}{also}"


def row_of(group: str, name: str) -> str:
    """The row to which a tensor of a checkpoint's group belongs."""
    kind, _, network = group.partition("_")
    rows = {
        "model": f"weights of {network}",
        "optimizer": f"{name.rpartition('.')[2]} of {network}",
        "best": "EMA of the best validation",
    }
    return rows.get(kind, "EMA")


def between_groups(group: str, held: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Difference]:
    """Largest deviation over the largest value, for each row of one group of a checkpoint."""
    found: dict[str, Difference] = {}
    for row in dict.fromkeys(row_of(group, name) for name in [*held, *live]):
        mine, other = (
            {name: t for name, t in tensors.items() if row_of(group, name) == row} for tensors in (held, live)
        )
        if lacking := sorted(mine.keys() ^ other.keys()):
            found[row] = Difference(math.inf, f"{lacking[0]} is in one of them only ({len(lacking)} in all)")
            continue
        largest = max((float(t.double().abs().max()) for t in mine.values() if t.numel()), default=0.0)
        apart = {name: size for name, t in mine.items() if (size := _largest(t, other[name]))}
        where = f"{next(iter(apart))} and {len(apart) - 1} more of {len(mine)} tensors" if apart else ""
        found[row] = Difference(max(apart.values(), default=0.0) / (largest or 1.0), where)
    return found


def _largest(a: Tensor, b: Tensor) -> float:
    """The largest deviation of two tensors; NaN equals NaN."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    if a.shape != b.shape:
        return math.inf
    apart = (a - b).abs()[~((a == b) | (a.isnan() & b.isnan()))]
    return float(apart.nan_to_num(math.inf, math.inf).max()) if apart.numel() else 0.0


def between_digests(
    before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]
) -> dict[str, Difference]:
    """Number of tensors that changed, by row."""
    found: dict[str, Difference] = {}
    for row in {**before, **after}:
        a, b = before.get(row, {}), after.get(row, {})
        differing = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        where = f"{differing[0]} and {len(differing) - 1} more of {len({**a, **b})} have changed" if differing else ""
        found[row] = Difference(float(len(differing)), where)
    return found


def between_reads(straight: Sequence[Reads], other: Sequence[Reads], total: int) -> tuple[Difference, Difference]:
    """Compare what the processes of two runs read.

    Positions (each of 0 … ``total`` − 1 once, in the same update) and samples.
    """
    a, b = _together(straight), _together(other)
    wrong = []
    for update in sorted({**a, **b}):
        mine, theirs = a.get(update, {}), b.get(update, {})
        if sorted(mine) != sorted(theirs):
            wrong.append(f"update {update + 1} reads {_span(theirs)} instead of {_span(mine)}")
    seen = [position for update in b.values() for position, digests in update.items() for _ in digests]
    again = len(seen) - len(set(seen))
    left_out = len(set(range(total)) - set(seen))
    if again or left_out:
        wrong.append(f"{again} are read more than once, {left_out} never")
    samples = {position: digests for update in a.values() for position, digests in update.items()}
    differing = [p for update in b.values() for p, digests in update.items() if p in samples and digests != samples[p]]
    sample = f"the sample at position {min(differing)} is another" if differing else ""
    return Difference(float(max(again + left_out, len(wrong))), wrong[0] if wrong else ""), Difference(
        float(len(differing)), sample
    )


def _together(processes: Sequence[Reads]) -> dict[int, dict[int, list[str]]]:
    """Positions read by all processes, by update."""
    together: dict[int, dict[int, list[str]]] = {}
    for reads in processes:
        for update, positions in reads.items():
            for position, digests in positions.items():
                together.setdefault(update, {}).setdefault(position, []).extend(digests)
    return together


def _span(positions: Iterable[int]) -> str:
    several = sorted(positions)
    return f"positions {several[0]} to {several[-1]}" if several else "nothing"


def between_rates(straight: Mapping[int, Mapping[str, float]], other: Mapping[int, Mapping[str, float]]) -> Difference:
    """Number of updates with a different learning rate."""
    wrong = [update for update in sorted({**straight, **other}) if straight.get(update) != other.get(update)]
    where = f"update {wrong[0] + 1} steps at {other.get(wrong[0])} instead of {straight.get(wrong[0])}" if wrong else ""
    return Difference(float(len(wrong)), where)


def between_figures(straight: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> Difference:
    """The largest relative deviation of JSON figures, line by line."""
    if len(straight) != len(other) or any(a.get("step") != b.get("step") for a, b in zip(straight, other, strict=True)):
        return Difference(math.inf, f"the lines are of updates {[b.get('step') for b in other]}")
    largest, first = 0.0, ""
    for a, b in zip(straight, other, strict=True):
        mine, theirs = dict(_leaves(a)), dict(_leaves(b))
        for key in {**mine, **theirs}:
            size = _relative(mine.get(key), theirs.get(key)) if key in mine and key in theirs else math.inf
            if size and not first:
                place = f" of update {a['step']}" if "step" in a else ""
                first = f"{key}{place} is {theirs.get(key)} instead of {mine.get(key)}"
            largest = max(largest, size)
    return Difference(largest, first)


def _leaves(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key not in TIMED:
                yield from _leaves(value, f"{path}.{key}".strip("."))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{i}]")
    else:
        yield path, tree


def _relative(a: Any, b: Any) -> float:
    if a == b:
        return 0.0
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in (a, b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))
