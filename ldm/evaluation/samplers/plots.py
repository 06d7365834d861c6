"""Tables and figures of sampler reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.evaluation.figures.plots import save_figure

TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
MARKERS = "osD^v<>P*Xdph"


@dataclass(frozen=True)
class Panel:
    """One pair of axes: lines of (network calls, error), and a level to compare with."""

    title: str
    error: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    level: tuple[str, float] | None = None


def error_curves(panels: Sequence[Panel], file: Path) -> None:
    """Plot error against network calls, both logarithmic; samplers are named from the worst to the best."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    panels = [panel for panel in panels if panel.lines]
    figure = Figure(figsize=(7.6 * len(panels), 5.2), dpi=110)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        worst_first = sorted(panel.lines.items(), key=lambda line: -line[1][-1][1])
        for j, (name, points) in enumerate(worst_first):
            dashes = "-" if j % 2 == 0 else (0, (5, 2))
            style = {"marker": MARKERS[j % len(MARKERS)], "linestyle": dashes, "color": f"C{j % 10}"}
            axes.loglog(*zip(*points, strict=True), markersize=5, linewidth=1.3, label=name, **style)
        if panel.level is not None:
            axes.axhline(panel.level[1], color="grey", linestyle=":", label=panel.level[0])
        low, high = axes.get_xlim()
        ticks = [n for n in TICKS if low <= n <= high]
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("network calls")
        axes.set_ylabel(panel.error)
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    save_figure(figure, file)


def exact_panels(report: Mapping[str, Any]) -> list[Panel]:
    """Panels of the errors in `conformance`: of deterministic samplers, and of those that draw noise."""
    titles = {
        "path": ("Deterministic samplers: end points against the exact flow", "root mean square error"),
        "weak": ("Stochastic samplers: mean and variance on Gaussian data", "error over the variance"),
    }
    found = []
    for sense, (title, error) in titles.items():
        rows = {name: row for name, row in report["samplers"].items() if row["sense"] == sense}
        lines = {
            f"{name}  ({row['measured']:.2f})": [(calls, value) for _, calls, value in row["errors"]]
            for name, row in rows.items()
        }
        found.append(Panel(title, error, lines))
    return found


def run_panels(report: Mapping[str, Any]) -> list[Panel]:
    """Panels of the distances in `compare_samplers`."""

    def lines(key: str) -> dict[str, list[tuple[float, float]]]:
        rows = [row for row in report["rows"] if key in row]
        names = dict.fromkeys(row["sampler"] for row in rows)
        return {name: [(row["calls"], row[key]) for row in rows if row["sampler"] == name] for name in names}

    title, error = "Deterministic samplers: distance to the reference", "pixel levels, root mean square"
    found = [Panel(title, error, lines("rms"), (f"{report['within']:g} levels", report["within"]))]
    if report["floor"] is not None:
        title, error = "Stochastic samplers: distance between the sets", "pixel levels, sliced Wasserstein"
        found.append(Panel(title, error, lines("sliced_wasserstein"), ("reference, other noise", report["floor"])))
    return found


def exact_table(report: Mapping[str, Any]) -> list[str]:
    """Markdown table of `conformance`: orders, and the distance to the data for each number of steps."""
    counts = list(dict.fromkeys(n for row in report["samplers"].values() for n in row["reach"]))
    head = ["sampler", "order", "measured", *(f"W, {n} steps" for n in counts)]
    head += [f"mean, cov., {n}" for n in counts[-1:]]
    rows = []
    for name, row in report["samplers"].items():
        reached = [row["reach"].get(n) for n in counts]
        cells = [name, f"{row['stated']:g}{' (weak)' if row['sense'] == 'weak' else ''}", f"{row['measured']:.2f}"]
        cells += [f"{r['sliced_wasserstein']:.3f}" if r else "" for r in reached]
        cells += [f"{r['mean']:.3f}, {r['covariance']:.3f}" if r else "" for r in reached[-1:]]
        rows.append(cells)
    return _markdown(head, rows)


def run_table(report: Mapping[str, Any]) -> list[str]:
    """Markdown table of `compare_samplers`: sampler by number of steps, distance (network calls)."""
    counts = sorted({row["steps"] for row in report["rows"]})
    found = {(row["sampler"], row["steps"]): row for row in report["rows"]}
    rows = []
    for name in dict.fromkeys(row["sampler"] for row in report["rows"]):
        cells = [name, "sliced Wasserstein" if SAMPLERS[name].stochastic else "rms"]
        for n in counts:
            row = found.get((name, n), {})
            value = row.get("rms", row.get("sliced_wasserstein"))
            cells.append("" if value is None else f"{value:.2f} ({row['calls']})")
        rows.append(cells)
    return _markdown(["sampler", "distance", *(f"{n} steps" for n in counts)], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, *rows)
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
