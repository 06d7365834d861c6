"""Realistic tables and captions: ambiguous rows, names in other forms, odd texts; read, or named by line."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from support.photos import open_folder, paint

from ldm.config import DataConfig
from ldm.data.folder import FolderSource, in_validation, working_fraction
from ldm.data.sample import Skipped
from ldm.data.sources import open_source
from ldm.data.survey import survey
from ldm.errors import DataError

NFC, NFD = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
assert NFC != NFD


def opened(folder: Path, **settings: Any) -> FolderSource:
    return open_folder(folder, **{"image_size": 8, "validation_fraction": 0.0, "max_skipped": 0.99, **settings})


def table(folder: Path, *lines: str, kind: str = "jsonl") -> None:
    (folder / f"metadata.{kind}").write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))


def row(name: str = "b.png", text: Any = "b", **more: Any) -> str:
    return json.dumps({"file_name": name, "text": text, **more})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"file_name": "b.png", "text": "a long caption", "text": "x"}', "the key 'text' appears twice"),
        ('{"file_name": "b.png", "file_name": "c.png", "text": "x"}', "the key 'file_name' appears twice"),
        ('{"file_name": "b.png", "text": "x", "size": {"w": 1, "w": 2}}', "the key 'w' appears twice"),
        (row() + ",", "not JSON: Extra data (character 36): remove the comma at its end"),
        (row()[:-1], "not JSON: Expecting ',' delimiter"),
        ('{"file_name": "b.png", "text": "b", "score": 1' + "0" * 5000 + "}", "Exceeds the limit (4300 digits)"),
        ("[" * 100_000, "nested too deeply"),
        ('{"file_name": "b.png", "text": "b", "x": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),
        ('["b.png", "b"]', "must be an object like"),
        ("null", "must be an object like"),
        ('"b.png"', "must be an object like"),
        (row(text=["b"]), "text must be text, got ['b']"),
        (row(text=None), "text must be text, got None"),
        ('{"file_name": "b.png", "text": NaN}', "text must be text, got nan"),
        ('{"file_name": "b.png", "text": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\ud800": "b.png", "text": "b"}', r"no file_name, only \ud800, text"),
        (row(text="a\0b"), "text holds a NUL character"),
        (row(name=""), "file_name '' is not a regular file"),
        (row(name="B.PNG"), "did you mean 'b.png'?"),
        (row(name="x" * 5000 + ".png"), "no file"),
    ],
)
def test_a_json_row_that_is_not_clear_is_left_out_by_its_line(tmp_path: Path, line: str, reason: str) -> None:
    paint(tmp_path, "a.png", "b.png")
    table(tmp_path, row("a.png", "a"), line)
    (left,) = opened(tmp_path).skipped
    assert left.file == f"{tmp_path}/metadata.jsonl:2" and reason in left.reason
    assert left.reason.isprintable() and len(left.reason) <= 301


def test_further_columns_may_hold_what_json_can(tmp_path: Path) -> None:
    paint(tmp_path, "a.png", "b.png")
    numbers = (
        '{"file_name": "a.png", "text": "a\\u2028b", "score": NaN, "more": [Infinity, 1e999, 1' + "0" * 4000 + "]}"
    )
    table(tmp_path, numbers, "", "  \t ", row("b.png", "x" * 300_000, deep=[[[[{}]]]]))
    source = opened(tmp_path)
    assert [source.text(i) for i in range(2)] == ["a\u2028b", "x" * 300_000] and not source.skipped
    assert opened(tmp_path).fingerprint == source.fingerprint


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("file_name,text,text", "metadata.csv:1: the column 'text' appears twice: rename or remove one of them"),
        ("file_name, text ,x,x,text", "metadata.csv:1: the column 'text' appears twice"),
        ("f\0i\0l\0e\0", "metadata.csv holds NUL bytes, as UTF-16 does: save it as UTF-8"),
    ],
)
def test_a_csv_whose_columns_are_not_clear_is_refused(tmp_path: Path, head: str, message: str) -> None:
    paint(tmp_path, "a.png")
    table(tmp_path, head, "a.png,a long caption,x", kind="csv")
    for look in (opened, survey):
        with pytest.raises(DataError, match=message) as caught:
            look(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_csv_of_spreadsheets_and_data_frames(tmp_path: Path) -> None:
    """A byte order mark, an unnamed index, blank rows, quotes, old line ends, a caption beyond csv's limit."""
    paint(tmp_path, "a.png", "b.png", "c.png")
    long = "x" * 200_000
    content = '\ufeff,file_name,text\r\n0,a.png,"one ""two"", three\r\nfour"\r\n\r\n,,\r\n'
    content += f"1,b.png,\u2028\x0c\r\n2,c.png,{long}\r\n"
    for text in (content, content.replace("\r\n", "\n"), content.replace("\r\n", "\r")):
        (tmp_path / "metadata.csv").write_bytes(text.encode())
        source = opened(tmp_path)
        assert [source.text(i) for i in range(3)] == [
            'one "two", three\nfour',
            "\u2028\x0c",
            long,
        ] and not source.skipped
        assert [r.columns for r in source.rows] == [{"": "0"}, {"": "1"}, {"": "2"}]
    (tmp_path / "metadata.csv").write_text("file_name,text,,\na.png,a,1,2\n")
    assert opened(tmp_path).rows[0].columns == {"column 3": "1", "column 4": "2"}


@pytest.mark.parametrize(("said", "there"), [(NFC, NFD), (NFD, NFC)])
def test_a_name_in_another_unicode_form_is_found(tmp_path: Path, said: str, there: str) -> None:
    paint(tmp_path, f"sub/{there}")
    table(tmp_path, row(f"sub/{said}", "a cup"), row(f"sub/{there}", "again"))
    source = opened(tmp_path)
    assert [r.file_name for r in source.rows] == [f"sub/{there}"] and source[0].image.shape == (8, 8, 3)
    assert [s.reason for s in source.skipped] == [f"file_name 'sub/{there}' is already on line 1"]


def test_where_both_forms_are_on_the_disk_the_exact_one_is_meant(tmp_path: Path) -> None:
    paint(tmp_path, NFC, NFD)
    table(tmp_path, row(NFD, "second"), row(NFC, "first"))
    assert {r.file_name: r.text for r in opened(tmp_path).rows} == {NFC: "first", NFD: "second"}
    both = unicodedata.normalize("NFC", "é") + unicodedata.normalize("NFD", "é") + ".png"  # a third spelling
    paint(tmp_path, *(unicodedata.normalize(form, both) for form in ("NFC", "NFD")))
    table(tmp_path, row(NFC), row(both))
    (left,) = opened(tmp_path).skipped
    assert "but 2 whose names differ in their Unicode form alone" in left.reason


def test_captions_beside_images_whatever_the_capitals_of_their_ending_and_the_form_of_their_name(
    tmp_path: Path,
) -> None:
    paint(tmp_path, "A.PNG", "b.png", f"sub/{NFD}", "d.png", "e.png", "F.png")
    stem = Path(NFC).stem
    for name, text in (
        ("A.TXT", "a"),
        ("b.txt", "b"),
        ("b.TXT", "other"),
        (f"sub/{stem}.Txt", "c"),
        ("d.TXT", "1"),
        ("d.Txt", "2"),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / "e.txt").write_bytes("a fox".encode("utf-16-le"))
    (tmp_path / "f.txt").write_text("another image's")
    source = opened(tmp_path, captions="sidecar")
    assert {r.file_name: r.text for r in source.rows} == {"A.PNG": "a", "b.png": "b", f"sub/{NFD}": "c"}
    assert set(source.skipped) == {
        Skipped(str(tmp_path / "d.png"), "d.TXT and d.Txt are beside it: keep one of them"),
        Skipped(str(tmp_path / "e.txt"), "holds a NUL character, as UTF-16 does: save it as UTF-8"),
        Skipped(str(tmp_path / "F.png"), "no F.txt beside it (f.txt is another name: rename it)"),
    }
    looked = survey(tmp_path)
    assert looked.data.captions == "sidecar" and len(looked.rows) == 3


def test_captions_in_capitals_alone_are_found_by_the_survey(tmp_path: Path) -> None:
    paint(tmp_path, *(f"{i}.PNG" for i in range(9)))
    (tmp_path / "3.TXT").write_text("one caption")
    looked = survey(tmp_path)
    assert (
        looked.data.captions == "sidecar"
        and [r.text for r in looked.rows] == ["one caption"]
        and len(looked.skipped) == 8
    )


def test_the_survey_finds_the_captions_column_behind_odd_rows(tmp_path: Path) -> None:
    paint(tmp_path, "a.png", "b.png")
    table(
        tmp_path,
        "{",
        row("a.png", "x\u2028y").replace('"text"', '"caption"'),
        row("b.png").replace('"text"', '"caption"'),
    )
    assert survey(tmp_path).data.text_column == "caption"
    (tmp_path / "metadata.jsonl").unlink()
    table(tmp_path, 'file_name,"the, size",prompt', "a.png,1,x", "b.png,2,y", kind="csv")
    assert survey(tmp_path).data.text_column == "prompt"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_names_a_share_that_works(tmp_path: Path, split: str) -> None:
    fraction = 0.5 if split == "train" else 0.0
    names = [
        name for name in (f"{i}.png" for i in range(200)) if in_validation(name, 0.4) or not in_validation(name, 0.5)
    ]
    names = [name for name in names if in_validation(name, 0.4)][:4] if split == "train" else names[:8]
    paint(tmp_path, *names)
    given = DataConfig(folder=str(tmp_path), captions="none", image_size=8, validation_fraction=fraction)
    with pytest.raises(
        DataError, match=rf"the {split} split is empty.*set data\.validation_fraction=0\.\d+, or add images"
    ) as caught:
        open_source(given, split)
    works = float(str(caught.value).split("validation_fraction=")[1].split(",")[0])
    for each in ("train", "validation"):
        given = DataConfig(folder=str(tmp_path), captions="none", image_size=8, validation_fraction=works)
        assert open_source(given, each).length


def test_where_no_share_works_none_is_named() -> None:
    late = [name for name in (f"{i}.png" for i in range(40)) if not in_validation(name, 0.5)]
    assert working_fraction(late) is None and working_fraction(late[:1]) is None
    assert working_fraction([f"{i}.png" for i in range(2000)]) == 0.01
