"""A damaged latent cache is never trained on: it is named and made again, bit for bit, on all ranks."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.caches import autoencoder, write
from support.launches import contents, launch

from autoencoder.layout import to_diffusers
from ldm.cli.main import main
from ldm.config import DataConfig
from ldm.data import latent_cache as cache
from ldm.data.sources import open_source
from ldm.errors import DataError
from ldm.files.json import write_json
from ldm.interop.weights import write_module

__all__ = ["launch"]  # a fixture

SHARD = "moments-00001.safetensors"


def replaced(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


def flipped(file: Path, place: float = 0.9) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


def exchanged(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def changed(file: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    save_file({name: change(tensor).contiguous() for name, tensor in load_file(file).items()}, file)


def captions_exchanged(file: Path) -> None:
    texts = json.loads(file.read_text())
    other = next(i for i, text in enumerate(texts) if text != texts[0])
    texts[0], texts[other] = texts[other], texts[0]
    file.write_text(json.dumps(texts, ensure_ascii=False))


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pipe_instead(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0, 0, 0] = float("nan")
    return tensor


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "shard-truncated": lambda f: os.truncate(f / SHARD, 100),
    "shard-missing": lambda f: (f / SHARD).unlink(),
    "shard-empty": lambda f: (f / SHARD).write_bytes(b""),
    "shard-flipped": lambda f: flipped(f / SHARD),
    "shards-exchanged": lambda f: exchanged(f / "moments-00000.safetensors", f / SHARD),
    "shard-of-another-shape": lambda f: changed(f / SHARD, lambda t: t[:, :, :5]),
    "shard-of-another-dtype": lambda f: changed(f / SHARD, torch.Tensor.half),
    "shard-not-finite": lambda f: changed(f / SHARD, with_nan),
    "shard-a-folder": lambda f: folder_instead(f / SHARD),
    "shard-a-pipe": lambda f: pipe_instead(f / SHARD),
    "manifest-missing": lambda f: (f / cache.MANIFEST).unlink(),
    "manifest-empty": lambda f: (f / cache.MANIFEST).write_bytes(b""),
    "manifest-not-json": lambda f: os.truncate(f / cache.MANIFEST, 50),
    "manifest-another-type": lambda f: (f / cache.MANIFEST).write_text("[1]"),
    "manifest-not-text": lambda f: (f / cache.MANIFEST).write_bytes(b"\xff\xfe{}"),
    "manifest-deep": lambda f: (f / cache.MANIFEST).write_text("[" * 100_000),
    "manifest-a-longer-number": lambda f: replaced(f / cache.MANIFEST, b'"length": 24', b'"length": 25'),
    "manifest-key-flipped": lambda f: replaced(f / cache.MANIFEST, b'"autoencoder": "', b'"autoencoder": "0'),
    "manifest-a-folder": lambda f: folder_instead(f / cache.MANIFEST),
    "captions-exchanged": lambda f: captions_exchanged(f / cache.TEXTS),
    "captions-missing": lambda f: (f / cache.TEXTS).unlink(),
    "captions-truncated": lambda f: os.truncate(f / cache.TEXTS, 30),
    "captions-flipped": lambda f: flipped(f / cache.TEXTS),
}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`ldm cache-latents` with an untrained autoencoder, done once in a folder of its own."""
    folder = tmp_path_factory.mktemp("vae")
    network = autoencoder()
    write_module(network, folder / "vae/model/vae/diffusion_pytorch_model.safetensors")
    write_json(folder / "vae/model/vae/config.json", {**to_diffusers(network.config), "sample_size": 24})
    data = {"source": "shapes", "image_size": 24, "size": 24, "flip": True}
    (folder / "ldm.yaml").write_text(
        json.dumps({"run": "run", "autoencoder": str(folder / "vae/model"), "text": "none", "data": data})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD", 9)  # three shards
        patch.chdir(folder)
        assert main(["cache-latents", "ldm.yaml"]) == 0
    return ["cache-latents", str(folder / "ldm.yaml")]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line_and_the_cache_made_again(
    command: list[str], tmp_path: Path, launch: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], damage: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(cache, "SHARD", 9)
    monkeypatch.chdir(tmp_path)
    latents, made = Path("run/latents"), Path(command[1]).parent / "run/latents"
    shutil.copytree(made, latents)
    DAMAGE[damage](latents)
    assert launch(2, *command) == [0, 0]
    said = [line for line in capsys.readouterr().out.splitlines() if "encoding" in line]
    assert len(said) == 2 and len(set(said)) == 1  # two threads, which both speak as the main process
    assert said[0].startswith("run/latents: ") and said[0].endswith(": encoding 24 images again")
    assert contents(latents) == contents(made) and [f.name for f in Path("run").iterdir()] == ["latents"]


def test_a_cache_of_before_without_hashes_is_made_again_and_one_of_something_else_refused(tmp_path: Path) -> None:
    _, _, key = write(tmp_path / "latents")
    manifest = tmp_path / "latents" / cache.MANIFEST
    held = json.loads(manifest.read_text())
    del held["sha256"], held["files"]
    manifest.write_text(json.dumps(held | {"format": 2}))
    with pytest.raises(cache.DamagedCacheError, match="without hashes"):
        cache.LatentCache(tmp_path / "latents", key)
    with pytest.raises(DataError, match="another autoencoder"):
        cache.LatentCache(tmp_path / "latents", {**key, "autoencoder": "another"})


def test_what_a_link_leads_to_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "latents")
    flipped(tmp_path / "latents" / cache.TEXTS)
    before = contents(tmp_path / "latents")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/latents").symlink_to(tmp_path / "latents")
    _, _, key = write(tmp_path / "run/latents")
    cache.LatentCache(tmp_path / "run/latents", key)
    assert contents(tmp_path / "latents") == before


def test_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write(tmp_path / "latents")
    assert not any(str(tmp_path / "latents") in path for path in flushed) and flushed[-1] == str(tmp_path)
    names = {Path(path).name for path in flushed}
    assert {"moments-00000.safetensors", f".{cache.TEXTS}.tmp", f".{cache.MANIFEST}.tmp"} <= names
    assert any(name.startswith(".tmp-latents-") for name in names)


def test_latents_that_are_not_finite_are_refused_by_the_image(tmp_path: Path) -> None:
    data = DataConfig(source="shapes", image_size=24, size=6)
    network, source = autoencoder(), open_source(data, "train")
    encode = network.encode

    def broken(images: torch.Tensor) -> Any:
        posterior = encode(images)
        posterior.mean[-1, 0] = float("inf")
        return posterior

    network.encode = broken  # type: ignore[method-assign]
    with pytest.raises(cache.NonFiniteLatentsError, match="image 3 is not finite") as caught:
        cache.write(
            tmp_path / "latents",
            cache.cache_key("abc", source, data),
            network,
            source,
            data,
            torch.device("cpu"),
            batch=4,
        )
    assert caught.value.exit_code == 5 and not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "latents")
    assert not list(tmp_path.iterdir())
