"""Write what is known of a run into one HTML file: curves, pictures, reconstructions, figures, skipped files, settings.

  ldm report runs/demo

Works on a run of any training command, finished or not. The file needs nothing beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.console import Console
from ldm.cli.target import check_target
from ldm.config import ConfigError, load_run
from ldm.files.disk import replace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and the output file."""
    parser.add_argument(
        "run", metavar="RUN", help="a run of train-autoencoder, train-clip or train-ldm, finished or not"
    )
    parser.add_argument("--out", metavar="FILE", help="the HTML file (default: RUN/report.html)")
    parser.add_argument(
        "--images", type=int, default=256, help="validation images reconstructed (default 256; 0: none)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Check, collect and write."""
    if arguments.images < 0:
        raise ConfigError(f"images must be at least 0, got {arguments.images}")
    load_run(arguments.run)  # report a fault in it at once
    folder, console = Path(arguments.run), Console()
    file = Path(arguments.out) if arguments.out is not None else folder / "report.html"
    from ldm.evaluation.report.html import is_page
    from ldm.evaluation.report.report import report

    check_target(file, is_page)  # before the reconstructions, which may take minutes
    text = report(folder, arguments.images, console.progress)
    replace(file, text.encode(errors="replace"))  # a file name may hold bytes that are no text
    console.say(f"report: {file}")
