"""Judge the samples of a run, and write RUN/report.json, RUN/samples.png and RUN/curves.png.

  ldm evaluate runs/demo

Drawn shapes are read back by an exact judge, digits by a classifier trained on the real ones. Sampling settings are
chosen on captions seen in training alone, and held for everything else. Seeds are fixed. Started by
`accelerate launch scripts/evaluate.py` or torchrun, each process does its share; the report is the same but for seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli.console import Console
from ldm.config import ConfigError, config_file
from ldm.evaluation.record import figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and how many images."""
    parser.add_argument("run", metavar="RUN", help="a finished run of train-ldm on shapes, shapes-two or digits")
    parser.add_argument("--images", type=int, default=1000, help="images per set (default 1000)")
    parser.add_argument(
        "--tune", type=int, default=96, help="images for each of the settings tried (default 96; 0: the run's own settings)"
    )
    parser.add_argument("--batch-size", type=int, default=100, help="images computed together by one process (default 100)")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print the figures."""
    for name, low in (("images", 1), ("tune", 0), ("batch_size", 1)):
        if getattr(arguments, name) < low:
            raise ConfigError(f"{name} must be at least {low}, got {getattr(arguments, name)}")
    folder = Path(arguments.run)
    config_file(folder)
    from ldm.evaluation.evaluate import evaluate
    from ldm.training.launch import launched

    console = Console()
    report = evaluate(folder, arguments.images, arguments.tune, arguments.batch_size, console.progress, console.say, *launched())
    for path, value in figures({k: report[k] for k in ("judge", "autoencoder", "seconds") if k in report}):
        console.say(_line(path, value))
    console.say(f"report: {folder / 'report.json'}   picture: {folder / 'samples.png'}")


def _line(path: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{path:42s} {value['accuracy']:.3f}   ({value['low']:.3f} to {value['high']:.3f}, n = {value['n']})"
    return f"{path:42s} {value:.3f}" if isinstance(value, float) else f"{path:42s} {value}"
