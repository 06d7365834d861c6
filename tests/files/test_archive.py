"""Files of tensors: bit for bit, mapped until touched, written atomically, refused when damaged."""

from __future__ import annotations

import hashlib
import json
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from ldm.errors import FolderError
from ldm.files.tensors.archive import find_weights, open_archive, tensor_hash, write_tensors
from ldm.files.tensors.safetensors import DTYPES

ROOT = Path(__file__).resolve().parents[2]
Tensors = dict[str, Tensor]


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """All that two equal tensors share; NaNs and the sign of zero count."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return tensor.dtype, tensor.shape, whole.flatten().view(torch.uint8).numpy().tobytes()


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bits of this type."""
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return data.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1) if t.dim() else t,
    "a slice": lambda t: t[..., 1:] if t.dim() else t,
    "every second": lambda t: t[::2] if t.dim() else t,
    "expanded": lambda t: t.unsqueeze(0).expand(3, *t.shape),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}
KINDS = st.lists(
    st.tuples(
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from(list(LAYOUTS)),
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


def make(kinds: list[tuple[torch.dtype, list[int], str, bool]]) -> Tensors:
    """Tensors of these types, shapes and layouts; where ``again``, a second name for parts of the same memory."""
    tensors: Tensors = {}
    for i, (dtype, shape, layout, again) in enumerate(kinds):
        base = random(dtype, *shape)
        tensors[f"{i}.weight"] = LAYOUTS[layout](base)
        if again:
            tensors[f"{i}.tied"], tensors[f"{i}.part"] = tensors[f"{i}.weight"], base[:1] if base.dim() else base
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archive")


# bit for bit


@settings(max_examples=30, deadline=None)
@given(kinds=KINDS, is_zip=st.booleans(), wrapped=st.booleans())
@example(kinds=[(torch.float64, [3, 3, 3], "expanded", False)], is_zip=False, wrapped=False)  # longer than its file
def test_what_torch_saved(folder: Path, kinds: Any, is_zip: bool, wrapped: bool) -> None:
    tensors = make(kinds)
    content = {"state_dict": tensors, "epoch": 3} if wrapped else {**tensors, "epoch": 3}
    torch.save(content, folder / "a.ckpt", _use_new_zipfile_serialization=is_zip)
    archive = open_archive(folder / "a.ckpt")
    assert same(archive.tensors, tensors) and archive.counters == {"epoch": 3} and archive.files == (folder / "a.ckpt",)
    before = {name: bits(tensor) for name, tensor in archive.tensors.items()}
    for name, tensor in archive.tensors.items():  # no two share memory, and none with the file
        tensor.copy_(random(tensor.dtype, *tensor.shape))
        before[name] = bits(tensor)
        assert all(bits(other) == before[n] for n, other in archive.tensors.items())
    assert same(open_archive(folder / "a.ckpt").tensors, tensors)


@settings(max_examples=30, deadline=None)
@given(kinds=KINDS, shard=st.none() | st.integers(1, 200))
def test_what_we_write_both_libraries_read(folder: Path, kinds: Any, shard: int | None) -> None:
    tensors = make(kinds)
    metadata = {"ldm": '{"é": 1}', "about": "x"}
    file = write_tensors(folder / "a.safetensors", tensors, metadata, shard)
    archive = open_archive(find_weights(folder, "a"))
    assert (
        same(archive.tensors, tensors) and archive.metadata == {"format": "pt", **metadata} and archive.files[0] == file
    )
    theirs: Tensors = {}
    for part in archive.files[len(archive.files) > 1 :]:
        theirs |= safetensors.torch.load_file(part)
        assert shard is None or len(open_archive(part).tensors) == 1 or part.stat().st_size < shard + 8 + 2000
    assert same(theirs, tensors)
    assert all(tensor_hash(tensor) == tensor_hash(tensors[name]) for name, tensor in archive.tensors.items())
    written = {part.name: part.read_bytes() for part in archive.files}
    write_tensors(folder / "b/a.safetensors", dict(reversed(tensors.items())), dict(reversed(metadata.items())), shard)
    assert written == {
        part.name: part.read_bytes() for part in (folder / "b").iterdir()
    }  # the content alone decides, and nothing is left
    assert {part.name for part in folder.glob("a*")} - {"a.ckpt"} == written.keys()


@settings(max_examples=25, deadline=None)
@given(kinds=KINDS)
def test_what_safetensors_wrote(folder: Path, kinds: Any) -> None:
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in make(kinds).items()
    }
    safetensors.torch.save_file(tensors, folder / "s.safetensors", {"format": "pt"})
    assert same(open_archive(folder / "s.safetensors").tensors, tensors)
    if len({tensor.dtype for tensor in tensors.values()}) == 1:
        write_tensors(folder / "t.safetensors", tensors)
        assert (folder / "t.safetensors").read_bytes() == (folder / "s.safetensors").read_bytes()


def test_a_file_that_does_not_align_its_tensors(tmp_path: Path) -> None:
    """Early writers did not pad the header, and torch before 1.6 nothing at all: such views compute as any others."""
    weight, image = torch.randn(8, 4, 3, 3), torch.randn(2, 4, 9, 9)
    for pad in range(8):
        header = json.dumps({"w": {"dtype": "F32", "shape": [8, 4, 3, 3], "data_offsets": [0, 1152]}}).encode()
        header += b" " * ((pad - len(header)) % 8)
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weight.numpy().tobytes())
        mapped = open_archive(tmp_path / "a.safetensors").tensors["w"]
        assert mapped.data_ptr() % 8 == pad
        torch.testing.assert_close(torch.nn.functional.conv2d(image, mapped), torch.nn.functional.conv2d(image, weight))
        torch.testing.assert_close(mapped.flatten(1) @ weight.flatten(1).T, weight.flatten(1) @ weight.flatten(1).T)
        assert torch.equal(mapped.half().softmax(1), weight.half().softmax(1)) and tensor_hash(mapped) == tensor_hash(
            weight
        )


def test_hash() -> None:
    t = torch.tensor([[1.0, 2.0]])
    assert tensor_hash(t) == hashlib.sha256(b"float32 [1, 2]\n" + struct.pack("<2f", 1, 2)).hexdigest()
    others = [t.T, t.view(torch.int32), t.double(), t + 1, t[0], torch.zeros(1, 0), torch.zeros(0, 1)]
    assert len({tensor_hash(x) for x in [t, *others]}) == 8
    assert tensor_hash(torch.arange(2.0)[::2]) == tensor_hash(torch.zeros(1))  # a single element, two apart
    long = torch.arange(10_000_000, dtype=torch.int16)  # more than a piece
    assert tensor_hash(long) == hashlib.sha256(b"int16 [10000000]\n" + long.numpy().tobytes()).hexdigest()


# memory and time

MEMORY = """
import re, sys
from pathlib import Path
from ldm.files.tensors.archive import open_archive, tensor_hash
def used(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
for file in sys.argv[1:]:
    before, anonymous = used("VmRSS"), used("RssAnon")
    archive = open_archive(file)
    opened = used("VmRSS") - before
    archive.tensors["b"].sum()
    touched = used("VmRSS") - before
    tensor_hash(archive.tensors["a"])
    print(opened, touched, used("RssAnon") - anonymous)
    del archive
"""


def test_an_untouched_tensor_costs_no_memory(tmp_path: Path) -> None:
    """Two tensors of 64 MiB each: nothing is read, then one, and no copy of the other is made."""
    tensors = {"a": torch.zeros(2**24), "b": torch.zeros(2**24)}
    files = [str(tmp_path / name) for name in ("first.safetensors", "big.safetensors", "big.ckpt", "old.ckpt")]
    for file in files[:2]:  # the first one warms up what python and torch need at all
        write_tensors(Path(file), tensors)
    for file in files[2:]:
        torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization="big" in file)
    done = subprocess.run([sys.executable, "-c", MEMORY, *files], capture_output=True, text=True, cwd=ROOT, check=True)
    for line in done.stdout.splitlines()[1:]:
        opened, touched, anonymous = map(float, line.split())
        assert opened < 24 and 56 < touched < 100 and anonymous < 56, done.stdout


# writing


def test_a_model_is_saved_over_the_file_that_it_was_opened_from(tmp_path: Path) -> None:
    tensors = {f"{i}": torch.randn(100, 100) for i in range(5)}
    for most in (None, 50_000):
        write_tensors(tmp_path / "m.safetensors", tensors, None, most)
        archive = open_archive(find_weights(tmp_path, "m"))
        archive.tensors["3"].add_(1)  # in memory only
        reverse = {name: archive.tensors[str(4 - int(name))] for name in tensors}
        write_tensors(tmp_path / "m.safetensors", reverse, None, most)
        expected = {name: tensors[str(4 - int(name))] + (name == "1") for name in tensors}
        assert same(open_archive(find_weights(tmp_path, "m")).tensors, expected)
        assert same(archive.tensors, {**tensors, "3": tensors["3"] + 1})


@pytest.mark.parametrize("most", [None, 150_000])
def test_disk_full(tmp_path: Path, most: int | None) -> None:
    """By the limit on a file's size: the earlier file stays, the temporary one goes."""
    file = write_tensors(tmp_path / "m.safetensors", {"a": torch.ones(3)})
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(FolderError, match=r"m.safetensors: cannot be written: File too large"):
            write_tensors(file, {"a": torch.zeros(20_000), "b": torch.zeros(30_000)}, None, most)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"] and file.read_bytes() == before


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for tensor in (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")):
        with pytest.raises(FolderError, match=r"tensor odd \(.*\) cannot be written"):
            write_tensors(tmp_path / "m.safetensors", {"odd": tensor})
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="cannot be written"):
        write_tensors(tmp_path / "file/m.safetensors", {})
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


# finding, and diffusers


UNET = {
    "sample_size": 8, "block_out_channels": (8, 8), "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "norm_num_groups": 4, "up_block_types": ("UpBlock2D", "UpBlock2D"), "layers_per_block": 1, "cross_attention_dim": 8,
    "attention_head_dim": 2,
}  # fmt: skip


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("most", ["1GB", "20KB"])
@pytest.mark.parametrize("safe", [True, False])
def test_the_names_are_those_of_diffusers(tmp_path: Path, variant: str | None, most: str, safe: bool) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET)
    unet.save_pretrained(tmp_path, variant=variant, max_shard_size=most, safe_serialization=safe)
    archive = open_archive(find_weights(tmp_path, "diffusion_pytorch_model", variant))
    assert same(archive.tensors, dict(unet.state_dict())) and (len(archive.files) > 2) == (most == "20KB")
    if safe:  # and they read ours under the same names
        theirs = {f.name for f in archive.files}
        name = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
        changed = {key: tensor + 1 for key, tensor in archive.tensors.items()}
        write_tensors(tmp_path / f"{name}.safetensors", changed, None, 20_000 if most == "20KB" else None)
        assert find_weights(tmp_path, "diffusion_pytorch_model", variant).name in theirs
        again = UNet2DConditionModel.from_pretrained(tmp_path, variant=variant)
        assert same(dict(again.state_dict()), changed)


def test_which_weights_are_taken(tmp_path: Path) -> None:
    def there(*names: str) -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        for name in names:
            (tmp_path / name).touch()

    def found(variant: str | None = None, stem: str = "m") -> str:
        return find_weights(tmp_path, stem, variant).name

    there(
        "m.safetensors",
        "m.bin",
        "m.fp16.safetensors",
        "m.non_ema.safetensors",
        "m-00001-of-00002.safetensors",
        "config.json",
    )
    assert (found(), found("fp16"), found("non_ema")) == (
        "m.safetensors",
        "m.fp16.safetensors",
        "m.non_ema.safetensors",
    )
    with pytest.raises(
        FolderError,
        match=r"no weights variant ema of m.safetensors: there is the plain one, variant fp16, variant non_ema",
    ):
        found("ema")
    there("m.fp16.safetensors", "m.non_ema.safetensors")
    assert found() == "m.fp16.safetensors"
    there("m.non_ema.safetensors", "m.bf16.bin")
    with pytest.raises(FolderError, match=r"no weights m.safetensors: there is variant bf16, variant non_ema"):
        found()
    there("m.bin", "m.fp16.safetensors")
    assert (found(), found("fp16")) == ("m.bin", "m.fp16.safetensors")
    there("pytorch_model.bin", "pytorch_model.fp16.bin")
    assert (found(stem="model"), found("fp16", "model")) == ("pytorch_model.bin", "pytorch_model.fp16.bin")
    there("m.safetensors.index.fp16.json", "m.fp16-00001-of-00002.safetensors", "m.safetensors.ema.index.json")
    assert (found("fp16"), found("ema")) == ("m.safetensors.index.fp16.json", "m.safetensors.ema.index.json")
    there("m.safetensors", "m.safetensors.index.json")
    with pytest.raises(FolderError, match=r"holds both m.safetensors and m.safetensors.index.json: remove"):
        found()
    there("other.safetensors")
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FolderError, match=r"there is none at all"):
            find_weights(place, "m")


# shards


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, index: (f / "m-00002-of-00002.safetensors").unlink(), "m-00002-of-00002.safetensors is missing"),
        (lambda f, index: index["weight_map"].update(x="m-00001-of-00002.safetensors"),
         "00001-of-00002.safetensors: tensor x is missing"),
        (lambda f, index: index["weight_map"].update(x="m-00003.safetensors"), "m-00003.safetensors is missing"),
        (lambda f, index: index["weight_map"].pop("b"),
         "m-00002-of-00002.safetensors: tensor b is extra: it is not in the index"),
        (lambda f, index: index["weight_map"].update(b="m-00001-of-00002.safetensors"),
         "00001-of-00002.safetensors: tensor b is missing"),
        (lambda f, index: write_tensors(f / "m-00002-of-00002.safetensors", {name: torch.ones(1) for name in "abc"}),
         "m-00002-of-00002.safetensors: tensor a is extra: the index places it in m-00001-of-00002.safetensors"),
        (lambda f, index: index["weight_map"].update(b="../m.safetensors"),
         "'../m.safetensors' is not the name of a file beside it"),
        (lambda f, index: index["weight_map"].update(b=3), "its weight_map should name the file"),
        (lambda f, index: index.pop("weight_map"), "its weight_map should name the file"),
        (lambda f, index: write_tensors(f / "m-00002-of-00002.safetensors",
                                        {"b": torch.ones(10), "c": torch.ones(10)}, {"format": "x"}),
         "its metadata format differs from that of other shards"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit(tmp_path: Path, change: Callable[[Path, dict[str, Any]], Any], words: str) -> None:
    index = write_tensors(tmp_path / "m.safetensors", {name: torch.ones(10) for name in "abc"}, None, 80)
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    write_tensors(tmp_path / "m-00002-of-00002.safetensors", {name: torch.ones(10) for name in "bc"})
    write_tensors(tmp_path / "m-00001-of-00002.safetensors", {"a": torch.ones(10)})
    content = json.loads(index.read_text())
    content["weight_map"]["b"] = "m-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert open_archive(index).tensors.keys() == set("abc")
    change(tmp_path, content)
    index.write_text(json.dumps(content))
    with pytest.raises(FolderError) as error:
        open_archive(index)
    assert words in str(error.value) and "\n" not in str(error.value)
    index.write_text('{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}')
    with pytest.raises(FolderError, match="names 'a' twice"):
        open_archive(index)


# damaged and hostile files


def raw(header: Any, data: int = 12, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * data


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"{}", "something unknown"),
        (raw({"a": entry(0, 12)})[:40], "cut off"),
        (raw({"a": entry(0, 12)}, 8), "its tensors have 12 bytes, there are 8: cut off"),
        (raw({"a": entry(0, 12)}, 16), "its tensors have 12 bytes, there are 16: too long"),
        (raw({"a": entry(0, 12)}, length=2**63), "a header of 9223372036854775808 bytes in a file of"),
        (raw({"a": entry(0, 8), "b": entry(4, 12)}), "tensor b overlaps a"),
        (raw({"a": entry(0, 4), "b": entry(8, 12)}), "tensor b begins 4 bytes after"),
        (raw({"a": entry(4, 12)}), "tensor a begins 4 bytes after"),
        (raw({"a": entry(0, 12, "F16")}), "tensor a of F16 [3] should have 6 bytes, the header gives it 12"),
        (raw({"a": entry(0, 12, "F31")}), "tensor a is of type 'F31'"),
        (raw({"a": entry(0, 12, ["F32"])}), "tensor a is of type"),
        (raw({"a": entry(0, 12, shape=[-3])}), "whole numbers"),
        (raw({"a": entry(0, 12, shape=[3.0])}), "whole numbers"),
        (raw({"a": entry(0, 12, shape=[True, 3])}), "whole numbers"),
        (raw({"a": entry(0, 12, shape=[2**62, 3])}), "should have"),
        (raw({"a": entry(0, 0, shape=[2**62, 2**62, 0]), "b": entry(0, 12)}), "is not possible"),
        (raw({"a": entry(12, 0)}), "whole numbers"),
        (raw({"a": {"dtype": "F32", "shape": [3]}}), "should have dtype, shape and data_offsets"),
        (raw({"a": [3]}), "should have dtype, shape and data_offsets"),
        (raw({"a\x1b[2J": entry(0, 12)}), "not printable"),
        (raw({"__metadata__": {"a": 1}, "b": entry(0, 12)}), "its metadata should be"),
        (raw(b'{"__metadata__": {"a": "\\ud800"}}'), "its metadata should be"),
        (raw(b'{"a": %s, "a": %s}' % ((b'{"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}',) * 2)),
         "names 'a' twice"),
        (raw(b'{"a\xff": 1}'), "is not JSON in UTF-8"),
        (raw(b"{" * 100_000), "is not JSON in UTF-8"),
        (raw(b'{"a":' + b"[" * 100_000), "is not JSON in UTF-8"),
        (raw(b"{1: 2}"), "is not JSON in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)  # fmt: skip
def test_a_damaged_safetensors_file(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(FolderError) as error:
        open_archive(tmp_path / "m.safetensors")
    assert words in str(error.value) and "m.safetensors" in str(error.value) and "\n" not in str(error.value), str(
        error.value
    )


@settings(max_examples=120, deadline=None)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.none() | st.floats(0, 1),
)
def test_safetensors_of_other_bytes(folder: Path, edits: list[tuple[float, int]], cut: float | None) -> None:
    """We take nothing that their library refuses, and read the same where both take it."""
    tensors = {
        "weight": torch.arange(6.0).view(2, 3),
        "bias": torch.arange(3, dtype=torch.int64),
        "none": torch.zeros(0, 2),
    }
    data = bytearray(safetensors.torch.save(tensors, {"format": "pt"}))
    header = int.from_bytes(data[:8], "little") + 8
    for place, byte in edits:
        data[int(place * header)] = byte
    file = folder / "fuzz.safetensors"
    file.write_bytes(data if cut is None else data[: int(cut * len(data))])
    try:
        ours = open_archive(file).tensors
    except FolderError as error:
        assert "\n" not in str(error)
        return
    try:
        theirs = safetensors.torch.load_file(file)
    except SafetensorError:
        raise AssertionError("their library refuses it") from None
    assert same(ours, theirs)


def test_names_and_content_must_agree(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    torch.save(tensors, tmp_path / "b.ckpt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for source, name, words in [
        ("a.safetensors", "c.ckpt", "should be a torch file and holds safetensors: not opened, rename it"),
        ("b.ckpt", "c.safetensors", "should be safetensors and holds a torch file"),
        ("old.pt", "c.safetensors", "should be safetensors and holds a torch file"),
        ("a.safetensors", "c.txt", "unknown file type"),
        ("a.safetensors", "c", "unknown file type"),
    ]:
        (tmp_path / name).write_bytes((tmp_path / source).read_bytes())
        with pytest.raises(FolderError, match=words):
            open_archive(tmp_path / name)
    (tmp_path / "plain.pt").write_bytes(b"\x80\x02}.")
    (tmp_path / "folder.ckpt").mkdir()
    for name, words in [
        ("plain.pt", "a pickle that torch.save did not write"), ("none.ckpt", "is missing"),
        ("folder.ckpt", "is a folder"),
    ]:  # fmt: skip
        with pytest.raises(FolderError, match=words):
            open_archive(tmp_path / name)


def save(file: Path, is_zip: bool = True) -> Tensors:
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5)}
    torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=is_zip)
    return tensors


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_torch_file_cut_or_changed_anywhere(tmp_path: Path, is_zip: bool) -> None:
    """Cut anywhere: an error. A byte changed: an error, or these tensors, changed at that place alone."""
    file = tmp_path / "m.ckpt"
    tensors = save(file, is_zip)
    data = file.read_bytes()
    for length in {*range(0, len(data), 97), *range(len(data) - 30, len(data))}:
        file.write_bytes(data[:length])
        with pytest.raises(FolderError):
            open_archive(file)
    file.write_bytes(data + b"\0")
    if not is_zip:
        with pytest.raises(FolderError, match="1 bytes too long"):
            open_archive(file)
    own = [
        place
        for place in (data.find(bits(tensor)[2]) for tensor in tensors.values())
        for place in range(place, place + 48)
    ]
    generator = torch.Generator().manual_seed(0)
    for place in torch.randperm(len(data), generator=generator)[:120].tolist():
        changed = bytearray(data)
        changed[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        file.write_bytes(changed)
        try:
            read = open_archive(file).tensors
        except FolderError as error:
            assert "\n" not in str(error)
            continue
        assert not is_zip or place in own or same(read, tensors), place
        for tensor in read.values():
            tensor.double().sum()


def pickled(before: bytes, after: bytes) -> Callable[[dict[str, bytes]], None]:
    """Other bytes in the pickle, with the right checksum."""

    def change(entries: dict[str, bytes]) -> None:
        assert before in entries["m/data.pkl"], entries["m/data.pkl"]
        entries["m/data.pkl"] = entries["m/data.pkl"].replace(before, after)

    return change


SHAPE, STRIDE, LARGE = b"K\x03K\x04\x86", b"K\x04K\x01\x86", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"  # of tensor a; 2⁶³ − 1


def rebuild(file: Path, change: Callable[[dict[str, bytes]], Any], **how: Any) -> None:
    """The archive with other entries."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(file, "w", **how) as archive:
        for name, content in entries.items():
            archive.writestr(name.rstrip("!"), content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.pop("m/data/0"), "tensor a is in storage '0', which the file lacks"),
        (lambda e: e.update({"m/data/0": e["m/data/0"][:-4]}), "tensor a: storage '0' should have 48 bytes and has 44"),
        (lambda e: e.update({"m/data/0!": b"\0" * 48}), "holds 'm/data/0' twice"),
        (lambda e: e.update({"m/byteorder": b"big"}), "not in little-endian order"),
        (lambda e: e.pop("m/data.pkl"), "not of torch.save"),
        (lambda e: e.update({"n/data.pkl": b"}."}), "not of torch.save"),
        (lambda e: e.update({"m/constants.pkl": b")."}), "TorchScript"),
        (pickled(SHAPE, b"K\x03K\x05\x86"), "tensor a reaches outside its storage: element 12"),
        (pickled(STRIDE, b"K\xf4K\x01\x86"), "tensor a reaches outside its storage: element 491"),
        (pickled(b"K\x00" + SHAPE, b"K\x01" + SHAPE), "tensor a reaches outside its storage: element 12"),
        (pickled(STRIDE, b"J\xff\xff\xff\xffK\x01\x86"), "negative"),
        (pickled(SHAPE, b"J\xff\xff\xff\xffK\x04\x86"), "negative"),
        (pickled(SHAPE, b"\x88K\x04\x86"), "do not fit"),
        (pickled(SHAPE, b"K\x0c\x85"), "do not fit"),
        (pickled(SHAPE, LARGE + b"K\x04\x86"), "more elements than the file has bytes"),
        (pickled(SHAPE, b"\x8a\x09" + b"\xff" * 8 + b"\0K\x00\x86"), "more elements than the file has bytes"),
        (lambda e: (pickled(SHAPE, LARGE * 2 + b"K\x00\x87")(e), pickled(STRIDE, b"K\x00K\x00K\x00\x87")(e)),
         "is not possible"),
        (pickled(b"K\x0ct", LARGE + b"t"), "should have"),
        (pickled(b"FloatStorage", b"LongStorage"), "should have 96 bytes and has 48"),
        (pickled(b"FloatStorage", b"UntypedStorage"), "m.ckpt asks for torch.UntypedStorage"),
    ],
)  # fmt: skip
def test_a_changed_archive(tmp_path: Path, change: Callable[[dict[str, bytes]], Any], words: str) -> None:
    save(tmp_path / "m.ckpt")
    rebuild(tmp_path / "m.ckpt", change)
    with pytest.raises(FolderError) as error:
        open_archive(tmp_path / "m.ckpt")
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_a_compressed_archive_and_a_wrong_checksum(tmp_path: Path) -> None:
    tensors = save(tmp_path / "m.ckpt")
    rebuild(tmp_path / "m.ckpt", lambda e: None)
    assert same(open_archive(tmp_path / "m.ckpt").tensors, tensors)
    data = (tmp_path / "m.ckpt").read_bytes()
    (tmp_path / "m.ckpt").write_bytes(data.replace(b"state_dict", b"state_dixt"))
    with pytest.raises(FolderError, match=r"m/data.pkl is damaged: its checksum is wrong"):
        open_archive(tmp_path / "m.ckpt")
    (tmp_path / "m.ckpt").write_bytes(data)
    rebuild(tmp_path / "m.ckpt", lambda e: None, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FolderError, match="is compressed"):
        open_archive(tmp_path / "m.ckpt")
    torch.serialization.set_crc32_options(False)  # torch then writes none
    try:
        tensors = save(tmp_path / "m.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(open_archive(tmp_path / "m.ckpt").tensors, tensors)


def test_an_entry_that_reaches_outside_the_file(tmp_path: Path) -> None:
    """By its size in the archive's directory, whatever the pickle says of it."""
    save(tmp_path / "m.ckpt")
    rebuild(tmp_path / "m.ckpt", lambda e: None)
    data = bytearray((tmp_path / "m.ckpt").read_bytes())
    place = data.rindex(b"m/data/0") - 46
    assert data[place : place + 4] == b"PK\x01\x02"
    data[place + 20 : place + 28] = struct.pack("<II", 10**6, 10**6)
    (tmp_path / "m.ckpt").write_bytes(data)
    with pytest.raises(FolderError, match=r"m/data/0' of its archive reaches outside the file"):
        open_archive(tmp_path / "m.ckpt")


def test_tensors_that_repeat_the_same_bytes_are_bounded(tmp_path: Path) -> None:
    """Tied weights are copied, so that training moves one alone; ten thousand names of one large tensor are refused."""
    large = torch.randn(1000)
    torch.save({"a": large, "b": large}, tmp_path / "tied.pt")
    assert same(open_archive(tmp_path / "tied.pt").tensors, {"a": large, "b": large})
    torch.save({"a": torch.ones(1).expand(10**6)}, tmp_path / "small.pt")  # what a small file expands is not a bomb
    assert same(open_archive(tmp_path / "small.pt").tensors, {"a": torch.ones(10**6)})
    torch.save({f"{i}": large for i in range(10000)}, tmp_path / "many.pt")
    with pytest.raises(FolderError, match="that share bytes"):
        open_archive(tmp_path / "many.pt")
    torch.save({"a": torch.ones(1).expand(10**9)}, tmp_path / "wide.pt")
    with pytest.raises(FolderError, match="more elements than the file has bytes"):
        open_archive(tmp_path / "wide.pt")


@settings(max_examples=100, deadline=None)
@given(
    is_zip=st.booleans(),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), min_size=1, max_size=4),
)
def test_torch_files_of_other_bytes(folder: Path, is_zip: bool, edits: list[tuple[float, bytes]]) -> None:
    file = folder / "fuzz.ckpt"
    save(file, is_zip)
    data = bytearray(file.read_bytes())
    for place, change in edits:
        at = int(place * len(data))
        data[at : at + 2] = change
    file.write_bytes(data)
    try:
        read = open_archive(file)
    except FolderError as error:
        assert "\n" not in str(error)
        return
    for tensor in read.tensors.values():
        tensor.double().sum()
