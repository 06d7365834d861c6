"""Curves of a run over its updates: one panel for each quantity, with a hint on how to read it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.runs.records import Points

MOST = 600  # points drawn of one series; longer series are thinned
BARS = 40  # up to this many points a standard error is drawn as bars, above as a band
SPREAD = 30.0  # ratio of highest to lowest value above which an axis is logarithmic
BY_T = "_by_t"  # suffix of lists over tenths of 1…T
ERROR = "_error"  # suffix of the standard error of a metric
TRAINING, VALIDATION = ("C0", "C2", "C4", "C6"), ("C1", "C3", "C5", "C8")

# How to read a quantity; the panels come in this order. Validation and training of one quantity share a panel.
HINTS = {
    "loss": "Lower is better, and validation is what counts: training falling while validation rises is overfitting."
    " Validation uses the averaged weights (EMA), which lag behind at first, and for a diffusion model no"
    " objective.weighting, so with min_snr compare directions, not heights. Bars or band: ± one standard error.",
    "loss_by_t": "Validation loss by tenth of 1…T. Little noise is about fine detail, much noise about layout: where"
    " the last curve still lies below the middle one, longer training helps. High at both ends for target v, at little"
    " noise for eps, at much for x0.",
    "l1": "Mean absolute error of the reconstruction, images in [−1, 1]. Lower is better; training falling while"
    " validation rises is overfitting.",
    "mse": "Mean squared error of the reconstruction, images in [−1, 1]. Lower is better.",
    "psnr": "Decibels of the reconstructions, higher is better: 6 dB more is half the root-mean-square error. An"
    " adversarial loss usually lowers it while texture sharpens.",
    "psnr_noise": "PSNR with noise of 0.1, 0.3 and 1 standard deviations added to the latent: the higher, the more of"
    " a diffusion model's errors the decoder forgives.",
    "ssim": "Structural similarity of the reconstructions; higher is better, 1 is identical.",
    "lpips": "Perceptual distance of the reconstructions; lower is better.",
    "high_frequency": "Fine detail of the reconstructions over that of the originals: 1 is right, below is blurred,"
    " above is invented.",
    "kl": "Nats per latent element that the latent carries. If it falls to 0 the latent carries nothing: lower loss.kl."
    " High values are normal with a small loss.kl.",
    "active_channels": "Latent channels that differ between images. Fewer than model.latent_channels: some are wasted.",
    "generator": "Minus the mean logit of reconstructions. Lower: the discriminator finds them more realistic. Read it"
    " together with the logits.",
    "discriminator": "Hinge loss of the discriminator: 1 is guessing, 0 is telling all apart. Near 0 for long: it has"
    " won.",
    "logits": "Logits of the discriminator on originals (real) and reconstructions (fake). Close together: it cannot"
    " tell them apart; real above 1 and fake below −1: it has won.",
    "adaptive_weight": "Gradient of the reconstruction loss over that of the adversarial loss, at the last layer; it"
    " multiplies loss.gan. Rising without end: the discriminator's gradient vanishes.",
    "temperature": "Temperature of the contrastive softmax, learned. It falls as pairs become easier to tell apart.",
    "retrieval_top1": "Share of held-out images whose own caption ranks first; higher is better, chance is"
    " 1 / retrieval_captions.",
    "retrieval_captions": "Distinct captions that retrieval_top1 chooses among.",
    "left_right": "Share of images that prefer their caption to the one with the relation reversed; higher is better,"
    " chance is 0.5.",
    "accuracy": "Share of noisy samples whose class the classifier names, over all noise levels; higher is better, but"
    " at much noise it can only guess, so well below 1 is right. Validation falling while training rises is"
    " overfitting.",
    "accuracy_by_t": "The same by tenth of 1…T: near 1 at little noise, 1 / classes where nothing can be seen.",
    "lr": "Learning rate of the update: warm-up, then train.lr_schedule.",
    "grad_norm": "Norm of the gradient before clipping at train.clip. Single spikes are normal; a steady rise announces"
    " divergence: lower train.lr.",
    "updates_per_second": "Mean since training was last started, validation and pictures included.",
}
_FAMILIES = ("grad_norm", "logits", "psnr_noise")  # each of several metrics, such as grad_norm_unet


@dataclass
class Panel:
    """Series of one quantity by name, and the standard errors of some."""

    quantity: str
    lines: dict[str, Points] = field(default_factory=dict)
    errors: dict[str, Points] = field(default_factory=dict)


def quantity(name: str) -> str:
    """The quantity that a metric of metrics.jsonl measures, without its split or network."""
    base = name.removeprefix("validation/")
    return next((family for family in _FAMILIES if base.startswith(family + "_")), base)


def panels(series: dict[str, Points]) -> list[Panel]:
    """Group the series that have a finite value by quantity."""
    found: dict[str, Panel] = {}
    for name, points in series.items():
        of = name.removesuffix(ERROR)
        is_error = of != name and of in series
        panel = found.setdefault(quantity(of), Panel(quantity(of)))
        if is_error:
            panel.errors[of] = points
        elif any(math.isfinite(v) for _, v in points):
            panel.lines[name] = points
    return [panel for panel in found.values() if panel.lines]


def place(quantity: str) -> int:
    """Sort key of a quantity's panel: the order of HINTS, unknown ones last."""
    return list(HINTS).index(quantity) if quantity in HINTS else len(HINTS)


def missing(name: str, points: Points) -> str | None:
    """Describe the values of a series that are null; None if there are none."""
    steps = [step for step, value in points if not math.isfinite(value)]
    if not steps:
        return None
    if len(steps) == len(points):
        return f"{name}: null in all {len(points)} lines: not measured in this run, or never finite."
    named = ", ".join(map(str, steps[:5])) + (", …" if len(steps) > 5 else "")
    return f"{name}: {len(steps)} of {len(points)} values not finite (update {named}), left as gaps."


def thin(points: Points, most: int = MOST) -> Points:
    """Reduce a line to about ``most`` points: of each group of neighbours the lowest, the highest and one gap."""
    if len(points) <= most:
        return points

    def value(i: int) -> float:
        return points[i][1]

    size, kept = -(-2 * len(points) // most), {0, len(points) - 1}
    for start in range(0, len(points), size):
        group = range(start, min(start + size, len(points)))
        finite = [i for i in group if math.isfinite(points[i][1])]
        if finite:
            kept |= {min(finite, key=value), max(finite, key=value)}
        kept |= set([i for i in group if not math.isfinite(points[i][1])][:1])
    return [points[i] for i in sorted(kept)]


def draw(panel: Panel) -> bytes:
    """Draw a panel as SVG."""
    figure, axes = _axes("update")
    colours = {True: iter(VALIDATION * len(panel.lines)), False: iter(TRAINING * len(panel.lines))}
    for name, points in panel.lines.items():
        _line(axes, thin(points), name, next(colours[name.startswith("validation/")]), dict(panel.errors.get(name, [])))
    values = [v for points in panel.lines.values() for _, v in points if math.isfinite(v)]
    if panel.quantity != "lr" and min(values) > 0 and max(values) / min(values) > SPREAD:
        axes.set_yscale("log")
    return _svg(figure, axes)


def _line(axes: Any, points: Points, name: str, colour: str, errors: dict[int, float]) -> None:
    x, y = [p[0] for p in points], [p[1] for p in points]
    marked = _alone(y) if len(y) > BARS else None
    axes.plot(x, y, label=name, color=colour, linewidth=1.2, marker=".", markersize=4, markevery=marked)
    if errors:
        e = [errors.get(step, math.nan) for step in x]
        if len(x) <= BARS:
            axes.errorbar(x, y, yerr=e, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5)
        else:
            low, high = ([v + sign * d for v, d in zip(y, e, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)


def _alone(values: Sequence[float]) -> list[int]:
    """Indices of finite values without a finite neighbour, which a line would not show."""
    finite = [False, *map(math.isfinite, values), False]
    return [i for i in range(len(values)) if finite[i + 1] and not finite[i] and not finite[i + 2]]


def draw_by_t(points: list[tuple[int, list[float]]]) -> bytes:
    """Draw the first, the middle and the last list over tenths of 1…T, as SVG."""
    figure, axes = _axes("tenth of 1…T, little noise to much")
    chosen = sorted({0, len(points) // 2, len(points) - 1})
    axes.set_xticks(range(1, 1 + max(len(values) for _, values in points)))
    for i, colour in zip(chosen, ("0.65", "C0", "C1")[-len(chosen) :], strict=True):
        step, values = points[i]
        axes.plot(range(1, len(values) + 1), values, marker=".", label=f"update {step}", color=colour, linewidth=1.2)
    return _svg(figure, axes)


def _axes(label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any, axes: Any) -> bytes:
    from matplotlib import rc_context

    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
    axes.legend(fontsize=7.5, frameon=False, borderaxespad=0.2, handlelength=1.5, **above)
    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": "ldm"}):  # the same run gives the same bytes
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return stream.getvalue()
