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
from ldm.config import ConfigError


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
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run: it has no config.yaml")
    from ldm.evaluation.evaluate import evaluate
    from ldm.training.launch import launched

    console = Console()
    report = evaluate(folder, arguments.images, arguments.tune, arguments.batch_size, console.progress, console.say, *launched())
    for line in _lines(report["judge"], "judge"):
        console.say(line)
    for line in _lines({k: report[k] for k in ("autoencoder", "seconds") if k in report}, ""):
        console.say(line)
    console.say(f"report: {folder / 'report.json'}   picture: {folder / 'samples.png'}")


def _lines(tree: Any, path: str) -> list[str]:
    """Every figure of a report on a line of its own."""
    if isinstance(tree, dict) and "accuracy" in tree:
        return [f"{path:42s} {tree['accuracy']:.3f}   ({tree['low']:.3f} to {tree['high']:.3f}, n = {tree['n']})"]
    if isinstance(tree, dict):
        return [line for key, value in tree.items() for line in _lines(value, f"{path}.{key}" if path else key)]
    return [f"{path:42s} {tree:.3f}" if isinstance(tree, float) else f"{path:42s} {tree}"]
