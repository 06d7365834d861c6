"""Write one self-contained HTML file about a run: curves, images, metrics, skipped files, settings.

  ldm report runs/demo

Works for a run of any training command, finished or not.
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
    parser.add_argument("run", metavar="RUN", help="a run of any training command, finished or not")
    parser.add_argument("--out", metavar="FILE", help="the HTML file (default: RUN/report.html)")
    parser.add_argument(
        "--images", type=int, default=256, metavar="N", help="validation images to reconstruct (default 256; 0: none)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Check, collect and write."""
    if arguments.images < 0:
        raise ConfigError(f"images must be at least 0, got {arguments.images}")
    load_run(arguments.run)  # a faulty configuration fails at once
    folder, console = Path(arguments.run), Console()
    file = Path(arguments.out) if arguments.out is not None else folder / "report.html"
    from ldm.evaluation.report.html import is_page
    from ldm.evaluation.report.report import report

    check_target(file, is_page)  # before the reconstructions, which may take minutes
    text = report(folder, arguments.images, console.progress)
    replace(file, text.encode(errors="replace"))  # a file name may hold bytes that are not text
    console.say(f"report: {file}")
