"""Errors that a user can fix: one line and an exit code each (``CODES`` in ldm/cli/main.py)."""

from __future__ import annotations


class UserError(RuntimeError):
    """An error whose message says what is wrong and what would be right.

    Attributes:
        exit_code: exit code of the command that fails with it; None for a bug in this program.
        everywhere: True if every process of the launch raises it; the main one reports it.
    """

    exit_code: int | None = 1
    everywhere: bool = False


class RunError(UserError):
    """A run directory is in use, damaged, or of another configuration; the message names it."""

    exit_code = 2


class DataError(UserError):
    """The data on disk is invalid; the message names the file or row."""

    exit_code = 3


class FolderError(UserError):
    """A model folder is incomplete or inconsistent; the message names the file or tensor."""

    exit_code = 4


class CheckpointError(UserError):
    """A checkpoint cannot be written, is damaged, or does not fit; the message names the file."""

    exit_code = 4


class NonFiniteError(UserError):
    """A computation gave NaN or infinity; the message names the part and the step."""

    exit_code = 5
