"""Compare two autoencoders of the same data, trained without and with a discriminator.

  ldm compare-autoencoders runs/textures/l1 runs/textures/gan

Writes a picture (originals, then both reconstructions) and, as JSON beside it, metrics on validation
images: PSNR in dB and SSIM (higher is better), high-frequency energy of the reconstruction over the
original's (median; 1 is right), and the mean logit of the trained discriminator (higher: more
realistic to it).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.console import Console
from ldm.cli.target import check_target
from ldm.config import config_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two runs and the output file."""
    parser.add_argument("plain", metavar="RUN", help="a run of train-autoencoder with loss.gan 0")
    parser.add_argument("adversarial", metavar="RUN_WITH_GAN", help="one on the same data with loss.gan above 0")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the picture: .png, .pdf or .svg (default: comparison.png in the folder that holds RUN_WITH_GAN)",
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
    for name, metrics in compare(plain, adversarial, file).items():
        shown = "  ".join(f"{key} {value:.3f}" for key, value in metrics.items() if value is not None)
        console.say(f"{name:12s} {shown}")
    console.say(f"picture: {file}")
