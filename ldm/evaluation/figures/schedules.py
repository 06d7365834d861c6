"""Noise schedules side by side: ᾱ and log SNR over t, and one image along t (docs/equations.md F2, F4, F5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.lines import Line2D
from torch import Tensor

from ldm.config import SCHEDULES, ScheduleConfig
from ldm.data import rng
from ldm.data.shapes import Object, Scene, draw
from ldm.data.transforms import prepare, to_uint8
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.figures.page import EDGE, FONT, GAP, HEADER, Page, labels, spread

# colours of the named schedules, in their order, and that of a run's own
COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#7A5230", "#666666")
OWN = "#000000"
STRIP = 80  # side of the images along t, in pixels
COLUMNS = 11
LEFT = 190  # pixels reserved for the names
LOWEST = -20.0  # log SNR; below it no difference is visible


@dataclass(frozen=True)
class Entry:
    """A schedule to show: its name on the page and the style of its curve."""

    label: str
    config: ScheduleConfig
    colour: str
    dash: Literal["-", "--", ":"] = "-"


def entries(
    names: Sequence[str], num_steps: int = 1000, zero_terminal_snr: bool = False, shift: float | None = None
) -> list[Entry]:
    """Each named schedule with its defaults, and if asked with zero terminal SNR (dashed) or a shift (dotted)."""
    found = []
    for name in names:
        plain = ScheduleConfig(name, num_steps)
        colour = COLOURS[SCHEDULES.index(name) % len(COLOURS)]
        found.append(Entry(name, plain, colour))
        if zero_terminal_snr:
            zeroed = dataclasses.replace(plain, zero_terminal_snr=True)
            found.append(Entry(f"{name}\nzero terminal SNR", zeroed, colour, "--"))
        if shift is not None:
            found.append(Entry(f"{name}\nshift {shift:g}", dataclasses.replace(plain, shift=shift), colour, ":"))
    return found


def own(label: str, config: ScheduleConfig) -> Entry:
    """A run's own schedule, in black."""
    return Entry(label, config, OWN)


def merged(shown: Sequence[Entry]) -> list[tuple[Entry, Schedule]]:
    """Schedules of the entries; those that agree at every t are merged under both names."""
    found: list[tuple[Entry, Schedule]] = []
    for entry in shown:
        schedule = Schedule.from_config(entry.config)
        for i, (other, known) in enumerate(found):
            same_length = len(known.betas) == len(schedule.betas)
            if same_length and torch.allclose(known.betas, schedule.betas, rtol=1e-9, atol=0):
                found[i] = dataclasses.replace(other, label=f"{other.label},\n{entry.label}"), known
                break
        else:
            found.append((entry, schedule))
    return found


def drawn_shape() -> Float[Tensor, "3 s s"]:
    """The default image of the strips."""
    side = STRIP // 2  # coarse noise is easier to see, and makes a smaller file
    scene = Scene("beige", (Object("large", "blue", "star", side // 2, side // 2),))
    return prepare(draw(scene, side), side)


def times(num_steps: int, columns: int = COLUMNS) -> Int[Tensor, " k"]:
    """0, T/10, 2T/10 … and T − 1, without repeats."""
    return torch.linspace(0, num_steps, columns, dtype=torch.float64).round().long().clamp(max=num_steps - 1).unique()


def strip(schedule: Schedule, image: Float[Tensor, "c s s"], t: Int[Tensor, " k"]) -> Float[Tensor, "k c s s"]:
    """x_t of one image at each t, with the same ε everywhere, so that only the schedule differs (F2)."""
    eps = torch.from_numpy(rng.normal(0, "plot/schedules", 0, tuple(image.shape)))
    return schedule.add_noise(image.expand(len(t), *image.shape), eps.expand(len(t), *image.shape), t)


def schedules_page(shown: Sequence[Entry], image: Float[Tensor, "c s s"]) -> Page:
    """Page of schedules: ᾱ and log SNR over t, one line for each, and a strip of images for each."""
    lines = merged(shown)
    high, top = 290, 44
    below = top + high + 74
    width = EDGE + LEFT + spread(COLUMNS, STRIP) + EDGE
    page = Page(width, below + HEADER + len(lines) * (STRIP + GAP) + EDGE)
    half = (width - 2 * EDGE - 130) // 2
    signal = page.panel(EDGE + 40, top, half, high, title="remaining signal, ᾱ", across="t")
    ratio = page.panel(
        width - EDGE - half, top, half, high, title="log signal-to-noise ratio, log(ᾱ / (1 − ᾱ)) = 2λ", across="t"
    )
    for entry, schedule in lines:
        t = np.arange(schedule.num_steps)
        style = {"color": entry.colour, "linestyle": entry.dash, "linewidth": 2.2 if entry.colour == OWN else 1.8}
        signal.plot(t, schedule.alphas_cumprod.numpy(), label=entry.label, **style)
        log_snr = 2 * schedule.half_log_snr(torch.from_numpy(t)).numpy()
        ratio.plot(t, np.where(np.isfinite(log_snr), log_snr, np.nan), label=entry.label, **style)
    ratio.set_ylim(max(ratio.get_ylim()[0], LOWEST), None)
    signal.set_ylim(-0.02, 1.02)
    _strips(page, below, lines, image)
    return page


def short(name: str, length: int = 20) -> str:
    """The name, shortened in the middle if it would run into the images."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[1 - length // 2 :]}"


def _strips(page: Page, y: int, lines: Sequence[tuple[Entry, Schedule]], image: Tensor) -> None:
    """A row of x_t for each schedule; the line beside its name is the legend of the curves."""
    x = EDGE + LEFT
    common = len({schedule.num_steps for _, schedule in lines}) == 1
    t = times(lines[0][1].num_steps)
    labels(page, x, y, [f"t = {int(v)}" if common else f"{i / (len(t) - 1):.0%} of T" for i, v in enumerate(t)], STRIP)
    for i, (entry, schedule) in enumerate(lines):
        row = y + HEADER + i * (STRIP + GAP)
        at = 1 - (row + STRIP / 2) / page.height
        ends = [EDGE / page.width, (EDGE + 26) / page.width]
        sample = Line2D(ends, [at, at], color=entry.colour, linestyle=entry.dash, linewidth=2.4)  # type: ignore[arg-type]
        page.figure.add_artist(sample)
        name = "\n".join(short(line) for line in entry.label.split("\n"))
        page.text(EDGE + 36, row + STRIP / 2, name, parse_math=False, fontsize=FONT)
        page.pictures(x, row, to_uint8(strip(schedule, image, times(schedule.num_steps)))[None], STRIP)
