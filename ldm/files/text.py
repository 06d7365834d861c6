"""Text files that users write: captions, prompts, tables, configurations. All of them are read here, in one way."""

from __future__ import annotations

import re
from pathlib import Path

from ldm.files.disk import read_bytes


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, without the byte order mark that some editors put first.

    Raises ValueError naming the file, the line and the byte where it is in another encoding; OSError where it cannot be
    read, or is a named pipe or a device.
    """
    content = read_bytes(file)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{file} is UTF-16: save it as UTF-8") from None
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}): save it as UTF-8"
        ) from None


def lines(text: str) -> list[str]:
    """The lines of a text, which end at \\n, \\r\\n or \\r alone.

    ``str.splitlines`` also ends them at form feeds, U+0085, U+2028 and others, which may stand inside a caption.
    """
    found = re.split(r"\r\n|\n|\r", text)
    return found[:-1] if found[-1] == "" else found
