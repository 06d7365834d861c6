"""What a folder of checkpoints holds, and damage to their files."""

from pathlib import Path

from ldm.runs.checkpoints.folder import step_of, steps


def updates(folder: Path) -> list[int]:
    """Updates of the checkpoints in a folder."""
    return [step_of(path) for path in steps(folder)]


def flip(file: Path) -> None:
    """Change the last bit of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
