"""A folder of somebody's images: rows, captions, splits, and what is said of faults."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
from PIL import Image
from support.photos import open_folder, paint

from ldm.data.folder import FolderSource
from ldm.data.sample import Skipped
from ldm.errors import DataError


def write(folder: Path, rows: list, images: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    for i, row in enumerate(rows):
        if images and isinstance(row, dict):
            path = folder / row["file_name"]
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (6 + i % 3, 5), (i, 2 * i, 255 - i)).save(path)
    return folder


def rows(n: int) -> list[dict]:
    return [{"file_name": f"sub/{i}.png", "text": f"picture {i % 7}", "score": i} for i in range(n)]


def opened(folder: Path, split: str = "train", **settings) -> FolderSource:
    return open_folder(folder, split, **{"min_side": 1, **settings})


def test_folder_reads_images_captions_and_columns(tmp_path):
    write(tmp_path, rows(40))
    train, validation = (opened(tmp_path, split, validation_fraction=0.2) for split in ("train", "validation"))
    assert train.length and validation.length and train.length + validation.length == 40
    seen = {}
    for source in (train, validation):
        for i in range(len(source.rows)):
            sample = source[i]
            n = sample.truth["score"]
            assert sample.truth == {"score": n} and sample.text == f"picture {n % 7}"
            assert sample.image.shape == (5, 6 + n % 3, 3) and tuple(sample.image[0, 0]) == (n, 2 * n, 255 - n)
            seen[n] = source
    assert len(seen) == 40
    assert train.captions(7) == [f"picture {i}" for i in range(7)] and train.captions(6) is None
    assert pickle.loads(pickle.dumps(train))[0].text == train[0].text  # data workers get copies


def test_split_is_stable_under_adding_files_and_has_the_asked_share(tmp_path):
    some = opened(write(tmp_path / "a", rows(100)), "validation", validation_fraction=0.3)
    more = opened(write(tmp_path / "b", rows(300)[::-1]), "validation", validation_fraction=0.3)
    names = {row.file_name for row in more.rows}
    assert {row.file_name for row in some.rows} == {name for name in names if int(Path(name).stem) < 100}
    assert 60 < len(names) < 120


def test_fingerprint_follows_what_determines_the_samples(tmp_path):
    base = opened(write(tmp_path / "a", rows(40))).fingerprint
    assert opened(write(tmp_path / "b", rows(40)[::-1])).fingerprint == base  # the order of the rows is not a fact
    others = [
        opened(tmp_path / "a", image_channels=1).fingerprint,
        opened(tmp_path / "a", validation_fraction=0.2).fingerprint,
    ]
    changed = rows(40)
    changed[3]["text"] = changed[5]["text"] = "another"
    others.append(opened(write(tmp_path / "c", changed)).fingerprint)
    path = tmp_path / "a" / opened(tmp_path / "a").rows[0].file_name
    path.write_bytes(path.read_bytes() + b"\0")
    others.append(opened(tmp_path / "a").fingerprint)
    assert len({base, *others}) == 5


GOOD = {"file_name": "a.png", "text": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"metadata.jsonl:2: not JSON"),
        ("[1]", r":2: must be an object like"),
        ('{"file_name": "b.png"}', r":2: no text, only file_name"),
        ('{"text": "b"}', r":2: no file_name, only text"),
        ("{}", r":2: no file_name, only an empty object"),
        ('{"file_name": "b.png", "text": 3}', r":2: text must be text, got 3"),
        ('{"file_name": null, "text": "b"}', r":2: file_name must be text, got None"),
        ('{"file_name": "b.png", "text": "\\ud800"}', r":2: text holds half of a surrogate"),
        ('{"file_name": "../b.png", "text": "b"}', r":2: file_name '../b.png' leaves the folder"),
        ('{"file_name": "x/../../b.png", "text": "b"}', r":2: file_name .* leaves the folder"),
        ('{"file_name": "/etc/hostname", "text": "b"}', r":2: file_name .* leaves the folder"),
        ('{"file_name": "b.png", "text": "b"}', r":2: no file 'b.png'"),
        ('{"file_name": "b\\u0000.png", "text": "b"}', r":2: no file"),
        ('{"file_name": ".", "text": "b"}', r":2: file_name '.' is not a regular file"),
        ('{"file_name": "./a.png", "text": "b"}', r":2: file_name 'a.png' is already on line 1"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, message):
    write(tmp_path, [GOOD, row])
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value) and "1 of 2 cannot be used, more than data.max_skipped 0.01" in str(
        caught.value
    )
    tolerant = opened(tmp_path, max_skipped=0.5, validation_fraction=0.0)
    assert [r.file_name for r in tolerant.rows] == ["a.png"]
    (left_out,) = tolerant.skipped
    assert re.search(message, f"{left_out.file}: {left_out.reason}")


def test_blank_lines_and_byte_order_marks_are_no_fault(tmp_path):
    write(tmp_path, [GOOD])
    (tmp_path / "metadata.jsonl").write_bytes(
        b'\xef\xbb\xbf\r\n{"file_name": "a.png", "text": "\xc3\xa4\xe2\x80\xa8"}\r\n\n'
    )
    assert opened(tmp_path, validation_fraction=0.0)[0].text == "ä\u2028"
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xe4"}\n')
    with pytest.raises(DataError, match=r"line 1 is not UTF-8 \(byte 0xe4\): save it as UTF-8"):
        opened(tmp_path)


def test_empty_sets_say_what_to_do(tmp_path):
    write(tmp_path, [GOOD])
    with pytest.raises(DataError, match=r"validation split is empty, none of 1 files .*: add images"):
        opened(tmp_path, "validation", validation_fraction=0.0)
    write(tmp_path, ["", " "])
    with pytest.raises(DataError, match="has no rows"):
        opened(tmp_path)
    with pytest.raises(DataError, match="image_channels is 4"):
        opened(tmp_path, image_channels=4)


def test_missing_metadata_names_what_was_found_instead(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        opened(tmp_path / "nowhere")
    for name in ("metadata.json1", "captions.jsonl", "holiday.png"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"has no metadata.jsonl .*\(found captions.jsonl, metadata.json1: rename it\)"):
        opened(tmp_path)


# --- other layouts


def everything(folder: Path, **settings) -> dict[str, str]:
    source = opened(folder, validation_fraction=0.0, **settings)
    return {row.file_name: row.text for row in source.rows}


def test_csv_is_read_as_jsonl_is(tmp_path):
    paint(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text(
        '\ufefffile_name,text,score\na.png,"one, ""two""\nthree",5\nb.png,ä,6\n', encoding="utf-8"
    )
    assert everything(tmp_path) == {"a.png": 'one, "two"\nthree', "b.png": "ä"}
    assert [row.columns for row in opened(tmp_path, validation_fraction=0.0).rows] == [{"score": "5"}, {"score": "6"}]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x,y\nb.png\na.png,z\n")
    source = opened(tmp_path, validation_fraction=0.0, max_skipped=0.7)
    where = tmp_path / "metadata.csv"
    assert source.skipped == tuple(
        Skipped(f"{where}:{n}", "does not have the 2 fields of the first line: quote a caption that holds commas")
        for n in (2, 3)
    )
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(DataError, match=r"has both metadata.jsonl and metadata.csv: keep one"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name;text\na.png;x\n", r"metadata.csv: fields are separated by ';': save it with commas"),
        ("file_name\ttext\na.png\tx\n", r"fields are separated by '\\t'"),
        (
            'file_name,text\na.png,x\nb.png,"a 5 tall\na.png,"y"\n',
            r"metadata.csv:3: the row that begins here is not CSV",
        ),
        ("image,caption\na.png,x\n", r"metadata.csv:2: no file_name, only image, caption: rename image to file_name"),
        ("File_Name,text\na.png,x\n", r"no file_name, only File_Name, text: rename File_Name to file_name"),
        ("file_name,text\nsub\\a.png,x\n", r"no file 'sub.*a.png' in .*: write / for"),
    ],
)
def test_what_spreadsheets_write_is_named_with_the_fix(tmp_path, text, message):
    paint(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text(text, newline="")
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_blanks_in_the_first_line_and_line_ends_within_captions_are_read(tmp_path):
    paint(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text(
        'file_name, text\r\na.png,one\u2028two\r\nb.png,"x\r\ny"\r\n', encoding="utf-8", newline=""
    )
    assert everything(tmp_path) == {"a.png": "one\u2028two", "b.png": "x\ny"}


def test_a_caption_under_another_name_is_pointed_out_and_can_be_named(tmp_path):
    paint(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "Caption": "hello", "text_id": 3}\n')
    with pytest.raises(
        DataError,
        match=r"no text, only file_name, Caption, text_id: rename Caption to text, or set data.text_column=Caption",
    ):
        opened(tmp_path)
    assert everything(tmp_path, text_column="Caption") == {"a.png": "hello"}
    assert opened(tmp_path, validation_fraction=0.0, text_column="Caption").rows[0].columns == {"text_id": 3}


def test_sidecar_captions(tmp_path):
    paint(tmp_path, "a.png", "sub/b.jpg", "sub/c.PNG", "d.png", ".hidden/e.png", "__MACOSX/f.png")
    (tmp_path / "a.txt").write_text("\ufeff one \n", encoding="utf-8")
    (tmp_path / "sub/b.txt").write_text("")
    (tmp_path / "sub/c.txt").write_bytes(b"\xe4")
    source = opened(tmp_path, captions="sidecar", max_skipped=0.5, validation_fraction=0.0)
    assert {row.file_name: row.text for row in source.rows} == {"a.png": "one", "sub/b.jpg": ""}
    assert set(source.skipped) == {
        Skipped(str(tmp_path / "d.png"), "no d.txt beside it"),
        Skipped(str(tmp_path / "sub/c.txt"), "line 1 is not UTF-8 (byte 0xe4): save it as UTF-8"),
    }


def test_class_folders_give_captions_from_templates(tmp_path):
    paint(tmp_path, *(f"red_fox/{i}.png" for i in range(30)), "house-cat/deep/x.png", "loose.png")
    templates = ("a photo of a {}", "the {} outside")
    source = opened(tmp_path, captions="class", caption_templates=templates, max_skipped=0.5, validation_fraction=0.0)
    texts = {row.file_name: row.text for row in source.rows}
    assert texts["house-cat/deep/x.png"] in {"a photo of a house cat", "the house cat outside"}
    foxes = [texts[f"red_fox/{i}.png"] for i in range(30)]
    assert set(foxes) == {"a photo of a red fox", "the red fox outside"}
    assert source.rows[1].columns == {"class": "red fox"}
    assert source.skipped == (Skipped(str(tmp_path / "loose.png"), "in no class folder"),)
    paint(tmp_path, "another/0.png")  # what an image is called does not depend on the others
    again = {
        row.file_name: row.text
        for row in opened(tmp_path, captions="class", caption_templates=templates, max_skipped=0.5).rows
    }
    assert all(texts[name] == text for name, text in again.items() if name in texts)


def test_a_class_folder_whose_name_is_no_text_is_left_out_by_name(tmp_path):
    paint(tmp_path, "fox/a.png", "fox/b.png", "fox/caf\udce9.png", "caf\udce9/b.png")
    source = opened(tmp_path, captions="class", max_skipped=0.5, validation_fraction=0.0)
    assert len(source.rows) + len(source.skipped) == 4
    assert Skipped(str(tmp_path / "caf\udce9/b.png"), "its folder's name is not UTF-8: rename it") in source.skipped


def test_images_alone(tmp_path):
    paint(tmp_path, "b.png", "a/c.webp")
    assert everything(tmp_path, captions="none") == {"a/c.webp": "", "b.png": ""}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image"):
        opened(tmp_path / "empty", captions="none")
    with pytest.raises(DataError, match=r"b\.png is a file"):
        opened(tmp_path / "b.png")


def test_the_folder_is_never_written_to(tmp_path):
    paint(tmp_path / "a", "x.png", "y.png")
    (tmp_path / "a").chmod(0o555)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir())
    source = opened(tmp_path / "a", captions="none", validation_fraction=0.0)
    assert [source[i].image.shape for i in range(2)] == [(8, 8, 3)] * 2
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir()) == before
