"""The hashes of a folder's weights: a flipped bit or another run's part is one line, before it is used."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.model_folders import folder, forget_hashes, written  # noqa: F401
from support.pipelines import PROMPTS, make

from ldm.cli.main import main
from ldm.errors import FolderError
from ldm.files import known
from ldm.interop.bundle import TEXT, UNET, VAE
from ldm.interop.convert import write_model
from ldm.interop.diffusers.folder import FILES
from ldm.interop.open import read_any
from ldm.interop.text import read_text
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import load_codec


def flip(file: Path) -> None:
    """Change the lowest bit of a weight in the middle of a file: a number that is as good as before."""
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4 // 4 * 4] ^= 1
    file.write_bytes(content)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
def test_a_flipped_bit_is_one_line(folder: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / part / FILES[part]
    before = sha256(file)
    assert main(["inspect", str(folder), "--verify"]) == 0
    assert "unchanged" in capsys.readouterr().out
    flip(file)
    out = folder.parent / "new"
    for command in (
        ["sample", str(folder), "--prompt", "a", "--steps", "1", "--out", str(out)],
        ["convert", str(folder), str(out)],
        ["inspect", str(folder), "--verify"],
    ):
        assert main(command) == 4
        said = capsys.readouterr()
        assert (
            str(file) in said.err
            and before[:12] in said.err
            and sha256(file)[:12] in said.err
            and said.err.count("\n") == 1
        )
        assert "ldm.json" in said.err and said.out == "" and not (out.exists() and list(out.iterdir()))
    if part != UNET:
        with pytest.raises(FolderError, match="has changed"):  # as a configuration names it
            load_codec(folder) if part == VAE else read_text(folder)
    Pipeline.from_pretrained(forget_hashes(folder), "cpu")(PROMPTS[:1], steps=1)  # which is what the line says


def test_another_runs_autoencoder_is_one_line(folder: Path, tmp_path: Path) -> None:
    other = make()
    assert other.codec is not None
    other.codec.autoencoder.decoder.conv_in.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    shutil.rmtree(folder / VAE)
    (folder / VAE).symlink_to(tmp_path / "other" / VAE)
    for path in (folder, folder / VAE):
        with pytest.raises(
            FolderError, match=r"has changed: its sha256 is \w{12}, and was \w{12} when it was written: bring back"
        ):
            load_codec(path)
    load_codec(tmp_path / "other" / VAE)
    (folder / VAE).unlink()
    write_model(read_any(tmp_path / "other"), tmp_path / "shards", max_shard_bytes=50_000)
    shutil.copytree(tmp_path / "shards" / VAE, folder / VAE)  # a file of another name
    with pytest.raises(
        FolderError, match=r"index\.json was not written with its folder, whose ldm\.json lists diffusion_pytorch_model"
    ):
        Pipeline.from_pretrained(folder)
    Pipeline.from_pretrained(tmp_path / "shards")
    flip(next((tmp_path / "shards" / UNET).glob("*-00002-of-*")))
    with pytest.raises(FolderError, match=r"-00002-of-.* has changed"):
        Pipeline.from_pretrained(tmp_path / "shards")


def test_a_part_alone_may_be_copied(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / VAE, tmp_path / "elsewhere" / VAE)
    load_codec(tmp_path / "elsewhere")
    flip(tmp_path / "elsewhere" / VAE / FILES[VAE])
    load_codec(tmp_path / "elsewhere" / VAE)  # nothing there says what it was
    flip(folder / VAE / FILES[VAE])
    monkeypatch.chdir(folder / VAE)
    with pytest.raises(FolderError, match="has changed"):
        load_codec(".")


def test_weights_beside_those_that_were_written_are_taken_by_name(folder: Path) -> None:
    tensors = load_file(folder / UNET / FILES[UNET])
    save_file(
        {k: v.half() for k, v in tensors.items()}, folder / UNET / FILES[UNET].replace(".", ".fp16."), {"format": "pt"}
    )
    Pipeline.from_pretrained(folder, variant="fp16")
    flip(folder / UNET / FILES[UNET])
    with pytest.raises(FolderError, match="has changed"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("hashes", [3, ["a"], {"vae/x": 3}, None])
def test_hashes_that_are_none_are_one_line(folder: Path, hashes: object) -> None:
    (folder / "ldm.json").write_text(json.dumps({**json.loads((folder / "ldm.json").read_text()), "sha256": hashes}))
    with pytest.raises(FolderError, match=r"ldm\.json: sha256 should be the hash of each file"):
        Pipeline.from_pretrained(folder)


# ---------------------------------------------------------------- hashes that are kept


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read for their hash, with all files large and settled; an empty cache folder."""
    read: list[Path] = []

    def computed(file: Path) -> str:
        read.append(file)
        return sha256(file)

    monkeypatch.setattr(known, "file_hash", computed)
    monkeypatch.setattr(known, "SMALLEST", 1)
    monkeypatch.setattr(known, "SETTLED", -10.0)
    monkeypatch.setattr(known, "_computed", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return read


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process."""
    monkeypatch.setattr(known, "_computed", {})


def test_a_file_is_hashed_once_for_each_change(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    for _ in range(3):
        forget(monkeypatch)
        assert known.known_hash(file) == sha256(file)
    assert len(counted) == 1
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(b"two")
    os.utime(file, ns=times)  # same size, same time of change; the inode's own time is another
    forget(monkeypatch)
    assert known.known_hash(file) == sha256(file) and len(counted) == 2
    (tmp_path / "other").write_bytes(b"six")
    os.replace(tmp_path / "other", file)
    assert known.known_hash(file) == sha256(file) and len(counted) == 3


def test_a_small_or_fresh_file_is_always_read(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    monkeypatch.setattr(known, "SETTLED", 60.0)
    known.known_hash(file), known.known_hash(file)
    monkeypatch.setattr(known, "SETTLED", -10.0)
    monkeypatch.setattr(known, "SMALLEST", 4)
    known.known_hash(file), known.known_hash(file)
    assert len(counted) == 4 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"sha256": "0"}', b"\xff", b"[" * 100_000])
def test_a_damaged_entry_is_no_entry(
    counted: list[Path], tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    known.known_hash(file)
    (entry,) = (tmp_path / "cache/ldm/hashes").iterdir()
    entry.write_bytes(content)
    forget(monkeypatch)
    assert known.known_hash(file) == sha256(file) and len(counted) == 2
    forget(monkeypatch)
    known.known_hash(file)
    assert len(counted) == 2  # written anew


@pytest.mark.parametrize("place", ["relative", "/proc/nowhere", "file"])
def test_where_no_entry_can_be_kept_it_is_computed(
    counted: list[Path], tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file) if place == "file" else place)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        forget(monkeypatch)
        assert known.known_hash(file) == sha256(file)
    assert known.known_hash(file) == sha256(file) and len(counted) == 2  # this process remembers
    assert [one.name for one in tmp_path.iterdir()] == ["weights"]


def test_several_processes_share_the_folder(tmp_path: Path) -> None:
    files = [tmp_path / f"weights{i}" for i in range(8)]
    for file in files:
        file.write_bytes(file.name.encode() * 1000)
    code = (
        "import sys; from pathlib import Path; from ldm.files import known\n"
        "known.SMALLEST, known.SETTLED = 1, -10.0\n"
        "for _ in range(20):\n    known._computed.clear()\n"
        "    print(*(known.known_hash(Path(f)) for f in sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *map(str, files)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    expected = " ".join(sha256(file) for file in files)
    assert all(set(process.communicate()[0].splitlines()) == {expected} for process in started)


def test_the_models_hash_reads_nothing_twice(
    counted: list[Path], written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = []
    for _ in range(2):
        forget(monkeypatch)
        hashes.append(Pipeline.from_pretrained(written, "cpu").hash)
    assert sorted(counted) == sorted(written / part / FILES[part] for part in (UNET, VAE, TEXT))
    joined = hashlib.sha256(
        "".join(sha256(written / part / FILES[part]) for part in (UNET, VAE, TEXT)).encode()
    ).hexdigest()
    assert hashes == [joined] * 2
