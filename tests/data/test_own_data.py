"""A realistic folder: each file is read correctly or left out by name; docs/data.md has the same table."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.photos import open_folder

from ldm.config import ClipConfig
from ldm.data.folder import FolderSource
from ldm.data.sample import Sample
from ldm.errors import DataError
from ldm.models.clip import build_clip, from_clip, train_tokenizer
from ldm.models.text import CaptionTable, TextEncoder

ROOT = Path(__file__).resolve().parents[2]
GOOD = 40
LONG = " ".join(f"word{i}" for i in range(500))


def png(mode: int, depth: int, width: int, height: int, rows: bytes) -> bytes:
    """A PNG written by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def halves(left: tuple[int, ...], right: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    """32 × 16 pixels of two colours."""
    image = Image.new(mode, (32, 16), left)
    image.paste(Image.new(mode, (16, 16), right), (16, 0))
    return image


def truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])


def grey16(path: Path) -> None:
    values = np.repeat(np.arange(16) * 4096, 16).reshape(16, 16).astype(">u2")
    path.write_bytes(png(0, 16, 16, 16, b"".join(b"\0" + row.tobytes() for row in values)))


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    halves((255, 255, 255), (0, 0, 0)).save(path, exif=exif, quality=95)


def moving(path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200))]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], **({"lossless": True} if path.suffix == ".webp" else {})
    )


def bomb(path: Path) -> None:
    path.write_bytes(png(0, 1, 10_000, 10_000, b"\0" * (1251 * 10_000)))
    assert path.stat().st_size < 20_000


Check = Callable[[np.ndarray], bool]


def near(*colour: int, at: tuple[int, int] = (4, 4), within: int = 6) -> Check:
    return lambda image: bool(abs(image[at].astype(int) - colour).max() <= within)


# what stands in docs/data.md; file; how it is made; what becomes of it: a check of the pixels, or why it is left out
FILES: list[tuple[str, str, Callable[[Path], Any], Check | str]] = [
    ("a truncated PNG", "cut.png", truncated, "cannot be decoded"),
    ("a text file named .jpg", "fake.jpg", lambda p: p.write_text("no image at all"),
     "not an image in one of the formats"),
    ("an empty file", "empty.png", lambda p: p.touch(), "the file is empty"),
    ("16-bit grey", "grey16.png", grey16, lambda i: i[:, 0, 0].tolist() == [round(v * 4096 / 257) for v in range(16)]),
    ("RGBA, hidden colours under transparency", "alpha.png",
     lambda p: halves((255, 0, 0, 0), (0, 0, 255, 255), "RGBA").save(p),
     lambda i: near(10, 20, 30, within=0)(i) and near(0, 0, 255, at=(4, 20), within=0)(i)),
    ("CMYK", "ink.jpg", lambda p: Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(p, quality=95), near(255, 0, 0)),
    ("rotated by EXIF", "turned.jpg", turned,
     lambda i: i.shape == (32, 16, 3) and i[:14].min() > 200 and i[18:].max() < 50),
    ("1×1", "dot.png", lambda p: Image.new("RGB", (1, 1)).save(p), "1×1 is smaller than 8 pixels"),
    ("an animated GIF", "moving.gif", moving, near(200, 30, 30, within=0)),
    ("an animated WEBP", "moving.webp", moving, near(200, 30, 30, within=0)),
    ("a 12 kB PNG of 100 megapixels", "bomb.png", bomb, "10000×10000 is more than 89478485 pixels"),
    ("a palette with transparency", "palette.gif",
     lambda p: halves((255, 0, 0, 0), (0, 0, 255, 255), "RGBA").save(p), near(10, 20, 30, within=0)),
    ("one bit a pixel", "bit.png", lambda p: Image.new("1", (16, 16), 1).save(p), near(255, 255, 255, within=0)),
    ("32 bits per channel", "float.tiff", lambda p: Image.new("F", (16, 16), 0.5).save(p), "32 bits per channel"),
]  # fmt: skip

# rows of metadata: what stands in docs/data.md; the line; why it is left out
ROWS: list[tuple[str, str, str]] = [
    ("a missing file", '{"file_name": "gone.png", "text": "x"}', "no file 'gone.png'"),
    ("a path out of the folder", '{"file_name": "../outside.png", "text": "x"}', "leaves the folder"),
    ("an absolute path", '{"file_name": "/etc/hostname", "text": "x"}', "leaves the folder"),
    (
        "a duplicate row",
        '{"file_name": "good/0.png", "text": "again"}',
        "file_name 'good/0.png' is already on line 1",
    ),
    ("a broken JSON line", '{"file_name": "good/1.png", "text": "x"', "not JSON"),
    ("a caption that is not text", '{"file_name": "good/2.png", "text": 5}', "text must be text, got 5"),
]

# captions: what stands in docs/data.md; the caption; how many tokens of it are cut
CAPTIONS: list[tuple[str, str, bool]] = [
    ("an empty caption", "", False),
    ("a caption of 500 words", LONG, True),
    ("a Chinese caption", "一只红色的狐狸在雪地里", False),
    ("a caption with an emoji", "a fox 🦊 in the snow", False),
    ("a caption with `<|endoftext|>`", "a <|endoftext|> fox", False),
    ("a caption from right to left", "ثعلب أحمر", False),
]


def build(folder: Path) -> Path:
    """GOOD images and all of the above; the captions of the third table are those of good images."""
    (folder / "good").mkdir(parents=True)
    lines = []
    for i in range(GOOD):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"good/{i}.png")
        text = CAPTIONS[i - 10][1] if 10 <= i < 10 + len(CAPTIONS) else f"good {i}"
        lines.append(json.dumps({"file_name": f"good/{i}.png", "text": text}))
    for _, name, make, _ in FILES:
        make(folder / name)
        lines.append(json.dumps({"file_name": name, "text": name}))
    (folder.parent / "outside.png").write_bytes((folder / "good/0.png").read_bytes())
    (folder / "metadata.jsonl").write_text("\n".join([*lines, *(row for _, row, _ in ROWS)]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("own") / "photos")


def opened(folder: Path, **settings: Any) -> FolderSource:
    given = {"image_size": 32, "max_skipped": 0.5, "validation_fraction": 0.0, "background": (10, 20, 30)}
    return open_folder(folder, **{**given, **settings})


def read(source: FolderSource, name: str) -> Sample:
    return source[[row.file_name for row in source.rows].index(name)]


@pytest.mark.parametrize(("name", "outcome"), [(f[1], f[3]) for f in FILES], ids=[f[0] for f in FILES])
def test_each_file_is_read_rightly_or_left_out_by_name(folder: Path, name: str, outcome: Check | str) -> None:
    source = opened(folder)
    if isinstance(outcome, str):
        with pytest.raises(DataError) as caught:
            read(source, name)
        assert (
            str(caught.value).startswith(f"{folder / name}: ")
            and outcome in str(caught.value)
            and "\n" not in str(caught.value)
        )
    else:
        image = read(source, name).image
        assert image.dtype == np.uint8 and image.shape[2] == 3 and outcome(image), image[4, ::4]


@pytest.mark.parametrize(("number", "reason"), list(enumerate(row[2] for row in ROWS)), ids=[row[0] for row in ROWS])
def test_each_faulty_row_is_left_out_by_its_line(folder: Path, number: int, reason: str) -> None:
    source, where = opened(folder), f"{folder}/metadata.jsonl:{GOOD + len(FILES) + 1 + number}"
    (found,) = [s for s in source.skipped if s.file == where]
    assert reason in found.reason and len(source.skipped) == len(ROWS) and len(source.rows) == GOOD + len(FILES)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    config = ClipConfig(width=16, layers=1, heads=2, merges=64, patch_size=8, projection=8)
    tokenizer = train_tokenizer([row.text for row in opened(folder).rows], config.merges, config.max_length)
    return from_clip(build_clip(config, tokenizer, 32, 3), tokenizer)


@pytest.mark.parametrize(
    ("number", "text", "cut"), [(i, c[1], c[2]) for i, c in enumerate(CAPTIONS)], ids=[c[0] for c in CAPTIONS]
)
def test_each_caption_is_encoded_rightly(folder: Path, encoder: TextEncoder, number: int, text: str, cut: bool) -> None:
    sample = read(opened(folder), f"good/{10 + number}.png")
    assert sample.text == text
    ids, truncated = encoder.tokenize([text])
    assert ids.shape == (1, 77) and truncated == int(cut) and bool(encoder.encode([text]).isfinite().all())
    begin, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    inner = ids[0].tolist()
    assert inner[0] == begin and begin not in inner[1:]
    inner = inner[1 : inner.index(end)]
    assert set(ids[0, 1 + len(inner) :].tolist()) == {end}  # nothing after the first end, which is padding too
    spelled = encoder.tokenizer.decode(inner).replace(" ", "")
    whole = text.replace(" ", "")
    assert (whole.startswith(spelled) and len(inner) == 75) if cut else spelled == whole
    assert CaptionTable(encoder, [text], 8).truncated == int(cut)


def test_the_survey_tells_all_of_it_and_changes_nothing(folder: Path) -> None:
    from ldm.data.survey import leave_out_small, survey

    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}
    looked = leave_out_small(survey(folder), 32)
    refused = {str(folder / f[1]): f[3] for f in FILES if isinstance(f[3], str)}
    found = {s.file: s.reason for s in looked.skipped}
    assert len(found) == len(looked.skipped) == len(refused) + len(ROWS) and looked.total == GOOD + len(FILES) + len(
        ROWS
    )
    assert {file: reason for file, reason in refused.items() if reason not in found[file]} == {}
    assert {f"{folder}/metadata.jsonl:{GOOD + len(FILES) + 1 + i}" for i in range(len(ROWS))} <= set(found)
    assert sum(h.turned for h in looked.headers) == 1 and sum(h.animated for h in looked.headers) == 2
    assert {h.mode for h in looked.headers} >= {"RGB", "RGBA", "CMYK", "I;16", "1", "P"} and not looked.grey
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def test_too_much_left_out_stops_with_one_line(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        opened(folder, max_skipped=0.01)
    said = str(caught.value)
    assert said.startswith(
        f"{folder}: {len(ROWS)} of {GOOD + len(FILES) + len(ROWS)} cannot be used, more than data.max_skipped 0.01"
    )
    assert "metadata.jsonl:" in said and f"`ldm init {folder}` lists all" in said and "\n" not in said


def test_the_documentation_has_every_row() -> None:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    rows = [name for name, *_ in (*FILES, *ROWS, *CAPTIONS)]
    assert [name for name in rows if f"| {name} |" not in text] == []
