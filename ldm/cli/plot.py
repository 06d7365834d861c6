"""Plot noise schedules, the forward and reverse chain of a model, and sweeps of guidance.

  ldm plot schedules                      noise schedules: ᾱ, log SNR, and one image along t
  ldm plot forward runs/demo              validation images under the model's own noise
  ldm plot reverse runs/demo --prompt "a small red circle on a white background"
                                          how a sample emerges: x_t and the predicted x̂_0
  ldm plot guidance runs/demo             guidance against accuracy and diversity, with samples
  ldm plot classifier runs/digits --classifier runs/digits/classifier
                                          the same for classifier guidance

`ldm plot NAME --help` has the options of each. Plots of a run go to RUN/plots/, others to the current
folder.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.console import Console
from ldm.cli.reading import add_parts, parts
from ldm.cli.target import check_target
from ldm.config import (
    SAMPLERS,
    SCHEDULES,
    ConfigError,
    DiffusionTrainingConfig,
    SampleConfig,
    ScheduleConfig,
    load,
    load_run,
    model_config_file,
)
from ldm.distributed.processes import own_rank
from ldm.files.disk import resolved

if TYPE_CHECKING:
    from ldm.evaluation.figures.page import Page

SCHEDULES_HELP = """Noise schedules side by side: ᾱ over t, log SNR over t, and one image along t.

  ldm plot schedules --names cosine scaled_linear --zero-terminal-snr --shift 2
  ldm plot schedules runs/demo --names cosine linear

Given a RUN, its own schedule is shown beside those of --names. Schedules that agree at every t are
drawn as one."""
FORWARD_HELP = """The forward chain of validation images: latents x_t, decoded, beside the images at equal noise.

  ldm plot forward runs/demo --images 3 --times 100 300 500 700 900

For a pixel model only x_t is shown. Each x_t is drawn from the one before it."""
REVERSE_HELP = """The reverse chain of each prompt: x_t and the model's x̂_0, both decoded, at some of the steps.

  ldm plot reverse runs/demo --prompt "a small red circle on a white background"

Settings left out are the model's own. The images are those that `ldm sample` draws for the same
prompts and seed."""
GUIDANCE_HELP = """Guidance scale γ against accuracy (read by the judge) and diversity, with samples of some captions.

  ldm plot guidance runs/demo --scales 0 1 2 4 8 --images 320

For runs on drawn shapes and digits. Diversity 1 is as varied as real images of one caption. The metrics
are written as JSON beside the picture. Under `accelerate launch scripts/plot.py` or torchrun each
process does its share."""
CLASSIFIER_HELP = """Classifier scale w of the unconditional model (γ = 0) against accuracy and diversity.

  ldm plot classifier runs/digits --classifier runs/digits/classifier --scales 0 1 2 4 8 16

For classifiers of digits. Both forms are swept, and the score form also within an interval, all by
ancestral sampling from the same noise, with rows of samples. Diversity 1 is as varied as real images of
one caption. The metrics are written as JSON beside the picture. Under `accelerate launch
scripts/plot.py` or torchrun each process does its share."""

GUIDANCE_SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
CLASSIFIER_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each plot."""
    plots = parser.add_subparsers(dest="plot", metavar="plot", required=True)
    schedules = _sub(plots, "schedules", "noise schedules side by side", SCHEDULES_HELP)
    forward = _sub(plots, "forward", "validation images under growing noise", FORWARD_HELP)
    reverse = _sub(plots, "reverse", "how a sample emerges from noise", REVERSE_HELP)
    guidance = _sub(plots, "guidance", "guidance against accuracy and diversity", GUIDANCE_HELP)
    classifier = _sub(plots, "classifier", "classifier guidance against accuracy and diversity", CLASSIFIER_HELP)

    _add_schedules(schedules)
    _add_chains(forward, reverse)
    _add_sweeps(guidance, classifier)
    for sub in (forward, reverse, guidance, classifier):
        add_parts(sub)
    for sub in (reverse, guidance):
        sub.add_argument("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)}")
        sub.add_argument("--steps", type=int, metavar="N", help="network calls, at most the T of training")
        sub.add_argument("--seed", type=int, metavar="N", help="0 to 2^63 − 1")
    for name, sub in plots.choices.items():
        where = f"{name}.png in RUN/plots/, or in the current folder without a RUN"
        sub.add_argument("--out", metavar="FILE", help=f"a .png, .pdf or .svg (default: {where})")


def _add_schedules(sub: argparse.ArgumentParser) -> None:
    names = f"some of {', '.join(SCHEDULES)} (default: all; with a RUN none)"
    sub.add_argument("run", nargs="?", metavar="RUN", help="a run of train-ldm, or a model folder: its own schedule")
    sub.add_argument("--names", nargs="+", metavar="NAME", help=names)
    sub.add_argument("--num-steps", type=int, metavar="T", help="steps of the named schedules (default 1000)")
    sub.add_argument("--zero-terminal-snr", action="store_true", help="show each also with no signal at the last step")
    sub.add_argument("--shift", type=float, metavar="S", help="show each also shifted for images of S times the side")
    sub.add_argument("--image", metavar="FILE", help="the image along t (default: a drawn shape)")


def _add_chains(forward: argparse.ArgumentParser, reverse: argparse.ArgumentParser) -> None:
    forward.add_argument("run", metavar="RUN", help="a run of train-ldm")
    forward.add_argument("--images", type=int, default=3, metavar="N", help="validation images (default 3)")
    forward.add_argument("--times", type=int, nargs="+", metavar="T", help="the t shown (default: 8, equally spaced)")
    forward.add_argument("--seed", type=int, metavar="N", help="of the noise (default 0)")
    reverse.add_argument("run", metavar="RUN_OR_FOLDER", help="a run of train-ldm, or a model folder")
    reverse.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    reverse.add_argument(
        "--columns", type=int, default=8, metavar="N", help="steps shown beside the sample (default 8)"
    )
    closer = "1: the conditional model; above: closer to the caption"
    reverse.add_argument("--guidance-scale", type=float, metavar="SCALE", help=closer)


def _add_sweeps(guidance: argparse.ArgumentParser, classifier: argparse.ArgumentParser) -> None:
    guidance.add_argument("run", metavar="RUN", help="a run of train-ldm on drawn shapes or digits")
    classifier.add_argument("run", metavar="RUN_OR_FOLDER", help="a run of train-ldm on digits, or a model folder")
    classifier.add_argument("--classifier", metavar="RUN", required=True, help="a run of train-classifier")
    for sub, symbol, scales, images in (
        (guidance, "γ", GUIDANCE_SCALES, 320),
        (classifier, "W", CLASSIFIER_SCALES, 200),
    ):
        default = " ".join(f"{scale:g}" for scale in scales)
        sub.add_argument(
            "--scales", type=float, nargs="+", default=list(scales), metavar=symbol, help=f"default: {default}"
        )
        each = f"images for each {symbol.lower()} (default {images})"
        sub.add_argument("--images", type=int, default=images, metavar="N", help=each)
    batch = "images per batch and process (default 100)"
    guidance.add_argument("--batch-size", type=int, default=100, metavar="N", help=batch)
    classifier.add_argument("--steps", type=int, default=25, metavar="N", help="network calls (default 25)")


def _sub(plots: Any, name: str, text: str, description: str) -> argparse.ArgumentParser:
    return plots.add_parser(
        name, help=text, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run(arguments: argparse.Namespace) -> None:
    """Draw the chosen plot."""
    if own_rank() and arguments.plot not in ("guidance", "classifier"):
        return  # the other plots are drawn by the main process alone
    PLOTS[arguments.plot](arguments, Console())


def _schedules(arguments: argparse.Namespace, console: Console) -> None:
    for name in arguments.names or ():
        if name not in SCHEDULES:
            raise ConfigError(f"--names {name}: no such schedule, there are {', '.join(SCHEDULES)}")
    names = arguments.names or (() if arguments.run else SCHEDULES)
    if not names and (arguments.zero_terminal_snr, arguments.shift, arguments.num_steps) != (False, None, None):
        raise ConfigError("--zero-terminal-snr, --shift and --num-steps change the schedules of --names: name some")
    ours = _schedule_of(Path(arguments.run)) if arguments.run else None
    file = _out(arguments)
    from ldm.data.decode import read_image
    from ldm.data.transforms import prepare
    from ldm.evaluation.figures import schedules

    shown = [schedules.own(f"run {resolved(arguments.run).name}\n({ours.name})", ours)] if ours else []
    num_steps = 1000 if arguments.num_steps is None else arguments.num_steps
    shown += schedules.entries(tuple(dict.fromkeys(names)), num_steps, arguments.zero_terminal_snr, arguments.shift)
    if arguments.image:
        image = prepare(read_image(Path(arguments.image), 3), schedules.STRIP)
    else:
        image = schedules.drawn_shape()
    about = {"schedules": [dataclasses.asdict(entry.config) for entry in shown]}
    schedules.schedules_page(shown, image).save(file, about)
    console.say(f"schedules: {file}")


def _schedule_of(run: Path) -> ScheduleConfig:
    """The schedule of a run, finished or not, or of a model folder."""
    if (run / "config.yaml").is_file():
        config = load_run(run)
        if not isinstance(config, DiffusionTrainingConfig):
            raise ConfigError(f"{run} is not a diffusion run and has no schedule: name a run of `ldm train-ldm`")
        return config.schedule
    from ldm.pipeline.info import ModelInfo

    return ModelInfo.read(run, whole=False).schedule


def _forward(arguments: argparse.Namespace, console: Console) -> None:
    _at_least_one(arguments, "images")
    config = load(DiffusionTrainingConfig, model_config_file(arguments.run))
    seed = SampleConfig(seed=arguments.seed or 0).seed
    file = _out(arguments)
    from ldm.evaluation.figures.chains import forward_page
    from ldm.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(arguments.run, **parts(arguments))
    page = forward_page(pipe, config.data, arguments.images, arguments.times, seed)
    page.save(file, {"seed": seed, "model": pipe.hash})
    console.say(f"forward chain: {file}")


def _reverse(arguments: argparse.Namespace, console: Console) -> None:
    _at_least_one(arguments, "columns")
    given = _given(arguments, "sampler", "steps", "seed", "guidance_scale")
    from ldm.pipeline import Pipeline
    from ldm.pipeline.checks import check_sampling, check_start, sides_of
    from ldm.pipeline.info import ModelInfo

    info = ModelInfo.read(arguments.run, **parts(arguments))
    settings = dataclasses.replace(info.defaults, **given)
    check_sampling(settings, sides_of(None, info.sample_size), info.schedule.num_steps, info.factor)
    check_start(info.schedule, info.target, settings)
    if bool(arguments.prompt) != info.has_text:
        if info.has_text:
            raise ConfigError("--prompt is needed: this model draws what a caption says")
        raise ConfigError("this model is unconditional: leave --prompt out")
    file = _out(arguments)
    from ldm.evaluation.figures.chains import reverse_page

    pipe, prompts = Pipeline.from_pretrained(arguments.run, **parts(arguments)), arguments.prompt or [""]
    about = {"prompts": prompts, **dataclasses.asdict(settings), "model": pipe.hash}
    reverse_page(pipe, prompts, settings, arguments.columns).save(file, about)
    console.say(f"reverse chain: {file}")


def _guidance(arguments: argparse.Namespace, console: Console) -> None:
    _at_least_one(arguments, "batch_size")
    if arguments.images < 2:
        raise ConfigError(f"images must be at least 2, since diversity compares them, got {arguments.images}")
    given = _given(arguments, "sampler", "steps", "seed")
    scales = list(dict.fromkeys(arguments.scales))
    for scale in scales:
        SampleConfig(guidance_scale=scale)
    model_config_file(arguments.run)
    file = _out(arguments)
    from ldm.distributed.launch import launched
    from ldm.evaluation.figures.guidance_sweep import guidance_sweep

    processes, device = launched()
    report, page = guidance_sweep(
        Path(arguments.run), scales, arguments.images, given, arguments.batch_size,
        progress=console.progress, processes=processes, device=device, parts=parts(arguments),
    )  # fmt: skip
    for row in report["scales"]:
        console.say(_measured("γ", row))
    if processes.main:
        _save(page, report, file)
    console.say(f"guidance: {file}   metrics: {file.with_suffix('.json')}")


def _classifier(arguments: argparse.Namespace, console: Console) -> None:
    scales = list(dict.fromkeys(arguments.scales))
    for scale in scales:
        SampleConfig(classifier_scale=scale)
    file = _out(arguments)
    from ldm.distributed.launch import launched
    from ldm.evaluation.figures.classifier_sweep import classifier_sweep

    processes, device = launched()
    report, page = classifier_sweep(
        Path(arguments.run), Path(arguments.classifier), scales, arguments.images, arguments.steps,
        progress=console.progress, processes=processes, device=device, parts=parts(arguments),
    )  # fmt: skip
    for name, variant in report["variants"].items():
        console.say(f"{name}:")
        for row in variant["scales"]:
            console.say(_measured("w", row))
    if processes.main:
        _save(page, report, file)
    console.say(f"classifier guidance: {file}   metrics: {file.with_suffix('.json')}")


def _save(page: Page, report: dict[str, Any], file: Path) -> None:
    from ldm.files.json import write_json

    page.save(file, {name: report[name] for name in ("sampling", "model", "images")})
    write_json(file.with_suffix(".json"), report)


def _measured(symbol: str, row: dict[str, Any]) -> str:
    """One line for a scale of a sweep, with 95 % intervals."""
    share = row["judged"]["all"]
    right = f"{share['accuracy']:.3f} ({share['low']:.3f} to {share['high']:.3f})"
    diversity = f"{row['diversity']:.3f} ({row['diversity_low']:.3f} to {row['diversity_high']:.3f})"
    return f"{symbol} {row['scale']:<4g} right {right}   diversity {diversity}   n = {share['n']}"


PLOTS = {
    "schedules": _schedules,
    "forward": _forward,
    "reverse": _reverse,
    "guidance": _guidance,
    "classifier": _classifier,
}


def _at_least_one(arguments: argparse.Namespace, name: str) -> None:
    if getattr(arguments, name) < 1:
        raise ConfigError(f"{name} must be at least 1, got {getattr(arguments, name)}")


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The sampling settings given on the command line, checked for their ranges."""
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    SampleConfig(**given)
    return given


def _out(arguments: argparse.Namespace) -> Path:
    """The file to write, checked before anything slow; makes its folder."""
    folder = Path(arguments.run) / "plots" if arguments.run else Path()
    file = Path(arguments.out) if arguments.out is not None else folder / f"{arguments.plot}.png"
    from ldm.evaluation.figures.plots import SUFFIXES, is_figure

    ours = is_figure if arguments.out is not None or not arguments.run else lambda content: True  # RUN/plots/ is ours
    check_target(file, ours, SUFFIXES, (".json",) if arguments.plot in ("guidance", "classifier") else ())
    return file
