"""Evaluate a run: draw samples, judge them, and write report.json, samples.png and curves.png into RUN.

  ldm evaluate runs/demo
  ldm evaluate runs/demo sample.steps=4 --out runs/demo/steps-4
  ldm evaluate runs/demo --likelihood

Drawn shapes are judged strictly: an image that is nearer to a blob, a rounded outline or another size than to a shape
that is drawn is refused and counts as wrong. Digits are read by a classifier trained on real ones. The score is the
share of samples that show what their caption says. The guidance scale is chosen on captions seen in training and then
used for all captions, unless it is given as sample.guidance_scale or the model was trained without caption dropout.
Seeds are fixed. Under `accelerate launch scripts/evaluate.py` or torchrun each process does its share, and the report
is the same apart from its seconds.

With --likelihood, for any data, nothing is drawn: a bound on -log p(image | caption) of validation
images is computed in bits per dimension. It writes likelihood.png and the entry `likelihood` of
report.json, and keeps the other entries.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli.console import Console
from ldm.cli.reading import add_parts, parts
from ldm.config import VARIANCES, ConfigError, model_config_file
from ldm.runs.records import report_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and what to measure on how many images."""
    parser.add_argument(
        "run", metavar="RUN", help="a finished run of train-ldm (without --likelihood: on drawn shapes or digits)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="sample.key=value",
        help="settings of the sampler that replace the run's, such as sample.steps=4",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder for report.json, samples.png and curves.png (default: RUN)"
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="images per set of captions (default 1000; 256 with --likelihood)"
    )
    parser.add_argument(
        "--tune",
        type=int,
        metavar="N",
        default=96,
        help="images for each guidance scale tried (default 96; 0: keep the run's own scale)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=100, metavar="N", help="images per batch and process (default 100)"
    )
    add_parts(parser)
    parser.add_argument(
        "--likelihood", action="store_true", help="compute bits per dimension instead of judging samples"
    )
    parser.add_argument(
        "--timesteps",
        type=int,
        metavar="N",
        help="with --likelihood: steps t evaluated for each image (default 32; 0: all of them)",
    )
    parser.add_argument(
        "--variance",
        choices=VARIANCES,
        help="with --likelihood: variance of the reverse steps"
        " (default: learned if the model has learned it, else beta for latents and posterior for pixels)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print the metrics."""
    if arguments.images is None:
        arguments.images = 256 if arguments.likelihood else 1000
    for name, low in (("images", 1), ("tune", 0), ("batch_size", 1), ("timesteps", 0)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < low:
            raise ConfigError(f"{name} must be at least {low}, got {getattr(arguments, name)}")
    folder = Path(arguments.run)
    model_config_file(folder)
    _check_overrides(arguments)
    from ldm.distributed.launch import launched
    from ldm.evaluation.evaluate import evaluate

    console = Console()
    if arguments.likelihood:
        _likelihood(folder, arguments, console)
        return
    sizes = arguments.images, arguments.tune, arguments.batch_size
    out = Path(arguments.out or folder)
    how = parts(arguments), arguments.overrides, out
    report = evaluate(folder, *sizes, console.progress, console.say, *launched(), *how)
    for name, value in report_metrics({k: report[k] for k in ("judge", "autoencoder", "seconds") if k in report}):
        console.say(_line(name, value))
    console.say(f"report: {out / 'report.json'}   picture: {out / 'samples.png'}")


def _check_overrides(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for an override of what training has fixed, or where nothing is drawn."""
    for override in arguments.overrides:
        if not override.startswith("sample."):
            raise ConfigError(f"{override}: only sample.* can be changed, the rest is fixed by the training")
    if arguments.likelihood and (arguments.overrides or arguments.out):
        raise ConfigError("--likelihood draws nothing and writes into RUN: leave sample.* and --out out")


def _likelihood(folder: Path, arguments: argparse.Namespace, console: Console) -> None:
    from ldm.distributed.launch import launched
    from ldm.evaluation.likelihood import SEED, likelihood

    asked = arguments.images, arguments.timesteps, arguments.variance, arguments.batch_size
    found = likelihood(folder, *asked, SEED, console.progress, console.say, *launched(), parts(arguments))
    error = "" if found["error"] is None else f" ± {found['error']:.3f}"
    about = f"({found['images']} images, variance {found['variance']})"
    console.say(f"{'bits per dimension':42s} {found['bits_per_dim']:.3f}{error}   {about}")
    shown = ("parts", "terms", "latent", "with_standard_normal_prior", "by_variance")
    for name, value in report_metrics({k: found[k] for k in shown if k in found}):
        console.say(_line(name, value))
    console.say(f"report: {folder / 'report.json'}   picture: {folder / 'likelihood.png'}")


def _line(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{name:42s} {value['accuracy']:.3f}   ({value['low']:.3f} to {value['high']:.3f}, n = {value['n']})"
    return f"{name:42s} {value:.3f}" if isinstance(value, float) else f"{name:42s} {value}"
