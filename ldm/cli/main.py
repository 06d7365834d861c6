"""`ldm <command>`: parse, call, and turn every known error into one line and an exit code."""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from ldm.cli.console import complain, end_output, one_line, silence, write_anything
from ldm.distributed.processes import own_rank as rank
from ldm.files.disk import OS_FAULT, described

# heading → command → (module with add_arguments(parser) and run(arguments), one line for `ldm --help`);
# no module imports torch at its top
GROUPS = {
    "train": {
        "init": ("ldm.cli.init", "survey a folder of images and write configurations for it"),
        "train": ("ldm.cli.train", "train all stages of a folder of configurations, in order"),
        "train-autoencoder": ("ldm.cli.train_autoencoder", "stage 1: train the autoencoder"),
        "train-clip": ("ldm.cli.train_clip", "train a small CLIP text encoder on the captions and images of the data"),
        "cache-latents": ("ldm.cli.cache_latents", "encode a run's images once (train-ldm does it automatically)"),
        "train-ldm": ("ldm.cli.train_ldm", "stage 2: train the latent diffusion model"),
        "train-classifier": (
            "ldm.cli.train_classifier",
            "train a classifier of noisy latents, for classifier guidance",
        ),
    },
    "draw": {
        "sample": ("ldm.cli.sample", "draw images from a run or a model folder"),
        "invert": ("ldm.cli.invert", "find the noise of an image by DDIM inversion, and measure the way back"),
        "reproduce": ("ldm.cli.reproduce", "draw an image of `ldm sample` again from its metadata, and compare"),
    },
    "look at a run": {
        "status": ("ldm.cli.status", "print the state of a run in one line, with an exit code for scripts"),
        "report": ("ldm.cli.report", "write one HTML file about a run in any state: curves, images, metrics"),
        "checkpoints": ("ldm.cli.checkpoints", "list a run's checkpoints, check them, and show which one is resumed"),
        "diff": ("ldm.cli.diff", "show how two runs, or two models, differ"),
        "replay": ("ldm.cli.replay", "compute a non-finite update again and name the first module that broke"),
        "verify-resume": ("ldm.cli.verify_resume", "prove for a configuration that resuming is exact"),
        "plot": ("ldm.cli.plot", "plot noise schedules, forward and reverse chains, and sweeps of guidance"),
    },
    "models and files": {
        "inspect": ("ldm.cli.inspect", "describe a model, folder or file: sizes, process, types, hashes"),
        "convert": ("ldm.cli.convert", "convert a model to a diffusers folder or a single file"),
    },
    "measure": {
        "evaluate": ("ldm.cli.evaluate", "judge the samples of a run and write report.json"),
        "sampler-report": ("ldm.cli.sampler_report", "measure the samplers, on exact targets or on a run"),
        "compare-autoencoders": (
            "ldm.cli.compare_autoencoders",
            "compare autoencoders without and with a discriminator",
        ),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}

CODES = """exit codes:
  0    done
  2    usage or configuration error, or an operating-system error (file, memory)
  3    data error
  4    error in a checkpoint or model folder
  5    training became non-finite
  75   interrupted and saved: the same command resumes
  130  interrupted with nothing to save"""

LOST = ("Connection closed by peer", "Connection reset by peer")  # gloo's words for a process that has ended
LATE = ("Timed out waiting", "wait timeout after")  # and for one that does not answer: later, and at the first exchange
GRACE = 10  # seconds that a failing process leaves to the main one to report the same; the launcher then ends both


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, printed by the main process."""

    def error(self, message: str) -> NoReturn:
        _wait_for_the_main_process()
        self.exit(2, one_line(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        end_output()
        super().exit(status, message)

    def print_help(self, file: IO[str] | None = None) -> None:
        if rank() == 0:
            super().print_help(file)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(
        prog="ldm",
        description="Train and use latent diffusion models.",
        epilog=f"{_listed()}\n\n{CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(
        dest="command",
        metavar="command",
        required=True,
        help="one of those below; see `ldm command --help`",
    )
    for name, (module, _) in COMMANDS.items():
        implementation = importlib.import_module(module)
        sub = commands.add_parser(
            name, description=implementation.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        implementation.add_arguments(sub)
        sub.set_defaults(function=implementation.run)
    return top


def _listed() -> str:
    """All commands under the headings of GROUPS."""
    width = max(map(len, COMMANDS)) + 2
    groups = (
        "\n".join([f"{head}:", *(f"  {name:{width}}{text}" for name, (_, text) in group.items())])
        for head, group in GROUPS.items()
    )
    return "\n\n".join(groups)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse as parse_args does, but allow key=value behind options too.

    argparse ends a list of positional arguments at the first option.
    """
    top = parser()
    arguments, unparsed = top.parse_known_args([_text(top, one) for one in (sys.argv[1:] if argv is None else argv)])
    if unparsed and (not hasattr(arguments, "overrides") or any(one.startswith("-") for one in unparsed)):
        top.error(f"unrecognized arguments: {' '.join(unparsed)}")
    if unparsed:
        arguments.overrides = [*arguments.overrides, *unparsed]
    return arguments


def _text(top: argparse.ArgumentParser, argument: str) -> str:
    """Decode an argument as UTF-8, whatever the locale; one that is not text ends the program."""
    try:
        text = argument.encode(errors="surrogateescape").decode()
    except UnicodeError:
        top.error(f"argument {argument!r} is not UTF-8 text")
    if "\0" in text:
        top.error(f"argument {text!r} contains a NUL character")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    write_anything()
    arguments = _parse(argv)
    everywhere = False
    shown = warnings.showwarning
    warnings.showwarning = _one_line(shown)
    try:
        code = arguments.function(arguments)  # None, except for commands whose exit code is an answer
    except KeyboardInterrupt:
        if rank() == 0:
            complain("stopped")
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        silence(sys.stdout)
        return 0
    except Exception as error:
        code, line = _known(error)
        everywhere = getattr(error, "everywhere", False)  # raised by every process
        if everywhere and rank() != 0:
            return code or 1
        _wait_for_the_main_process()
        place = "" if rank() == 0 else f" (process {rank()})"
        if code is not None:
            complain(f"ldm {arguments.command}{place}: {line}")
            return code
        if (fault := _lost_process(error, arguments.command)) is not None:
            complain(f"ldm {arguments.command}{place}: {fault}")
            return 1
        if not everywhere:
            raise
        traceback.print_exc()  # now: once another process has ended, the launcher may end this one
        return 1
    finally:
        end_output()
        warnings.showwarning = shown
        _leave_process_group(everywhere)
    return code or 0


def _known(error: Exception) -> tuple[int | None, str]:
    """Exit code and message of an error that the user can fix; code None for any other."""
    if hasattr(error, "exit_code"):
        return error.exit_code, str(error)  # type: ignore[attr-defined]
    if isinstance(error, OSError):
        return OS_FAULT, described(error)
    torch_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or torch_memory:
        wanted = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        size = f" ({wanted[0].lower()})" if wanted else ""
        return OS_FAULT, f"not enough memory{size}: use a smaller batch, image or network"
    if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
        remedy = "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        return OS_FAULT, f"{error.object!r} cannot be named in this locale ({error.encoding}): {remedy}"
    return None, ""


def _lost_process(error: Exception, command: str) -> str | None:
    """A message about another process, if an exchange with it failed; None for any other error."""
    if any(sign in str(error) for sign in LOST):
        return "another process has ended: its own message, if it could write one, says why"
    if any(sign in str(error) for sign in LATE):
        waited = re.search(r"(\d+)ms", str(error))
        limit = f" for {int(waited[1]) / 1000:g} s" if waited else ""
        setting = " (train.rank_timeout)" if command.startswith("train") else ""
        return f"another process has not answered{limit}{setting}: it hangs, or its work takes longer than that"
    return None


def _one_line(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Show warnings of this package as one line, from the main process; leave others to ``otherwise``."""

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if category is not UserWarning or "ldm" not in Path(filename).parts:
            otherwise(message, category, filename, *rest, **more)
        elif rank() == 0:
            complain(f"warning: {message}")

    return show


def _wait_for_the_main_process() -> None:
    """Let the main process report first: it most likely fails too, and a launcher ends all when one ends."""
    if rank() != 0:
        time.sleep(GRACE)


def _leave_process_group(together: bool) -> None:
    """End torch.distributed if it was started: a process that exits without doing so may abort.

    ``together``: wait for all first, so that the main process has reported before any of them ends.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        if together:
            with suppress(RuntimeError):  # a process that does not come has an error of its own
                torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """End this process; if it is one of several, without tearing down the interpreter.

    A thread of gloo may still hold a tensor of the last exchange, would need the interpreter to free
    it, and would abort: the launcher then reports a finished run as failed (torch 2.15;
    github.com/pytorch/pytorch/pull/179291 describes it).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()  # they end the data workers
        end_output()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    exit_process(main())
