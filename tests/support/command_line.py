"""Calls of the command line within the process of the tests."""

from collections.abc import Callable

import pytest

from ldm.cli.main import main

Call = Callable[..., tuple[int, str, str]]


def caller(capsys: pytest.CaptureFixture[str]) -> Call:
    """A function that runs a command; it returns the exit code, and what went to stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
