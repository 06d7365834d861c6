"""Text files that users write: captions, prompts, tables, configurations, all read as UTF-8."""

from __future__ import annotations

import re
from pathlib import Path

from ldm.files.disk import read_bytes


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises ValueError naming file, line and byte for another encoding; OSError for a file that
    cannot be read, or is a named pipe or device.
    """
    content = read_bytes(file)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{file} is UTF-16: save it as UTF-8") from None
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ValueError(f"{file}: line {line} is not UTF-8 (byte 0x{byte:02x}): save it as UTF-8") from None


def lines(text: str) -> list[str]:
    """The lines of a text, split at \\n, \\r\\n and \\r only.

    ``str.splitlines`` also splits at form feeds, U+0085, U+2028 and others, which a caption may
    contain.
    """
    found = re.split(r"\r\n|\n|\r", text)
    return found[:-1] if found[-1] == "" else found
