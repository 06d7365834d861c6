"""Report of a run as one HTML page: curves, pictures, reconstructions, metrics, skipped files, settings.

Each section is a function of the run that returns its title and content, or None if it does not apply.
What is still missing is stated in one sentence, so that a run can be looked at in every state.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from autoencoder.model import AutoencoderKL
from ldm import config as configuration
from ldm.config import (
    NONE,
    RUNS,
    AutoencoderTrainingConfig,
    ClassifierTrainingConfig,
    ClipTrainingConfig,
    ConfigError,
    DiffusionTrainingConfig,
)
from ldm.data.sources import open_source
from ldm.data.transforms import grid
from ldm.errors import DataError, FolderError, NonFiniteError
from ldm.evaluation.evaluate import JUDGES, Progress
from ldm.evaluation.reconstructions import Pair, extremes
from ldm.evaluation.report import panels, tables
from ldm.evaluation.report.html import Html, drawing, element, join, page, picture, table
from ldm.files.disk import check_regular, read_bytes, resolved
from ldm.interop.diffusers.lora_folder import REFERENCE
from ldm.pipeline.codec import load_codec
from ldm.runs import records
from ldm.runs.best import best_text

MODELS = {
    "train-autoencoder": ("vae/config.json",),
    "train-clip": ("text_encoder/config.json",),
    "train-ldm": ("model_index.json", REFERENCE),
    "train-classifier": ("classifier/config.json",),
}
GRIDS = 12  # pictures shown of each kind
STATES = {
    "running": "running (or killed: a killed run cannot record it)",
    "interrupted": "interrupted and saved: the same command resumes",
    "failed": "failed: the same command resumes from the last checkpoint",
}
T = TypeVar("T")
Section = tuple[str, Html]


@dataclass(frozen=True)
class Run:
    """Contents of a run directory in any state."""

    path: Path
    config: AutoencoderTrainingConfig | ClipTrainingConfig | DiffusionTrainingConfig | ClassifierTrainingConfig
    status: dict[str, Any]  # empty before the first log
    lines: list[dict[str, Any]]
    images: int  # validation images to reconstruct
    progress: Progress

    @property
    def done(self) -> bool:
        """True if training ended as planned."""
        return self.status.get("state") == "done"


def report(path: Path, images: int, progress: Progress) -> str:
    """Build the page of a run directory. ``images``: validation images to reconstruct, 0 for none.

    Raises ConfigError for a folder that is not a run, RunError for a damaged status.json.
    """
    config, status = configuration.load_run(path), records.read_status(path, checked=False) or {}
    run = Run(path, config, status, records.read_metrics(path), images, progress)
    found = [section for make in SECTIONS if (section := make(run)) is not None]
    names = [title.lower().replace(" ", "-") for title, _ in found]
    links, body = [], []
    for name, (title, content) in zip(names, found, strict=True):
        links.append(element("a", title, href=f"#{name}"))
        body.append(element("section", element("h2", title), content, id=name))
    title = resolved(path).name
    return page(f"{title}: report", element("h1", title), _head(run), element("nav", *links), *body)


def _head(run: Run) -> Html:
    command = next(name for name, kind in RUNS.items() if isinstance(run.config, kind))
    state, seconds, train = run.status.get("state"), run.status.get("seconds"), run.config.train
    early = f", {run.status['reason']}" if run.done and run.status.get("reason") else ""
    described = STATES.get(str(state), f"{state}{early}") if run.status else "no status yet: nothing has been logged"
    exported = any((run.path / "model" / file).is_file() for file in MODELS[command])
    rows: list[tuple[str, Any]] = [
        ("command", f"ldm {command}"),
        ("state", element("b", described, class_="bad") if state == "failed" else described),
        ("updates", f"{run.status.get('step', 0)} of {train.steps}"),
        ("wall time", _duration(seconds) + ", resumes included" if records.is_seconds(seconds) else "not known yet"),
        ("global batch", f"{train.batch_size} images"),
        ("model", "exported" if exported else "not exported yet: this follows the last update"),
    ]
    if best := best_text(run.path):
        rows.append(("best validation", best + (", kept in best/" if (run.path / "best").is_dir() else "")))
    if parameters := _parameters(run.path):
        rows.append(("parameters", ", ".join(f"{name} {count:,}" for name, count in parameters.items())))
    return table((), rows)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _parameters(run: Path) -> dict[str, int]:
    """Parameters of each network in the newest checkpoint, from the file headers; empty without one."""
    newest = records.newest_checkpoint(run)
    counts: dict[str, int] = {}
    try:
        for file in sorted(newest[1].glob("model_*.safetensors")) if newest else []:
            with safe_open(file, "pt") as weights:
                shapes = [weights.get_slice(k).get_shape() for k in weights.keys()]  # noqa: SIM118
            counts[file.stem.removeprefix("model_")] = sum(map(math.prod, shapes))
    except (OSError, SafetensorError):  # deleted meanwhile by a running training
        return {}
    return counts


def _curves(run: Run) -> Section:
    train = run.config.train
    if not run.lines:
        first = min(train.log_every, train.steps)
        return "Curves", element("p", f"No metrics yet: the first come after update {first}.")
    scalars, lists = records.scalar_series(run.lines), records.list_series(run.lines)
    drawn = [(panel.quantity, panels.draw(panel)) for panel in panels.panels(scalars)]
    by_t = {name: points for name, points in lists.items() if name.endswith(panels.BY_T)}
    drawn += [(panels.quantity(name), panels.draw_by_t(points)) for name, points in by_t.items()]
    figures = [
        element("figure", element("h3", name), drawing(svg, name), element("figcaption", panels.HINTS.get(name, "")))
        for name, svg in sorted(drawn, key=lambda item: panels.place(item[0]))
    ]
    gaps = [gap for name, points in scalars.items() if (gap := panels.missing(name, points))]
    for name, points in lists.items():
        flat = [v for _, values in points for v in values]
        if empty := sum(math.isnan(v) for v in flat):
            reason = "no validation image fell there, or not finite"
            gaps.append(f"{name}: {empty} of {len(flat)} values null, left as gaps: {reason}.")
    notes = element("ul", *(element("li", gap) for gap in gaps)) if gaps else ""
    return "Curves", join([element("div", *figures, class_="panels"), notes])


def _pictures(run: Run) -> Section:
    found, train = records.grids(run.path), run.config.train
    if not found:
        first = min(train.sample_every, train.steps)
        return "Pictures over time", element("p", f"None yet: the first come after update {first}.")
    content: list[Any] = []
    for name, files in found.items():
        shown = evenly(files, GRIDS)
        count = f"{len(shown)} of {len(files)}, evenly chosen" if len(shown) < len(files) else f"{len(files)}"
        grids = (_grid(step, file) for step, file in shown)
        content += [element("h3", f"{name} ({count})"), element("div", *grids, class_="rows")]
    if isinstance(run.config, DiffusionTrainingConfig) and run.config.prompts:
        prompts = (element("li", text) for text in run.config.prompts)
        content += [element("h3", "Prompts, row by row"), element("ol", *prompts)]
    return "Pictures over time", join(content)


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` items, evenly spread, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _grid(step: int, file: Path) -> Html:
    return element("figure", _file(file, 960, 540), element("figcaption", f"update {step} ({file.name})"))


def _file(file: Path, side: int, wanted: int) -> Html:
    """A picture on disk; a message if it cannot be read, for example while it is being written."""
    try:
        check_regular(file)
        with Image.open(file) as image:
            return picture(image, file.name, side, wanted)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return element("p", f"{file.name} cannot be read ({type(error).__name__}).", class_="bad")


def _reconstructions(run: Run) -> Section | None:
    title, config = "Reconstructions", run.config
    if isinstance(config, (ClipTrainingConfig, ClassifierTrainingConfig)) or run.images == 0:
        return None
    if isinstance(config, DiffusionTrainingConfig) and config.autoencoder == NONE:
        return title, element("p", "None: this run diffuses the pixels themselves, without an autoencoder.")
    try:
        autoencoder = _autoencoder(run)
        source = open_source(config.data, "validation")
        wanted = min(run.images, source.length or run.images)
        decibels, groups = extremes(autoencoder, source, config.data.image_size, wanted, run.progress)
    except (FolderError, DataError, ConfigError, NonFiniteError) as error:
        return title, element("p", f"None: {error}.")
    n = len(decibels)
    if n == 0:
        return title, element("p", f"None: none of {wanted} validation images can be read.")
    middle = (decibels[(n - 1) // 2] + decibels[n // 2]) / 2
    summary = {"best": decibels[0], "median": middle, "worst": decibels[-1], "mean": statistics.fmean(decibels)}
    ranked = ", ".join(f"{name} {_decibels(value)}" for name, value in summary.items())
    text = f"Originals above, reconstructions below, of {n} validation image{'s' * (n > 1)} ranked by PSNR: {ranked}."
    stale = "" if run.done else " Training has not ended: this is the autoencoder exported before."
    rows = [
        join([element("h3", name), element("div", *map(_pair, pairs), class_="rows pairs")])
        for name, pairs in groups.items()
    ]
    return title, join([element("p", text + (stale if isinstance(config, AutoencoderTrainingConfig) else "")), *rows])


def _autoencoder(run: Run) -> AutoencoderKL:
    """The autoencoder of the run, or the one that a diffusion run names. Raises FolderError or ConfigError."""
    where = run.path
    if isinstance(run.config, DiffusionTrainingConfig) and not (run.path / "model/vae").is_dir():
        where = Path(run.config.autoencoder)
    return load_codec(where).autoencoder.to("cuda" if torch.cuda.is_available() else "cpu")


def _pair(pair: Pair) -> Html:
    both = Image.fromarray(grid(np.stack([pair.original, pair.decoded]), 1))
    caption = pair.caption if len(pair.caption) <= 90 else pair.caption[:90] + "…"
    return element(
        "figure",
        picture(both, pair.caption, 2 * 160, 128),
        element("figcaption", element("b", _decibels(pair.psnr)), element("div", caption)),
    )


def _decibels(value: float) -> str:
    return f"{value:.2f} dB".replace("inf", "∞")


def _metrics(run: Run) -> Section:
    content = [tables.newest(run.lines)]
    if (run.path / "report.json").is_file():
        content.append(tables.evaluation(run.path / "report.json"))
    elif isinstance(run.config, DiffusionTrainingConfig) and run.config.data.source in JUDGES:
        content.append(element("p", "Not evaluated yet: `ldm evaluate` judges the samples."))
    if (run.path / "samples.png").is_file():
        content.append(_file(run.path / "samples.png", 1400, 0))
    return "Metrics", join(content)


def _throughput(run: Run) -> Section | None:
    content = tables.throughput(run.lines, run.config.train.batch_size, run.status.get("seconds"))
    return None if content is None else ("Throughput", content)


def _skipped(run: Run) -> Section:
    return "Skipped files", tables.skipped(*records.read_skipped(run.path))


def _settings(run: Run) -> Section:
    text = read_bytes(configuration.config_file(run.path)).decode(errors="replace")
    return "Configuration", element("pre", text)


SECTIONS: tuple[Callable[[Run], Section | None], ...] = (
    _curves, _pictures, _reconstructions, _metrics, _throughput, _skipped, _settings,
)  # fmt: skip
