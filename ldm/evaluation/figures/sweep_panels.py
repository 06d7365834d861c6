"""Top of the page of a sweep: accuracy and diversity by scale, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ldm.evaluation.figures.page import EDGE, FONT, Page
from ldm.evaluation.figures.sweep import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOP, HIGH = 74, 270
BELOW = TOP + HIGH + 70  # where the pictures begin


@dataclass(frozen=True)
class Line:
    """One sweep, with its colour in each panel."""

    name: str
    found: Sequence[Setting]
    accuracy_colour: str
    diversity_colour: str


def panels(page: Page, lines: Sequence[Line], across: str) -> tuple[Axes, Axes]:
    """Share of images judged right, and diversity with a dashed line at that of real images."""
    half = (page.width - 2 * EDGE - 150) // 2
    right = page.panel(EDGE + 50, TOP, half, HIGH, title="judged to show what the caption says", across=across)
    varied = page.panel(page.width - EDGE - half, TOP, half, HIGH, title="diversity within a caption", across=across)
    for line in lines:
        shares = [setting.judged["all"] for setting in line.found]
        _curve(right, line, [(s["accuracy"], s["low"], s["high"]) for s in shares], line.accuracy_colour)
        diversities = [(s.diversity, s.diversity_low, s.diversity_high) for s in line.found]
        _curve(varied, line, diversities, line.diversity_colour)
    right.set_ylim(0, 1.03)
    right.set_ylabel("share of images", fontsize=FONT)
    varied.axhline(1, color="0.45", linewidth=1.2, linestyle="--", label="as varied as real images")
    varied.set_ylim(0, max(1.15, varied.get_ylim()[1]))
    varied.set_ylabel("pixel distance / that of real images", fontsize=FONT)
    return right, varied


def _curve(axes: Axes, line: Line, values: Sequence[tuple[float, float, float]], colour: str) -> None:
    """Plot points with a band for their intervals."""
    middle, low, high = np.array(values).T
    scales = np.array([setting.scale for setting in line.found])
    order = np.argsort(scales)
    axes.fill_between(scales[order], low[order], high[order], color=colour, alpha=0.18, linewidth=0)
    axes.plot(scales[order], middle[order], color=colour, marker="o", markersize=5, linewidth=1.8, label=line.name)
