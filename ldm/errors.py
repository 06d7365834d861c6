"""The faults that a user can fix: one line and an exit code each (see ``CODES`` in ldm/cli/main.py)."""

from __future__ import annotations


class UserError(RuntimeError):
    """A fault whose message says what is wrong and what would be right.

    Attributes:
        exit_code: of the command that ends with it; None for a fault of this program.
        everywhere: raised by every process of a launch, so that the main one alone reports it.
    """

    exit_code: int | None = 1
    everywhere: bool = False


class RunError(UserError):
    """A run directory is in use, damaged, or belongs to another configuration; the message names it."""

    exit_code = 2


class DataError(UserError):
    """The data on disk is not as it should be; the message names the file or row."""

    exit_code = 3


class FolderError(UserError):
    """A model folder is incomplete or does not fit together; the message names the file or tensor."""

    exit_code = 4


class CheckpointError(UserError):
    """A checkpoint cannot be written, is damaged, or does not fit; the message names the file or the tensor."""

    exit_code = 4


class NonFiniteError(UserError):
    """A computation gave NaN or an infinity; the message names the part and the step."""

    exit_code = 5
