"""Text as users write it, and files that are replaced whole."""

import os
from pathlib import Path

import pytest

from ldm.files.disk import file_hash, replace, resolved
from ldm.files.text import lines, read_text


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa red \xe2\x9c\xbf\n")
    assert read_text(tmp_path / "a.txt") == "a red ✿\n"


def test_lines_end_at_line_ends_alone() -> None:
    assert lines("one\u2028still one\x0c\x85\r\ntwo\rthree\n\nfive") == [
        "one\u2028still one\x0c\x85",
        "two",
        "three",
        "",
        "five",
    ]
    assert lines("") == [] and lines("a\n") == ["a"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"fine\ncaf\xe9\n", "line 2 is not UTF-8 (byte 0xe9): save it as UTF-8"), ("a".encode("utf-16"), "is UTF-16")],
)
def test_another_encoding_is_named(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_text(tmp_path / "a.txt")
    assert str(tmp_path / "a.txt") in str(raised.value) and fault in str(raised.value)


def test_what_would_be_waited_for_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        for reads in (read_text, file_hash):
            with pytest.raises(OSError, match=f"not a regular file: '{odd}'"):
                reads(odd)


def test_what_a_shell_passes_through_a_pipe_is_read() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a photo\n")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}")) == "a photo\n"
    os.close(reader)


def test_a_link_to_itself_has_a_place(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("folder")
    assert (
        resolved(tmp_path / "loop") == tmp_path.resolve() / "loop"
        and resolved(tmp_path / "link") == tmp_path.resolve() / "folder"
    )


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(tmp_path / "new/a", b"old")
    before = file_hash(tmp_path / "new/a")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace(tmp_path / "new/a", b"new")
    assert file_hash(tmp_path / "new/a") == before and os.listdir(tmp_path / "new") == ["a"]
