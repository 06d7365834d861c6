"""`ldm <command>`: parse, call, and turn every known fault into one line and an exit code."""

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

from ldm.cli.console import complain, end_output, one_line, rank, silence, write_anything
from ldm.files.disk import OS_FAULT, described

# heading → command → (module with add_arguments(parser) and run(arguments), what it does); modules import no torch at their top
GROUPS = {
    "train": {
        "init": ("ldm.cli.init", "look at a folder of images, and write configurations for it"),
        "train": ("ldm.cli.train", "train all stages of a folder of configurations, one after the other"),
        "train-autoencoder": ("ldm.cli.train_autoencoder", "stage 1: train the autoencoder"),
        "train-clip": ("ldm.cli.train_clip", "train a small CLIP text encoder on the run's own captions and images"),
        "cache-latents": (
            "ldm.cli.cache_latents",
            "encode the images of a diffusion run once (train-ldm does it automatically)",
        ),
        "train-ldm": ("ldm.cli.train_ldm", "stage 2: train the latent diffusion model"),
        "train-classifier": (
            "ldm.cli.train_classifier",
            "train a classifier of noisy latents, for classifier guidance",
        ),
    },
    "draw": {
        "sample": ("ldm.cli.sample", "draw images from a run or a model folder"),
        "reproduce": ("ldm.cli.reproduce", "draw a picture of `ldm sample` again, from what its PNG says, and compare"),
    },
    "look at a run": {
        "status": ("ldm.cli.status", "say in one line what a run is doing; the exit code says it to scripts"),
        "report": (
            "ldm.cli.report",
            "one HTML file of a run, in any state: curves, pictures, figures, what was skipped",
        ),
        "checkpoints": (
            "ldm.cli.checkpoints",
            "list a run's checkpoints, whether they are intact, and which one the next start takes",
        ),
        "diff": ("ldm.cli.diff", "say what differs between two runs, or two models"),
        "replay": ("ldm.cli.replay", "compute a non-finite update again, and name the first module that broke"),
        "verify-resume": (
            "ldm.cli.verify_resume",
            "prove on a configuration that a run which is cut off continues exactly",
        ),
        "plot": (
            "ldm.cli.plot",
            "plots: noise schedules, forward and reverse chain, guidance against accuracy and diversity",
        ),
    },
    "models and files": {
        "inspect": ("ldm.cli.inspect", "say what a model, a folder or a file is: sizes, process, types, hashes"),
        "convert": ("ldm.cli.convert", "write a model in another layout: a diffusers folder, a single file"),
    },
    "measure": {
        "evaluate": ("ldm.cli.evaluate", "judge a run's samples and write report.json"),
        "sampler-report": ("ldm.cli.sampler_report", "measure the samplers, on exact targets or on a run"),
        "compare-autoencoders": (
            "ldm.cli.compare_autoencoders",
            "two autoencoders side by side, without and with a discriminator",
        ),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}

CODES = """exit codes: 0 done, 2 usage, configuration, or a file or disk that the system refuses, 3 data, 4 checkpoint or model folder,
5 training went non-finite, 75 interrupted and saved (the same command continues), 130 interrupted where there was nothing to save"""


LOST = ("Connection closed by peer", "Connection reset by peer")  # how gloo says that a process has gone
LATE = (
    "Timed out waiting",
    "wait timeout after",
)  # and that one is there and silent: in an exchange, and at the first meeting
GRACE = 10  # seconds that a failing process leaves to the main one to say the same; the launcher then ends both


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which speaks on the main process."""

    def error(self, message: str) -> NoReturn:
        _leave_it_to_the_main_process()
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
        help="one of those below; `ldm command --help` has its options",
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
    """As parse_args, but key=value may stand behind options, too: argparse ends a list of positions at the first option."""
    top = parser()
    arguments, left = top.parse_known_args([_text(top, one) for one in (sys.argv[1:] if argv is None else argv)])
    if left and (not hasattr(arguments, "overrides") or any(one.startswith("-") for one in left)):
        top.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    return arguments


def _text(top: argparse.ArgumentParser, argument: str) -> str:
    """An argument as the text that it is in UTF-8, whatever the locale; one that is not text ends the program."""
    try:
        text = argument.encode(errors="surrogateescape").decode()
    except UnicodeError:
        top.error(f"argument {argument!r} is not UTF-8 text")
    if "\0" in text:
        top.error(f"argument {text!r} holds a NUL character")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    write_anything()
    arguments = _parse(argv)
    everywhere = False
    shown = warnings.showwarning
    warnings.showwarning = _one_line(shown)
    try:
        code = arguments.function(arguments)  # None, but of the commands whose exit code is their answer
    except KeyboardInterrupt:
        if rank() == 0:
            complain("stopped")
        return 130
    except BrokenPipeError:  # whoever read our lines, `head` for one, has enough of them
        silence(sys.stdout)
        return 0
    except Exception as error:
        code, line = _known(error)
        everywhere = getattr(error, "everywhere", False)  # and those that every process raises are marked
        if everywhere and rank() != 0:
            return code or 1
        _leave_it_to_the_main_process()
        place = "" if rank() == 0 else f" (process {rank()})"
        if code is not None:
            complain(f"ldm {arguments.command}{place}: {line}")
            return code
        if (fault := _of_another(error, arguments.command)) is not None:
            complain(f"ldm {arguments.command}{place}: {fault}")
            return 1
        if not everywhere:
            raise
        traceback.print_exc()  # before leaving, or the launcher may end this process first
        return 1
    finally:
        end_output()
        warnings.showwarning = shown
        _leave_process_group(everywhere)
    return code or 0


def _known(error: Exception) -> tuple[int | None, str]:
    """Exit code and line of an error that the user can do something about; None for any other."""
    if hasattr(error, "exit_code"):
        return error.exit_code, str(error)  # type: ignore[attr-defined]
    if isinstance(error, OSError):
        return OS_FAULT, described(error)
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        wanted = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        return (
            OS_FAULT,
            f"not enough memory{f' ({wanted[0].lower()})' if wanted else ''}: take a smaller batch, image or network",
        )
    if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
        return (
            OS_FAULT,
            f"{error.object!r} cannot be named in this locale ({error.encoding}): set LC_ALL=C.UTF-8 or PYTHONUTF8=1",
        )
    return None, ""


def _of_another(error: Exception, command: str) -> str | None:
    """A line about another process from an error in an exchange; None for any other error."""
    if any(sign in str(error) for sign in LOST):
        return "another process has ended: its own line, if it could write one, says why"
    if any(sign in str(error) for sign in LATE):
        waited = re.search(r"(\d+)ms", str(error))
        limit = f" for {int(waited[1]) / 1000:g} s" if waited else ""
        setting = " (train.rank_timeout)" if command.startswith("train") else ""
        return f"another process has not answered{limit}{setting}: it hangs, or its work takes longer than that"
    return None


def _one_line(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Show warnings meant for the person at the terminal as one line, from the main process; others as before."""

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if category is not UserWarning or "ldm" not in Path(filename).parts:
            otherwise(message, category, filename, *rest, **more)
        elif rank() == 0:
            complain(f"warning: {message}")

    return show


def _leave_it_to_the_main_process() -> None:
    """Wait where this is not the main one: it most likely fails too, and a launcher ends all when the first has ended."""
    if rank() != 0:
        time.sleep(GRACE)


def _leave_process_group(together: bool) -> None:
    """End torch.distributed where it was started: a process that leaves without it can abort at exit.

    ``together``: when all are here, so that the main one has spoken before a launcher sees the first of them end.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        if together:
            with suppress(RuntimeError):  # one that does not come has an error of its own
                torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """End this process; one of several without tearing down the interpreter.

    A thread of gloo may still hold a tensor of the last exchange, for which it would need the interpreter, and abort: then the launcher
    calls a run failed that is done (torch 2.15; github.com/pytorch/pytorch/pull/179291 describes it).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()  # data workers are ended there
        end_output()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    exit_process(main())
