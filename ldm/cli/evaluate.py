"""Judge the samples of a run, and write RUN/report.json, RUN/samples.png and RUN/curves.png.

  ldm evaluate runs/demo

Drawn shapes are read back by an exact judge, digits by a classifier trained on the real ones. Sampling settings are
chosen on captions seen in training alone, and held for everything else. Seeds are fixed. Started by
`accelerate launch scripts/evaluate.py` or torchrun, each process does its share; the report is the same but for seconds.

  ldm evaluate runs/demo --likelihood

bounds log p(image | caption) of validation images instead, of any data, in bits per dimension: RUN/likelihood.png, and the
entry `likelihood` of RUN/report.json, whose other entries stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli.console import Console
from ldm.cli.reading import add_parts, parts
from ldm.config import VARIANCES, ConfigError, config_file
from ldm.runs.records import report_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and the number of images."""
    parser.add_argument(
        "run", metavar="RUN", help="a finished run of train-ldm; on shapes, shapes-two or digits without --likelihood"
    )
    parser.add_argument("--images", type=int, help="images per set (default 1000; 256 with --likelihood)")
    parser.add_argument(
        "--tune",
        type=int,
        default=96,
        help="images for each of the settings tried (default 96; 0: the run's own settings)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=100, help="images computed together by one process (default 100)"
    )
    add_parts(parser)
    parser.add_argument("--likelihood", action="store_true", help="bits per dimension instead of judged samples")
    parser.add_argument(
        "--timesteps", type=int, help="with --likelihood: steps drawn for each image (default 32; 0: all of them)"
    )
    parser.add_argument(
        "--variance",
        choices=VARIANCES,
        help="with --likelihood: of the reverse steps (default: learned where it is, else beta for latents, posterior for pixels)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print the figures."""
    if arguments.images is None:
        arguments.images = 256 if arguments.likelihood else 1000
    for name, low in (("images", 1), ("tune", 0), ("batch_size", 1), ("timesteps", 0)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < low:
            raise ConfigError(f"{name} must be at least {low}, got {getattr(arguments, name)}")
    folder = Path(arguments.run)
    config_file(folder)
    from ldm.distributed.launch import launched
    from ldm.evaluation.evaluate import evaluate

    console = Console()
    if arguments.likelihood:
        _likelihood(folder, arguments, console)
        return
    report = evaluate(
        folder,
        arguments.images,
        arguments.tune,
        arguments.batch_size,
        console.progress,
        console.say,
        *launched(),
        parts(arguments),
    )
    for path, value in report_metrics({k: report[k] for k in ("judge", "autoencoder", "seconds") if k in report}):
        console.say(_line(path, value))
    console.say(f"report: {folder / 'report.json'}   picture: {folder / 'samples.png'}")


def _likelihood(folder: Path, arguments: argparse.Namespace, console: Console) -> None:
    from ldm.distributed.launch import launched
    from ldm.evaluation.likelihood import SEED, likelihood

    found = likelihood(
        folder, arguments.images, arguments.timesteps, arguments.variance, arguments.batch_size, SEED, console.progress, console.say,
        *launched(), parts(arguments),
    )  # fmt: skip
    error = "" if found["error"] is None else f" ± {found['error']:.3f}"
    console.say(
        f"{'bits per dimension':42s} {found['bits_per_dim']:.3f}{error}   ({found['images']} images, variance {found['variance']})"
    )
    for path, value in report_metrics(
        {k: found[k] for k in ("parts", "terms", "latent", "with_standard_normal_prior", "by_variance") if k in found}
    ):
        console.say(_line(path, value))
    console.say(f"report: {folder / 'report.json'}   picture: {folder / 'likelihood.png'}")


def _line(path: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{path:42s} {value['accuracy']:.3f}   ({value['low']:.3f} to {value['high']:.3f}, n = {value['n']})"
    return f"{path:42s} {value:.3f}" if isinstance(value, float) else f"{path:42s} {value}"
