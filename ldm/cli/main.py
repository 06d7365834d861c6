"""`ldm <command>`: parse, call, and turn every known fault into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

# command → (module with add_arguments(parser) and run(arguments), what it does); modules import no torch at their top
COMMANDS = {
    "train-autoencoder": ("ldm.cli.train_autoencoder", "stage 1: train the autoencoder"),
    "train-clip": ("ldm.cli.train_clip", "train a small CLIP text encoder on the run's own captions and images"),
    "cache-latents": ("ldm.cli.cache_latents", "encode the images of a diffusion run once (train-ldm does it by itself)"),
    "train-ldm": ("ldm.cli.train_ldm", "stage 2: train the latent diffusion model"),
    "sample": ("ldm.cli.sample", "draw images from a run or a model folder"),
    "evaluate": ("ldm.cli.evaluate", "judge a run's samples and write report.json"),
    "report": ("ldm.cli.report", "one HTML file of a run, in any state: curves, pictures, figures, what was skipped"),
    "compare-autoencoders": ("ldm.cli.compare_autoencoders", "two autoencoders side by side, without and with a discriminator"),
}

CODES = """exit codes: 0 done, 2 usage or configuration, 3 data, 4 checkpoint or model folder, 5 training went non-finite,
75 interrupted and saved (the same command goes on)"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(
        prog="ldm", description="Train and use latent diffusion models.", epilog=CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, text) in COMMANDS.items():
        implementation = importlib.import_module(module)
        sub = commands.add_parser(name, help=text, description=implementation.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        implementation.add_arguments(sub)
        sub.set_defaults(function=implementation.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = parser().parse_args(argv)
    try:
        arguments.function(arguments)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        code = getattr(error, "exit_code", None)  # the errors that a person can mend carry one
        if code is None:
            raise
        print(f"ldm {arguments.command}: {error}", file=sys.stderr)
        return code
    finally:
        _leave_process_group()
    return 0


def _leave_process_group() -> None:
    """End torch.distributed where it was started: a process that leaves without it can abort at exit."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
