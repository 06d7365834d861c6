"""Compare an autoencoder trained without a discriminator and one trained with it, on the same data.

Writes a picture (originals, then both reconstructions) and the figures: PSNR, high-frequency energy of the
reconstruction over the original's (median), and the mean logit that the trained discriminator gives.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.console import Console
from ldm.cli.target import check_target
from ldm.config import config_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two runs."""
    parser.add_argument("plain", metavar="RUN", help="a run of train-autoencoder with loss.gan 0")
    parser.add_argument("adversarial", metavar="RUN_WITH_GAN", help="the same with loss.gan above 0")
    parser.add_argument(
        "--out",
        help="the picture, a .png (default: comparison.png beside the second run); the figures are in a .json beside it",
    )


def run(arguments: argparse.Namespace) -> None:
    """Compare and print."""
    plain, adversarial = Path(arguments.plain), Path(arguments.adversarial)
    for path in (plain, adversarial):
        config_file(path)
    from ldm.evaluation.figures.plots import SUFFIXES, is_figure

    file = Path(arguments.out) if arguments.out is not None else adversarial.parent / "comparison.png"
    check_target(file, is_figure, SUFFIXES, (".json",))
    from ldm.evaluation.compare_autoencoders import compare

    console = Console()
    for name, figures in compare(plain, adversarial, file).items():
        console.say(
            f"{name:12s} " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items() if value is not None)
        )
    console.say(f"picture: {file}")
