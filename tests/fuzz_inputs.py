"""What `make fuzz` feeds the commands: small valid examples, and for each kind of input a function that damages one of them.

A kind is called in a folder with a fresh copy of the examples, changes files there, and returns the call to make.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from ldm.cli.main import main, parser

DRAW = ["--steps", "2", "--prompt", "a photo", "--out", "out"]
READERS = {  # of a model: drawn from, described, converted, compared
    "sample": ["sample", "{}", *DRAW], "inspect": ["inspect", "{}"], "json": ["inspect", "{}", "--json", "--no-hashes"],
    "convert": ["convert", "{}", "out/model.safetensors"], "diff": ["diff", "{}", "model.safetensors"],
}  # fmt: skip
TRAIN = {
    "steps": 2, "batch_size": 2, "log_every": 1, "validate_every": 2, "validation_size": 2, "sample_every": 2, "checkpoint_every": 1,
    "trackers": [],
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "autoencoder": {"model": {"channels": [8, 8, 8], "layers_per_level": 1, "groups": 4, "mid_attention": False}},
    "clip": {"model": {"width": 16, "layers": 1, "heads": 2, "max_length": 16, "merges": 8, "patch_size": 8, "projection": 8}},
    "ldm": {
        "autoencoder": "autoencoder", "text": "clip", "sample": {"steps": 2},
        "unet": {"channels": [8, 8], "layers_per_level": 1, "attention_levels": [1], "heads": [2], "groups": 4},
    },
}  # fmt: skip
TRAIN_LDM = ["train-ldm", "configs/ldm.yaml"]
RESUME = [*TRAIN_LDM, "train.steps=3"]

COMMANDS = [
    ["init", "images", "--out", "out"], [*TRAIN_LDM, "run=out"], ["train", "configs", "ldm.run=out"], ["checkpoints", "run"],
    ["cache-latents", "configs/ldm.yaml", "run=out"], ["sample", "run", *DRAW], ["status", "run"], ["diff", "run", "adapter"],
    ["reproduce", "pictures/00000-a-photo.png", "--out", "out"], ["report", "run", "--images", "4", "--out", "out"],
    ["replay", "run/incidents/x"], ["plot", "reverse", "run", "--out", "out"], ["plot", "schedules", "--out", "out"],
    ["convert", "run", "out"], ["convert", "run", "out.safetensors", "--verify"], ["inspect", "run"],
    ["compare-autoencoders", "autoencoder", "autoencoder", "--out", "out"], ["train-classifier", "configs/ldm.yaml"],
    ["train-autoencoder", "configs/autoencoder.yaml", "run=out"], ["train-clip", "configs/clip.yaml", "run=out"],
    ["evaluate", "run", "--images", "2", "--likelihood", "--timesteps", "2"], ["verify-resume", "configs/ldm.yaml", "--keep", "out"],
    ["sampler-report", "run", "--out", "out", "--steps", "2", "--samplers", "ddim", "--images", "2"],
]  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A command line, or a call of the pipeline, and what may come of it."""

    what: str  # was done to the input
    argv: list[str]
    codes: tuple[int, ...]  # with which it may be refused
    refused: bool = False  # it must be
    same: bool = False  # or else it gives what the undamaged input gives
    out: tuple[str, ...] = ("out",)  # where there is nothing after a refusal
    encoding: str = "utf-8"  # of the terminal
    disk: int | None = None  # bytes after which no file can grow
    arguments: dict[str, Any] = field(default_factory=dict)  # of the pipeline
    names: str = ""  # stands in the refusal


def build_examples() -> None:
    """Images with captions, three small runs, a model as a single file and as a pickle, a LoRA, a picture; in this folder."""
    Path("images").mkdir()
    for i in range(12):
        pixels = np.arange(3 * 40 * (36 + i), dtype=np.uint8).reshape(40, 36 + i, 3) // (i + 1)
        Image.fromarray(pixels).save(f"images/{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"a photo of number {i}"} for i in range(12)]
    Path("images/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.txt").write_text("a photo\na photo of number 3\n")
    Path("configs").mkdir()
    for name, tree in NETWORKS.items():
        data = {"folder": "images", "image_size": 32, "validation_fraction": 0.3}
        run = "run" if name == "ldm" else name
        Path(f"configs/{name}.yaml").write_text(yaml.safe_dump({"run": run, "data": data, "train": TRAIN, **tree}))
    adapter = ["init=run", "train.lora.rank=2", "run=adapter"]
    for argv in (["train", "configs"], [*TRAIN_LDM, *adapter], ["sample", "run", *DRAW], ["convert", "run", "model.safetensors"]):
        if main(argv):
            raise RuntimeError(f"the examples cannot be built: {argv}")
    Path("out").rename("pictures")
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file("model.safetensors"), "epoch": 1}, "model.ckpt")


# oddities

DIGITS, DEEP = "9" * 5000, "[" * 5000 + "]" * 5000
ODD: list[Any] = [
    None, True, "", "x", "\ud800", "a\0b", "y" * 5000, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, 1e-320, math.nan, math.inf, [], {},
    [[]], {"x": 1}, [1, "x"], "@digits", "@deep", "..", "/dev/null", "loop", "pipe", "images", "run", "model.safetensors",
]  # fmt: skip
WORDS = [
    "", "-1", "0", "1", "3", "nan", "inf", "1e400", "99999999999", DIGITS, "caf\udce9", "n" * 5000, ".", "..", "/dev/null/x", "run", "images",
    "model.safetensors", "model.ckpt", "adapter", "/dev/null", "missing", "loop", "pipe", "-", "--", "=", "a=b", "run=", "train.steps=1",
    "data.size=x", "train=1", "a\nb", "🙂×", ":2", "run:nan", "%s", "{}", "x.safetensors", "metadata", "cpu", "meta", "cuda:9", "ddpm",
]  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container and key of a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in [(tree, key), *places(value)]]


def oddly(draw: random.Random, tree: Any) -> str:
    """Change a tree in one place; says how."""
    holder, key = draw.choice(places(tree))
    value = holder[key]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    changes = {
        "dropped": lambda: holder.pop(key),
        "odd": lambda: holder.__setitem__(key, draw.choice(ODD)),
        "a list": lambda: holder.__setitem__(key, [value]),
        "times": lambda: holder.__setitem__(key, value * draw.choice((-1, 0, 2, 10**9, 0.37)) if number else [value] * 3),
        "as text": lambda: holder.__setitem__(key, str(value)),
        "renamed": lambda: isinstance(holder, dict) and holder.__setitem__(f"{key}x", holder.pop(key)),
        "twice": lambda: isinstance(holder, dict) and holder.__setitem__(f"{key}@twice", draw.choice((value, 1, "x", None))),
        "another's": lambda: holder.__setitem__(key, (lambda other: other[0][other[1]])(draw.choice(places(tree)))),
    }
    name = draw.choice(("odd", "odd", "odd", *changes))
    changes[name]()
    return f"{key} {name}: {str(holder.get(key, '') if isinstance(holder, dict) else value)[:60]!r} (was {str(value)[:40]!r})"


def written(tree: Any) -> bytes:
    """JSON, which is YAML too, with what no tree can hold: keys that stand twice, 5,000 digits, deep nesting."""
    text = json.dumps(tree, indent=1).replace('@twice"', '"')
    return text.replace('"@digits"', DIGITS).replace('"@deep"', DEEP).encode()


def flipped(draw: random.Random, content: bytes, first: int | None = None) -> bytes:
    """A few bytes changed, of the first ones or of all."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 10))):
        if changed:
            changed[draw.randrange(min(len(changed), first or len(changed)))] = draw.choice((0, 1, 0x7F, 0xFF, draw.randrange(256)))
    return bytes(changed)


def damaged(draw: random.Random, content: bytes, text: bool = False) -> tuple[str, bytes]:
    """Bytes changed without regard to what they mean."""
    at = draw.randrange(len(content) + 1)
    ways: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "cut": lambda: content[:at],
        "flipped": lambda: flipped(draw, content),
        "head flipped": lambda: flipped(draw, content, 64),
        "doubled": lambda: content + content,
        "zeros": lambda: content[:at] + bytes(len(content) - at),
        "a part twice": lambda: content[:at] + content[at // 2 :],
    }
    if text:
        ways |= {
            "UTF-16": lambda: content.decode("utf-8", "replace").encode("utf-16"),
            "latin-1": lambda: content[:at] + b"caf\xe9" + content[at:],
            "a lone surrogate": lambda: content[:at] + b"\xed\xa0\x80" + content[at:],
            "NUL": lambda: content[:at] + b"\0" + content[at:],
            "long": lambda: content[:at] + b"y" * 300_000 + content[at:],
        }
    name = draw.choice(list(ways))
    return f"{name} at {at} of {len(content)}", ways[name]()


def misplaced(draw: random.Random, file: Path) -> str:
    """Something that is no file where one should be."""
    name = draw.choice(("gone", "a folder", "a loop", "a dangling link", "a pipe", "not to be read", "a file in a folder's place"))
    if name == "a file in a folder's place" and file.parent != Path():
        shutil.rmtree(file.parent)
        file.parent.write_bytes(b"")
        return f"{file.parent}: {name}"
    file.unlink()
    acts: dict[str, Callable[[], Any]] = {
        "a folder": file.mkdir,
        "a loop": lambda: file.symlink_to(file.name),
        "a dangling link": lambda: file.symlink_to("missing"),
        "a pipe": lambda: os.mkfifo(file),
        "not to be read": lambda: file.touch(0o000),
    }
    acts.get(name, lambda: None)()
    return f"{file}: {name}"


def upset(draw: random.Random, file: Path, text: bool = True) -> str:
    """Damage a file whatever it holds: its place, its bytes, or the tree that it holds as JSON or YAML."""
    way = draw.random()
    if way < 0.12:
        return misplaced(draw, file)
    if way < 0.4 or file.suffix not in (".json", ".yaml"):
        words, content = damaged(draw, file.read_bytes(), text)
    else:
        tree = yaml.safe_load(file.read_text()) if file.suffix == ".yaml" else json.loads(file.read_text())
        words, content = oddly(draw, tree), b""
        words += f"; {oddly(draw, tree)}" if draw.random() < 0.2 and places(tree) else ""
        content = written(tree)
    file.write_bytes(content)
    return f"{file}: {words}"


def reordered(file: Path) -> None:
    """The same JSON with its keys in another order."""
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(tree.items())), indent=7))


def reader(draw: random.Random, model: str) -> list[str]:
    return [word.format(model) for word in draw.choice(list(READERS.values()))]


# kinds of input


def command(draw: random.Random) -> Call:
    """Options and words of every command."""
    argv = list(draw.choice(COMMANDS))
    sub = parser()._subparsers._group_actions[0].choices[argv[0]]  # type: ignore[union-attr, index]
    options = [option for action in sub._actions for option in action.option_strings if option not in ("-h", "--help")]
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(1, len(argv) + 1)
        way = draw.choice(("word", "word", "word", "option", "option", "drop", "twice"))
        if way == "word":
            argv[at : at + 1] = [draw.choice(WORDS)]
        elif way == "option" and options:
            argv[at:at] = [draw.choice(options), *([draw.choice(WORDS)] if draw.random() < 0.8 else [])]
        else:
            argv[at : at + 1] = argv[at : at + 1] * (2 if way == "twice" else 0)
    return Call(f"{argv}", argv, (2, 3, 4), encoding=draw.choice(("utf-8", "utf-8", "ascii", "latin-1")))


def config(draw: random.Random) -> Call:
    """A configuration file and its overrides."""
    name = draw.choice(list(NETWORKS))
    argv = [f"train-{name}", f"configs/{name}.yaml"]
    file = Path(argv[1])
    tree = yaml.safe_load(file.read_text()) | {"run": "new"}
    file.write_text(yaml.safe_dump(tree))
    if draw.random() < 0.3:
        holder, key = draw.choice([(f"{k}." if isinstance(v, dict) else k, v) for k, v in tree.items()])
        setting = holder + draw.choice(list(key)) if isinstance(key, dict) else holder
        argv.append(f"{setting}={draw.choice([*WORDS, '[', '{', '[1,2', '*a', '${x}', '!!python/name:os.system', 'null'])}")
        return Call(f"{argv[-1]}", argv, (2, 3, 4, 5), out=("new/model",))
    if draw.random() < 0.1:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
        return Call("a byte order mark and CRLF", argv, (), same=True, out=())
    return Call(upset(draw, file), argv, (2, 3, 4, 5), out=("new/model",))


def folder(draw: random.Random) -> Call:
    """The JSON files and tokenizers of a model folder."""
    files = sorted(p for p in Path("run/model").rglob("*") if p.suffix in (".json", ".txt"))
    file = draw.choice(files)
    argv = reader(draw, "run/model")
    if draw.random() < 0.1 and file.suffix == ".json" and "tokenizer" not in str(file):
        reordered(file)
        return Call(f"{file}: keys in another order", argv, (), same=True)
    if draw.random() < 0.5:
        Path("run/model/ldm.json").unlink(missing_ok=True)
        files.remove(Path("run/model/ldm.json"))
        file = draw.choice(files)
    return Call(upset(draw, file), argv, (2, 4))


def header(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    """A safetensors file with another header, or other numbers in its tensors."""
    length = struct.unpack("<Q", content[:8])[0]
    tree, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    way = draw.choice(("tree", "tree", "length", "not finite", "shape"))
    if way == "length":
        odd = draw.choice((0, 1, 2**40, 2**63, 2**64 - 1, length - 1, length + 1))
        return f"header length {odd}", struct.pack("<Q", odd) + content[8:]
    name = draw.choice([key for key in tree if key != "__metadata__"])
    entry, words = tree[name], way
    if way == "not finite":
        begin = entry["data_offsets"][0]
        data = data[:begin] + struct.pack("<f", draw.choice((math.nan, math.inf))) + data[begin + 4 :]
        words = f"{name} not finite"
    elif way == "shape":
        entry["shape"] = draw.choice(([2**40, *entry["shape"]], entry["shape"][::-1], [*entry["shape"], 1], [-1], [0], [2**63, 2**63]))
        words = f"{name} shape {entry['shape']}"
    else:
        words = oddly(draw, tree)
    packed = written(tree)
    return words, struct.pack("<Q", len(packed)) + packed + data


def tensors(draw: random.Random) -> Call:
    """Bytes of safetensors files, in a folder and alone."""
    inside = sorted(Path("run/model").rglob("*.safetensors"))
    file, model = draw.choice([(Path("model.safetensors"), "model.safetensors"), (draw.choice(inside), "run")])
    argv = reader(draw, model)
    argv = ["diff", "model.safetensors", "run/model"] if argv[0] == "diff" else argv
    if draw.random() < 0.1:
        length = struct.unpack("<Q", (content := Path("model.safetensors").read_bytes())[:8])[0]
        padded = content[8 : 8 + length] + b" " * 64
        Path("model.safetensors").write_bytes(struct.pack("<Q", len(padded)) + padded + content[8 + length :])
        return Call("a header with blanks behind it", ["inspect", "model.safetensors"], (), same=True)
    words, content = header(draw, file.read_bytes()) if draw.random() < 0.6 else damaged(draw, file.read_bytes())
    file.write_bytes(content)
    return Call(f"{file}: {words}", argv, (2, 4, 5), refused=argv[0] in ("sample", "convert") and " not finite" in words)


PICKLED = {  # before the end of data.pkl; each leaves the stack as it was
    "os.system": b"cos\nsystem\n(S'true'\ntR0", "builtins.eval": b"c__builtin__\neval\n0", "an unknown class": b"cmodule\nName\n)\x810",
    "5,000 digits": b"I" + DIGITS.encode() + b"\n0", "a long of 2 GB": b"\x8b\xff\xff\xff\x7f", "a string of 2 GB": b"X\xff\xff\xff\x7f",
    "deep tuples": b")" + b"\x85" * 100_000 + b"0", "doubling tuples": b")" + b"2\x86" * 60 + b"0", "doubling lists": b"]" + b"2\x86" * 40 + b"0",
    "a list in itself": b"]2a0", "no such memo": b"h\xff", "an empty stack": b"000000", "a persistent id": b"S'x'\nQ0", "an extension": b"\x82\x01",
    "a huge memo": b"Nr\xff\xff\xff\x7f0", "a dict of a list": b"}]Ns0", "build on None": b"NNb0", "a surrogate": b"V\\ud800\n0", "mark": b"(1",
    "reduce a list": b"ctorch\nFloatStorage\n]R0", "rebuild of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n)R0",
}  # fmt: skip


def pickle(draw: random.Random) -> Call:
    """Archives of torch."""
    source = Path("model.ckpt")
    argv = reader(draw, "model.ckpt")
    if draw.random() < 0.25:
        words, content = damaged(draw, source.read_bytes())
        source.write_bytes(content)
        return Call(f"model.ckpt: {words}", argv, (2, 4, 5))
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in members if n.endswith("data.pkl")) if draw.random() < 0.7 else draw.choice(list(members))
    way = draw.choice(("opcodes", "opcodes", "bytes", "gone", "renamed", "compressed"))
    words = f"{name} {way}"
    if way == "opcodes" and name.endswith("data.pkl"):
        odd = draw.choice(list(PICKLED))
        words, members[name] = f"{name}: {odd}", members[name][:-1] + PICKLED[odd] + b"."
    elif way == "gone":
        del members[name]
    elif way == "renamed":
        members[draw.choice(("../x", "/x", name.upper(), "a" * 5000, "archive/data.pkl"))] = members.pop(name)
    elif way != "compressed":
        words, members[name] = damaged(draw, members[name])
        words = f"{name}: {words}"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED if way == "compressed" else zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return Call(f"model.ckpt: {words}", argv, (2, 4, 5))


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Types and data of a PNG's chunks."""
    found, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png(parts: list[tuple[bytes, bytes]]) -> bytes:
    """The PNG of these chunks, with their checksums right."""
    packed = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def odd_chunks(draw: random.Random, parts: list[tuple[bytes, bytes]]) -> str:
    """Change a list of chunks; says how."""
    way, at = draw.choice(("size", "bytes", "gone", "twice", "odd", "bits")), draw.randrange(len(parts))
    kind, data = parts[at]
    if way in ("size", "bits"):
        width, height, bits, colour, *rest = struct.unpack(">IIBBBBB", parts[0][1]) if len(parts[0][1]) == 13 else (1,) * 7
        sizes = ((0, 0), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (20_000, 20_000), (1, 1), (width + 1, height))
        width, height = draw.choice(sizes) if way == "size" else (width, height)
        bits, colour = (draw.choice((1, 2, 4, 8, 16, 3)), draw.choice((0, 2, 3, 4, 6, 9))) if way == "bits" else (bits, colour)
        parts[0] = b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, *rest)
    elif way == "bytes":
        parts[at] = kind, damaged(draw, data)[1]
    elif way == "gone":
        del parts[at]
    elif way == "twice":
        parts.insert(at, parts[at])
    else:
        odd = draw.choice((b"tRNS", b"PLTE", b"gAMA", b"cHRM", b"iCCP", b"sRGB", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"pHYs", b"acTL", b"fcTL"))
        parts.insert(1, (odd, draw.choice((b"", b"\0", b"x\0\0" + zlib.compress(bytes(10**7)), tiff(draw), draw.randbytes(12)))))
    return f"{kind!r} {way}"


def tiff(draw: random.Random) -> bytes:
    """A TIFF of 48 × 40 grey pixels, which EXIF is as well, with odd entries."""
    order = draw.choice("<>")
    size = {256: 48, 257: 40, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 40, 279: 1920}
    entries = [(tag, 4, 1, struct.pack(f"{order}L", value)) for tag, value in size.items()] if draw.random() < 0.7 else []
    for _ in range(draw.choice((0, 1, 3))):
        tag = draw.choice((*size, 0x0112, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x8769, 0x8825, 0x9286, 0xA005, 320, 339, draw.randrange(65536)))
        odd = (tag, draw.randrange(15), draw.choice((0, 1, 2, 4, 2**31, 2**32 - 1)), draw.choice((b"72\0\0", bytes(4), b"\xff" * 4, draw.randbytes(4))))
        entries = [e for e in entries if e[0] != tag] + [odd]
    ifd = struct.pack(f"{order}H", len(entries)) + b"".join(struct.pack(f"{order}HHL", *e[:3]) + e[3] for e in sorted(entries)) + bytes(4)
    pixels = bytes(range(48)) * 40
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8 + len(pixels)) + pixels + ifd


def image(draw: random.Random) -> Call:
    """Headers and bodies of images, and what stands beside the pixels."""
    picture = Image.open("images/3.png").convert(draw.choice(("RGB", "RGB", "L", "RGBA", "P", "1", "LA", "I;16") ))
    ending = draw.choice(("png", "png", "png", "jpg", "jpg", "gif", "bmp", "tif", "webp"))
    file = Path(f"images/odd.{ending}")
    if ending == "jpg":
        exif = b"Exif\0\0" + tiff(draw) if draw.random() < 0.6 else b""
        picture.convert("RGB").save(file, exif=exif)
    elif ending == "tif":
        file.write_bytes(tiff(draw))
    else:
        (picture if ending in ("png", "tif") and picture.mode != "LA" else picture.convert("RGB")).save(file)
    words, content = ending, file.read_bytes()
    if ending == "png":
        parts = chunks(content)
        words, content = f"png {picture.mode}: {odd_chunks(draw, parts)}", png(parts)
    if draw.random() < 0.5:
        more, content = damaged(draw, content)
        words += f", {more}"
    file.write_bytes(content)
    if draw.random() < 0.1:
        words = misplaced(draw, file)
    with open("images/metadata.jsonl", "a") as stream:
        stream.write(json.dumps({"file_name": file.name, "text": "a photo"}) + "\n")
    argv = draw.choice((["init", "images", "--out", "out"], ["cache-latents", "configs/ldm.yaml", "run=new"]))
    return Call(words, argv, (2, 3))


def rows(draw: random.Random) -> Call:
    """Metadata in JSON lines and CSV, captions beside the images, names of folders."""
    file, captions = Path("images/metadata.jsonl"), "metadata"
    parsed = [json.loads(line) for line in file.read_text().splitlines()]
    way = draw.choice(("jsonl", "jsonl", "csv", "csv", "sidecar", "class"))
    if way == "jsonl":
        words = oddly(draw, parsed)
        file.write_bytes(b"".join(written(row).replace(b"\n", b"") + b"\n" for row in parsed))
    elif way == "csv":
        file.unlink()
        file = Path("images/metadata.csv")
        head, odd = draw.choice(("file_name,text", "file_name,text,text", "text", "", "file_name,text,", '"file_name,text')), draw.randrange(12)
        cells = ['"', "a,b", '"a""b"', "\0", "x" * 200_000, "", "=1+1", '"a\nb"', "a\u2028b", DIGITS]
        body = [f"{r['file_name']},{draw.choice(cells) if i == odd else r['text']}" for i, r in enumerate(parsed)]
        file.write_text("\n".join([head, *body]) + "\n")
        words = f"csv, head {head!r}, row {odd} {body[odd][:40]!r}"
    else:
        file.unlink()
        captions = way
        for row in parsed:
            place = Path("images") / row["file_name"]
            if way == "sidecar":
                place.with_suffix(".txt").write_text(row["text"])
            else:
                (target := Path("images") / draw.choice(("red", "blue", "n" * 200, "a\nb", "caf\udce9"))).mkdir(exist_ok=True)
                place.rename(target / place.name)
        words, file = way, Path("images/3.txt")
    if file.exists() and (way == "sidecar" or draw.random() < 0.4):
        words += f"; {upset(draw, file)}"
    argv = ["init", "images", "--out", "out"]
    if draw.random() < 0.4:
        argv = ["cache-latents", "configs/ldm.yaml", "run=new", f"data.captions={captions}"]
    return Call(words, argv, (2, 3))


def prompts(draw: random.Random) -> Call:
    """Files of prompts."""
    file, argv = Path("prompts.txt"), ["sample", "run", "--steps", "2", "--prompts-file", "prompts.txt", "--out", "out"]
    if draw.random() < 0.3:
        content = file.read_bytes()
        changed = draw.choice((b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), b"\n" + content + b"\n \n", content[:-1]))
        file.write_bytes(changed)
        return Call(f"{changed!r}", argv, (), same=True)
    odd = draw.choice(("\u2028", "\f", "\x85", "\0", "\ud800", "\ufdd0", "🙂" * 50, "a" * 20_000, "../../x", "\x1b[31m", "\t", "ß" * 70))
    if draw.random() < 0.5:
        file.write_bytes(f"a photo{odd}of\n".encode("utf-8", "surrogatepass"))
        return Call(f"a prompt with {odd[:9]!r}", argv, (2,))
    return Call(upset(draw, file), argv, (2,))


def lora(draw: random.Random) -> Call:
    """LoRA files, and folders that hold one."""
    argv = ["sample", "run", *DRAW, "--lora", "adapter/model"]
    if draw.random() < 0.3:
        argv = draw.choice((["sample", "adapter", *DRAW], ["inspect", "adapter/model/pytorch_lora_weights.safetensors"]))
    file = draw.choice(sorted(p for p in Path("adapter/model").rglob("*") if p.is_file()))
    if file.suffix != ".safetensors":
        return Call(upset(draw, file), argv, (2, 4, 5))
    if draw.random() < 0.3:
        settings = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"], "peft_type": "LORA", "use_dora": False, "bias": "none"}
        file.rename(file := file.with_name("adapter_model.safetensors"))
        words = oddly(draw, settings)
        file.with_name("adapter_config.json").write_bytes(written(settings))
        return Call(f"adapter_config.json: {words}", ["sample", "run", *DRAW, "--lora", "adapter/model"], (2, 4))
    words, content = header(draw, file.read_bytes()) if draw.random() < 0.7 else damaged(draw, file.read_bytes())
    file.write_bytes(content)
    return Call(f"{file}: {words}", argv, (2, 4, 5), refused="not finite" in words and argv[0] == "sample")


def cache(draw: random.Random) -> Call:
    """The latent cache that a training continues with."""
    file = draw.choice(sorted(Path("run/latents").iterdir()))
    if file.suffix == ".safetensors" and draw.random() < 0.6:
        words, content = header(draw, file.read_bytes())
        file.write_bytes(content)
    else:
        words = upset(draw, file, text=file.suffix == ".json")
    return Call(f"{file}: {words}", RESUME, (3, 4), same=True, out=())


def run(draw: random.Random) -> Call:
    """What a run directory holds, checkpoints included."""
    files = sorted(p for p in Path("run").rglob("*") if p.is_file() and not {"model", "latents"} & set(p.parts) and p.name != ".lock")
    file = draw.choice([*files, *(p for p in files if p.suffix in (".json", ".jsonl", ".yaml"))])
    words = upset(draw, file, text=file.suffix not in (".safetensors", ".png"))
    looks = [["status", "run"], ["status", "run", "--json"], ["checkpoints", "run"], ["checkpoints", "run", "--fast", "--json"]]
    looks += [["report", "run", "--images", "0", "--out", "out/report.html"], ["diff", "run", "adapter"], RESUME]
    looks += [["plot", "training", "run", "--out", "out"], ["sample", "run", *DRAW], ["replay", "run/incidents/update-1"]]
    argv = draw.choice(looks)
    resumed = argv[0] == "train-ldm" and "checkpoints" in file.parts
    return Call(words, argv, (2, 3, 4, 5), same=resumed, out=("out",))


def picture(draw: random.Random) -> Call:
    """Pictures of `ldm sample`."""
    file = Path("pictures/00000-a-photo.png")
    argv = ["reproduce", str(file), "--out", "out.png"]
    parts = chunks(file.read_bytes())
    at = next(i for i, (kind, _) in enumerate(parts) if kind == b"iTXt")
    start = parts[at][1].index(b"{")
    if draw.random() < 0.6:
        about = json.loads(parts[at][1][start:])
        words = oddly(draw, about)
        parts[at] = b"iTXt", parts[at][1][:start] + written(about)
    else:
        words = odd_chunks(draw, parts)
    file.write_bytes(png(parts))
    if draw.random() < 0.2:
        words = upset(draw, file, text=False)
    return Call(words, argv, (2, 4), out=("out.png",))


NUMBER = (int, float, np.generic, torch.Tensor)  # numpy's and torch's scalars may be taken
TYPES: dict[str, Any] = {
    **dict.fromkeys(("steps", "seed", "size", "batch_size", "grid_offset"), (int, np.integer, torch.Tensor)),
    **dict.fromkeys(("guidance_scale", "eta", "guidance_rescale", "dynamic_threshold", "autoguidance_scale", "classifier_scale"), NUMBER),
    **dict.fromkeys(("sampler", "negative_prompt", "classifier_form", "grid", "variance", "classifier", "autoguidance"), (str, Path)),
    **dict.fromkeys(("prompts", "lora"), (str, list, tuple, range, set, np.ndarray, Iterator)), "callback": Callable,
    "end_clean": bool, "guidance_interval": (tuple, list, set, range, np.ndarray, torch.Tensor),
}  # fmt: skip


def disk(draw: random.Random) -> Call:
    """A disk that takes no more after some bytes."""
    argv = list(draw.choice(COMMANDS))
    size = draw.choice((0, 100, 4000, 30_000, 200_000))
    return Call(f"room for {size} bytes in a file", argv, (2, 3, 4), disk=size, out=())


def python(draw: random.Random) -> Call:
    """Arguments of a call of the pipeline."""
    odd = [
        *(value for value in ODD if not (isinstance(value, str) and value.startswith("@"))), b"x", b"\xff", 1.5, 2.0, 1j, np.int64(2), np.float32(0.5),
        np.array([1, 2]), torch.tensor(2), torch.zeros(2, 2), Path("run"), object, {1, 2}, (1,), (0.1, 0.5, 2.0), (5.0, 0.1), ("0", "1"), ["x", 2],
        ["a", ["b"]], [""], "caf\udce9", "a " * 5000, range(3), (v for v in "ab"), 10**400, "run:2", ("adapter/model",), ["adapter/model:x"], True,
    ]  # fmt: skip
    name = draw.choice([*TYPES, "prompts", "no_such"])
    value = draw.choice(odd)
    arguments = {"prompts": ["a photo"], "steps": 2, name: value}
    wrong = name not in TYPES or (value is not None and (isinstance(value, bool) != (name == "end_clean") or not isinstance(value, TYPES[name])))
    return Call(f"{name}={str(value)[:60]!r} ({type(value).__name__})", ["python"], (2, 4), wrong, arguments=arguments, names=name)


KINDS: dict[str, Callable[[random.Random], Call]] = {
    f.__name__: f for f in (command, config, folder, tensors, pickle, image, rows, prompts, lora, cache, run, picture, disk, python)
}  # fmt: skip
