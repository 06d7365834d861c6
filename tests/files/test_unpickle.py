"""The unpickler: plain values as Python reads them, Lightning's files, and what hostile pickles cannot do."""

from __future__ import annotations

import argparse
import collections
import copyreg
import dataclasses
import datetime
import decimal
import fractions
import pathlib
import pickle
import subprocess
import sys
import types
import typing
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ldm.errors import FolderError
from ldm.files.tensors.archive import Archive, open_archive
from ldm.files.tensors.pickled import Placeholder
from ldm.files.tensors.unpickle import LIMIT, Unpickler

ROOT = Path(__file__).resolve().parents[2]
LEGACY = [
    0x1950A86A20F9469CFC6C,
    1001,
    {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
]


def load(data: bytes) -> Any:
    return Unpickler(data, "model.ckpt").load()


def plant(file: Path, data: bytes, legacy: bool = False, **storages: bytes) -> Path:
    """A torch file with a pickle of ours and the right checksums."""
    if legacy:
        file.write_bytes(b"".join(pickle.dumps(value, 2) for value in LEGACY) + data + pickle.dumps([], 2))
        return file
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {
            "data.pkl": data,
            "byteorder": b"little",
            **{f"data/{k}": v for k, v in storages.items()},
        }.items():
            archive.writestr(f"archive/{name}", content)
    return file


def refused(data: bytes, tmp_path: Path, *words: str) -> None:
    """It is refused in both containers, in one line with these words."""
    for legacy in (False, True):
        with pytest.raises(FolderError) as error:
            open_archive(plant(tmp_path / "model.ckpt", data, legacy))
        assert all(word in str(error.value) for word in ("model.ckpt", *words)) and "\n" not in str(error.value), str(
            error.value
        )


# what is read

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.integers(-(2**50), 2**50), inner) | st.lists(inner).map(tuple)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(value=PLAIN, protocol=st.sampled_from([2, 3, 4, 5]))
def test_plain_values_are_those_of_python(value: Any, protocol: int) -> None:
    def without_empty_bytes(
        x: Any,
    ) -> Any:  # protocol 2 calls bytes() for them: a placeholder, as any other type of Python
        if x == b"" and protocol == 2:
            return b"?"
        if isinstance(x, (list, tuple)):
            return type(x)(map(without_empty_bytes, x))
        return {k: without_empty_bytes(v) for k, v in x.items()} if isinstance(x, dict) else x

    value = without_empty_bytes(value)
    read = load(pickle.dumps([value, value], protocol))
    assert repr(read) == repr([value, value])
    assert read[0] is read[1] or not isinstance(value, (list, dict))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_and_numbers_of_numpy(protocol: int) -> None:
    value = collections.OrderedDict(b=1, a=collections.defaultdict(list, {1: [2]}))
    value["size"] = torch.Size([3, 4])
    value["numbers"] = [np.float64(0.1), np.int64(-5), np.float32(0.5), np.bool_(True)]
    read = load(pickle.dumps(value, protocol))
    assert list(read.items()) == [("b", 1), ("a", {1: [2]}), ("size", (3, 4)), ("numbers", [0.1, -5, 0.5, True])]
    recursive: list[Any] = [1]
    recursive.append(recursive)
    read = load(pickle.dumps(recursive, protocol))
    assert read[1] is read
    others = load(
        pickle.dumps({"set": {1, 2}, "frozen": frozenset({3}), "none": type(None), "array": np.zeros(3)}, protocol)
    )
    assert all(isinstance(other, Placeholder) for other in others.values())


def test_python_2_wrote_text_as_bytes() -> None:
    assert load(b"\x80\x02}U\x06weightK\x01s.") == {"weight": 1}
    pairs = b"\x80\x02ccollections\nOrderedDict\n](]U\x01aK\x01\x86]U\x01bK\x02\x86e\x85R."
    assert load(pairs.replace(b"]U", b"U")) == {"a": 1, "b": 2}


class _Pretended(types.ModuleType):
    """A module of another's name."""


class _Lightning:
    """Modules of the names that Lightning's checkpoints mention, for as long as one is written."""

    NAMES: typing.ClassVar = {
        "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
        "pytorch_lightning.utilities.parsing": "AttributeDict",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.base": "ContainerMetadata",
        "omegaconf.nodes": "AnyNode",
    }

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        for path, name in self.NAMES.items():
            parts = path.split(".")
            for i in range(1, len(parts) + 1):
                patch.setitem(sys.modules, ".".join(parts[:i]), _Pretended(".".join(parts[:i])))
            bases = (dict,) if name == "AttributeDict" else (list,) if name == "ListConfig" else ()
            setattr(sys.modules[path], name, type(name, bases, {"__module__": path}))

    def make(self, path: str, *args: Any, **state: Any) -> Any:
        made = getattr(sys.modules[path], self.NAMES[path])(*args)
        made.__dict__.update(state)
        return made


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoint_of_lightning(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    file = tmp_path / "model.ckpt"
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    with pytest.MonkeyPatch.context() as patch:
        lightning = _Lightning(patch)
        callback = lightning.make(
            "pytorch_lightning.callbacks.model_checkpoint",
            best_model_score=torch.tensor(0.3),
            dirpath=Path("logs"),
            modes={"min", "max"},
        )
        about = lightning.make("omegaconf.base", ref_type=typing.Any, object_type=dict, optional=True, key=None)
        node = lightning.make("omegaconf.nodes", _metadata=about, _val=1e-4)
        config = lightning.make("omegaconf.dictconfig", _metadata=about, _content={"base_learning_rate": node})
        node.__dict__["_parent"] = config
        hyper = lightning.make("pytorch_lightning.utilities.parsing", {"config": config})
        moments = {i: {"step": 3, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)} for i in range(4)}
        checkpoint = {
            "epoch": 17,
            "global_step": np.int64(470000),
            "pytorch-lightning_version": "1.4.2",
            "state_dict": network.state_dict(),
            "callbacks": {
                type(callback): {"monitor": "val/loss", "best_model_score": np.float64(0.25)},
                "other": callback,
            },
            "optimizer_states": [
                {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1, 2, 3]}]}
            ],
            "lr_schedulers": [{"base_lrs": [1e-4], "lr_lambdas": [{}], "_last_lr": np.ones(2)}],
            "hyper_parameters": hyper,
            "options": collections.defaultdict(dict, a={"device": torch.device("cpu"), "dtype": torch.float16}),
        }
        torch.save(checkpoint, file, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    for name in ("pytorch_lightning", "omegaconf.nodes"):
        assert not isinstance(sys.modules.get(name), _Pretended)  # what is installed of that name may be there
    archive = open_archive(file)
    assert archive.counters == {"epoch": 17, "global_step": 470000}
    assert archive.tensors.keys() == network.state_dict().keys() and "pytorch_lightning" not in sys.modules
    assert all(torch.equal(archive.tensors[name], tensor) for name, tensor in network.state_dict().items())


@dataclasses.dataclass
class Structured:
    """A configuration as OmegaConf types it."""

    sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    name: typing.Optional[str] = None  # noqa: UP045  # pickled by operator.getitem


def beside() -> dict[str, Any]:
    """What trainers keep beside their weights."""
    schedulers, optimizer = torch.optim.lr_scheduler, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return {
        "types": [int, str, float, range(3), slice(1, 2), 1j, ..., type(None), bytearray(b"a"), {1}, frozenset({2})],
        "collections": [
            collections.Counter([30, 60]), collections.OrderedDict(a=1), collections.defaultdict(int, a=1),
            collections.deque([1], 3), collections.ChainMap({1: 2}), collections.UserDict(a=1),
            collections.UserList([1]), {(1, "a"): 2, (): 3},
        ],
        "paths": [Path("logs"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("b")],
        "times": [
            datetime.datetime.now(datetime.UTC), datetime.date(2020, 1, 2), datetime.timedelta(1), datetime.time(3),
        ],
        "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 2), uuid.UUID(int=5)],
        "namespaces": [types.SimpleNamespace(a=1), argparse.Namespace(b=2)],
        "numpy": [
            np.int64, np.float32(1), np.str_("a"), np.datetime64("2020-01-01"), np.complex64(1j), np.zeros(2),
            np.array(["a"], object), np.random.RandomState(0), np.random.default_rng(0),
            np.random.RandomState(0).get_state(),
        ],
        "schedules": [
            schedulers.MultiStepLR(optimizer, [30]).state_dict(), schedulers.OneCycleLR(optimizer, 1.0, 9).state_dict(),
            schedulers.LambdaLR(optimizer, lambda epoch: 1.0).state_dict(), optimizer.state_dict(), torch.optim.AdamW,
            optimizer,
        ],
        "torch": [
            torch.__version__, torch.device("cpu"), torch.Size([1]), torch.bfloat16, torch.complex64,
            torch.eye(2).to_sparse(),
        ],
        "omegaconf": [
            OmegaConf.create({"a": [1, {"b": "${a}"}], "c": None, "d": 1.5, "e": True}), OmegaConf.create([1, 2]),
            OmegaConf.structured(Structured),
        ],
        "typing": [typing.Any, typing.Optional[int], typing.Union[int, str], list[int]],  # noqa: UP007, UP045
    }  # fmt: skip


@pytest.mark.parametrize("name", beside())
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_trainers_keep_beside_their_weights_is_swallowed(
    tmp_path: Path, name: str, protocol: int, monkeypatch: Any
) -> None:
    things = beside()[name]
    monkeypatch.setattr(Structured, "__module__", "__main__")  # where a training script has it
    monkeypatch.setattr(sys.modules["__main__"], "Structured", Structured, raising=False)
    for thing in things:
        torch.save(
            {"state_dict": {"w": torch.arange(2)}, "hyper_parameters": {"thing": [thing, thing]}},
            tmp_path / "a.ckpt",
            pickle_protocol=protocol,
        )
        assert open_archive(tmp_path / "a.ckpt").tensors["w"].tolist() == [0, 1], thing


def test_tensors_of_other_classes_are_tensors(tmp_path: Path) -> None:
    marked = torch.ones(2)
    marked.remark = "an attribute"  # type: ignore[attr-defined]
    weights = {
        "p": torch.nn.Parameter(torch.ones(3)),
        "b": torch.nn.Buffer(torch.zeros(2)),
        "m": marked,
        "c": torch.ones(2) * 1j,
    }
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    found = open_archive(tmp_path / "a.ckpt").tensors
    assert all(
        torch.equal(found[name], tensor) and type(found[name]) is torch.Tensor for name, tensor in weights.items()
    )


def test_a_placeholder_among_the_weights(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        odd = _Lightning(patch).make("omegaconf.nodes", _val=1)
        torch.save({"state_dict": {"w": torch.ones(2), "odd": odd}}, tmp_path / "model.ckpt")
    with pytest.raises(FolderError, match=r"model.ckpt: 'odd' is a omegaconf.nodes.AnyNode, not a tensor"):
        open_archive(tmp_path / "model.ckpt")


# what is planted


class Run:
    """Pickled as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], tuple(self.call[1:])


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def payloads(sentinel: Path) -> dict[str, tuple[bytes, str]]:
    """Name: a pickle that makes the sentinel where Python reads it, and what the refusal names."""
    import os

    touch = f"touch {sentinel}"
    write = f"open({str(sentinel)!r}, 'w')"
    call = text(touch) + b"\x85R"
    in_dict = pickle.dumps({"state_dict": {"w": Run(eval, write)}}, 2)
    return {
        "system": (pickle.dumps(Run(os.system, touch), 2), "posix.system"),
        "eval": (pickle.dumps(Run(eval, write), 2), "builtins.eval"),
        "exec": (pickle.dumps(Run(exec, write), 4), "builtins.exec"),
        "popen": (pickle.dumps(Run(subprocess.check_call, ["touch", str(sentinel)]), 5), "subprocess.check_call"),
        "open": (pickle.dumps(Run(open, str(sentinel), "w"), 2), "open"),
        "among the weights": (in_dict, "builtins.eval"),
        "a key": (pickle.dumps({"state_dict": {}, "x": {(1, Run(eval, write)): 2}}, 2), "builtins.eval"),
        "getattr": (
            b"\x80\x02c__builtin__\ngetattr\ncos\nsystem\n" + text("__call__") + b"\x86R" + call + b".",
            "builtins.getattr",
        ),
        "dotted": (
            b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93" + call + b".",
            "torch.serialization.os.system",
        ),
        "dotted in a known module": (
            b"\x80\x04\x8c\x0ctorch._utils\x8c\x11logging.os.system\x93" + call + b".",
            "torch._utils.logging.os.system",
        ),
        "old instance": (b"(" + text(touch) + b"iposix\nsystem\n.", "INST"),
        "old object": (b"(cposix\nsystem\n" + text(touch) + b"o.", "posix.system"),
        "extension": (b"\x80\x02\x82\xf0" + text(str(sentinel)) + b"\x85R.", "EXT1"),
        "extension of two bytes": (b"\x80\x02\x83\xf0\x00" + text(str(sentinel)) + b"\x85R.", "EXT2"),
        "extension of four bytes": (b"\x80\x02\x84\xf0\x00\x00\x00" + text(str(sentinel)) + b"\x85R.", "EXT4"),
        "after the end of the first": (pickle.dumps(Run(os.system, touch), 2)[:-1] + b"0}.", "posix.system"),
    }


@pytest.mark.parametrize("name", payloads(Path("x")))
def test_a_planted_call_is_refused_by_name(tmp_path: Path, name: str) -> None:
    sentinel = tmp_path / "sentinel"
    data, named = payloads(sentinel)[name]
    refused(data, tmp_path, named)
    assert not sentinel.exists()
    copyreg.add_extension("os", "mkdir", 240)
    try:
        pickle.loads(data)  # the control: it is a working payload
    except AttributeError:
        assert name == "dotted in a known module"  # torch may stop importing it: refused all the same
    else:
        assert sentinel.exists()
    finally:
        copyreg.remove_extension("os", "mkdir", 240)
        copyreg._extension_cache.clear()  # type: ignore[attr-defined]


def test_a_state_is_set_nowhere(tmp_path: Path) -> None:
    def build(target: bytes) -> bytes:
        return b"\x80\x02" + target + b"N}" + text("planted") + b"K\x01s\x86b."

    victim = b"cldm.files.tensors.archive\nArchive\n"
    assert pickle.loads(build(victim)) is Archive and Archive.planted == 1  # type: ignore[attr-defined]
    del Archive.planted  # type: ignore[attr-defined]
    refused(build(victim), tmp_path, "ldm.files.tensors.archive.Archive")
    for target in (
        b"ctorch\nFloatStorage\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"]",
        b"K\x01",
    ):
        refused(build(target), tmp_path, "a state set in a")
    refused(b"\x80\x02cnumpy\ndtype\n" + text("f8") + b"\x85R(K\x03" + text(">") + b"tb.", tmp_path, "byte order")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call of a StorageType"),
        (b"\x80\x02ctorch\nfloat8_e5m2\n)R.", "a call of a dtype"),
        (b"\x80\x02})R.", "a call of a dict"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "a call of a Function"),
        (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
        (b"\x80\x02ccollections\nOrderedDict\n]R.", "a call of a Function"),
        (b"\x80\x02}K\x01a.", "an element added to a dict"),
        (b"\x80\x02](K\x01\x90.", "an element added to a list"),
        (b"\x80\x02]K\x01K\x02s.", "an entry set in a list"),
        (b"\x80\x02ctorch\nFloatStorage\nK\x01K\x02s.", "an entry set in a StorageType"),
        (b"\x80\x02" + text("module") + b"\x85Q.", "a persistent object that is not a storage"),
        (b"Pstorage\n.", "PERSID"),
        (b"\x80\x02(" + text("storage") + b"K\x01" + text("0") + text("cpu") + b"K\x01tQ.",
         "a persistent object that is not a storage"),
        (b"\x80\x02(" + text("storage") + b"ctorch\nIntStorage\n" + text("0") + text("cpu") + b"J\xff\xff\xff\xfftQ.",
         "a storage without"),
        (b"\x80\x04K\x01K\x02\x93.", "a global whose name is a int"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x24OrderedDict.__init__.__globals__.get\x93.",
         "OrderedDict.__init__.__globals__.get"),
        (b"\x80\x04\x8c\x11pytorch_lightning\x8c\x09os.system\x93.", "pytorch_lightning.os.system"),
        (b"\x80\x02cpytorch_lightning_evil\nX\n.", "pytorch_lightning_evil.X"),
        (b"\x80\x02cos\nsys\x1b[31mtem\n.", r"os.sys\\x1b[31mtem".replace("\\\\", "\\")),
        (b"\x80\x02ctorch.nn.modules.linear\nLinear\n.", "torch.nn.modules.linear.Linear"),
        (b"\x80\x02c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R.", "damaged"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "damaged"),
        (b"\x80\x02}(K\x01K\x01K\x01K\x02u.", "twice"),
        (b"\x80\x02}(K\x01u.", "damaged"),
        (b"\x80\x02R.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02c_operator\ngetitem\n]K\x00\x86R.", "an item of something that is not a type"),
        (b"\x80\x02cfunctools\npartial\n)R.", "functools.partial"),
        (b"\x80\x02ctypes\nFunctionType\n.", "types.FunctionType"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c_codecs\nencode\nN)NtR.",
         "rebuilt by another function than a tensor"),
        (b"\x80\x02c__builtin__\nreduce\n.", "functools.reduce"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02\xff.", "0xff"),
        (b"\x80\x02N", "cut off"),
        (b"\x80\x02X\xff\xff\xff\xff.", "cut off"),
        (b"\x80\x02N.", "NoneType, not tensors by name"),
        (b"\x80\x02}" + text("state_dict") + b"K\x01s.", "its state_dict is a int"),
    ],
)  # fmt: skip
def test_what_no_weights_need_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(FolderError) as error:
        open_archive(plant(tmp_path / "model.ckpt", data))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bombs(tmp_path: Path) -> None:
    bombs = {
        "an index of the memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "a list of a list": b"\x80\x02]q\x00"
        + b"".join(b"](" + bytes([104, i]) * 9 + b"eq" + bytes([i + 1]) for i in range(40))
        + b"0}.",
    }
    for data in bombs.values():
        assert load(data) in ({}, [])  # in no more memory than they are long
    deep = b"\x80\x02}N" + b"\x85" * 30_000 + b"K\x01s."  # hashing such a tuple ends the process
    repeated = (
        b"\x80\x02"
        + text("x" * 2**20)
        + b"q\x000c_codecs\nencode\nq\x010"
        + text("latin1")
        + b"q\x020("
        + b"h\x01h\x00h\x02\x86R" * 100
    )
    with pytest.raises(FolderError, match="a key that is a tuple"):
        load(deep)
    refused(repeated + b"t.", tmp_path, "more work than any weights take")
    refused(b"\x80\x02" + text("x" * LIMIT) + b"}.", tmp_path, "longer than 16 MiB")
    wide = b"\x80\x02}\x8a\x09" + (2**61 - 1).to_bytes(9, "little") + b"K\x01s."  # such numbers have all the same hash
    refused(wide, tmp_path, "a key that is a int")


def good(tmp_path: Path) -> tuple[bytes, bytes]:
    """The pickle and the storage of a small file of torch.save."""
    if not (tmp_path / "good.pt").exists():
        torch.save(
            {"state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(6.0)[1:4]}, "global_step": 3},
            tmp_path / "good.pt",
        )
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        return archive.read("good/data.pkl"), archive.read("good/data/0")


@settings(max_examples=150, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.booleans()), min_size=1, max_size=4
    )
)
def test_a_pickle_with_other_bytes(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[float, int, bool]]
) -> None:
    """With the checksum put right: an error of ours, or tensors that lie in the file."""
    folder = tmp_path_factory.getbasetemp()
    original, storage = good(folder)
    data = bytearray(original)
    for place, byte, insert in edits:
        at = int(place * len(data))
        data[at : at + (not insert)] = bytes([byte])
    file = plant(folder / "model.ckpt", bytes(data), **{"0": storage, "1": storage[:24]})
    try:
        archive = open_archive(file)
    except FolderError as error:
        assert "\n" not in str(error)
        return
    for tensor in archive.tensors.values():
        assert tensor.numel() <= file.stat().st_size
        tensor.float().sum()


def test_the_reader_imports_nothing() -> None:
    """Not even Python's own reader of pickles, but for what torch brings."""
    for name in ("unpickle", "pickled", "torchfile", "archive"):
        assert "pickle\n" not in (ROOT / f"ldm/files/tensors/{name}.py").read_text().replace(
            "from ldm.files.tensors.unpickle", ""
        )
