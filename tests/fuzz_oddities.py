"""Ways to damage input: trees of JSON and YAML, bytes, files in their places, headers, pickles, images."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

DIGITS, DEEP = "9" * 5000, "[" * 5000 + "]" * 5000
ODD: list[Any] = [
    None, True, "", "x", "\ud800", "a\0b", "y" * 5000, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, 1e-320, math.nan,
    math.inf, [], {}, [[]], {"x": 1}, [1, "x"], "@digits", "@deep", "..", "/dev/null", "loop", "pipe", "images", "run",
    "model.safetensors",
]  # fmt: skip
NUMBERS: list[Any] = [-1, 0, 1, 3, 2**20, 2**31, 2**63, 10**30, 0.5, 1e-9, -1e308, math.nan, math.inf, "@digits", "3"]
WORDS = [
    "", "-1", "0", "1", "3", "nan", "inf", "1e400", "99999999999", DIGITS, "caf\udce9", "n" * 5000, ".", "..",
    "/dev/null/x", "run", "images", "model.safetensors", "model.ckpt", "adapter", "/dev/null", "missing", "loop",
    "pipe", "-", "--", "=", "a=b", "run=", "train.steps=1", "data.size=x", "train=1", "a\nb", "🙂×", ":2", "run:nan",
    "%s", "{}", "x.safetensors", "metadata", "cpu", "meta", "cuda:9", "ddpm",
]  # fmt: skip
ODD_TEXT = [  # inside a caption
    "\u2028", "\f", "\x85", "\0", "\ud800", "\ufdd0", "\x1b[31m", "\u202e", "../../x", "🙂" * 50, "a" * 20_000,
    "ß" * 70,
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
        "odd": lambda: holder.__setitem__(key, draw.choice(NUMBERS if number and draw.random() < 0.6 else ODD)),
        "a list": lambda: holder.__setitem__(key, [value]),
        "times": lambda: holder.__setitem__(
            key, value * draw.choice((-1, 0, 2, 10**9, 0.37)) if number else [value] * 3
        ),
        "as text": lambda: holder.__setitem__(key, str(value)),
        "renamed": lambda: isinstance(holder, dict) and holder.__setitem__(f"{key}x", holder.pop(key)),
        "twice": lambda: (
            isinstance(holder, dict) and holder.__setitem__(f"{key}@twice", draw.choice((value, 1, "x", None)))
        ),
        "another's": lambda: holder.__setitem__(
            key, copy.deepcopy((lambda other: other[0][other[1]])(draw.choice(places(tree))))
        ),
    }
    name = draw.choice(("odd", "odd", "odd", *changes))
    changes[name]()
    now = str(holder.get(key, "") if isinstance(holder, dict) else value)
    return f"{key} {name}: {now[:60]!r} (was {str(value)[:40]!r})"


def written(tree: Any) -> bytes:
    """JSON, which is YAML too, with what no tree can hold: keys that stand twice, 5,000 digits, deep nesting."""
    text = json.dumps(tree, indent=1).replace('@twice"', '"')
    return text.replace('"@digits"', DIGITS).replace('"@deep"', DEEP).encode()


def flipped(draw: random.Random, content: bytes, first: int | None = None) -> bytes:
    """A few bytes changed, of the first ones or of all."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 10))):
        if changed:
            changed[draw.randrange(min(len(changed), first or len(changed)))] = draw.choice(
                (0, 1, 0x7F, 0xFF, draw.randrange(256))
            )
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
    """Something that is not a file where one should be."""
    name = draw.choice(
        ("gone", "a folder", "a loop", "a dangling link", "a pipe", "not to be read", "a file in a folder's place")
    )
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
        entry["shape"] = draw.choice(
            ([2**40, *entry["shape"]], entry["shape"][::-1], [*entry["shape"], 1], [-1], [0], [2**63, 2**63])
        )
        words = f"{name} shape {entry['shape']}"
    else:
        words = oddly(draw, tree)
    packed = written(tree)
    return words, struct.pack("<Q", len(packed)) + packed + data


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
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def odd_chunks(draw: random.Random, parts: list[tuple[bytes, bytes]]) -> str:
    """Change a list of chunks; says how."""
    way, at = draw.choice(("size", "bytes", "gone", "twice", "odd", "bits")), draw.randrange(len(parts))
    kind, data = parts[at]
    if way in ("size", "bits"):
        width, height, bits, colour, *rest = (
            struct.unpack(">IIBBBBB", parts[0][1]) if len(parts[0][1]) == 13 else (1,) * 7
        )
        sizes = ((0, 0), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (20_000, 20_000), (1, 1), (width + 1, height))
        width, height = draw.choice(sizes) if way == "size" else (width, height)
        bits, colour = (
            (draw.choice((1, 2, 4, 8, 16, 3)), draw.choice((0, 2, 3, 4, 6, 9))) if way == "bits" else (bits, colour)
        )
        parts[0] = b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, *rest)
    elif way == "bytes":
        parts[at] = kind, damaged(draw, data)[1]
    elif way == "gone":
        del parts[at]
    elif way == "twice":
        parts.insert(at, parts[at])
    else:
        odd = draw.choice(
            (
                b"tRNS",
                b"PLTE",
                b"gAMA",
                b"cHRM",
                b"iCCP",
                b"sRGB",
                b"tEXt",
                b"zTXt",
                b"iTXt",
                b"eXIf",
                b"pHYs",
                b"acTL",
                b"fcTL",
            )
        )
        parts.insert(
            1, (odd, draw.choice((b"", b"\0", b"x\0\0" + zlib.compress(bytes(10**7)), tiff(draw), draw.randbytes(12))))
        )
    return f"{kind!r} {way}"


def tiff(draw: random.Random) -> bytes:
    """A TIFF of 48 × 40 grey pixels, which EXIF is as well, with odd entries."""
    order = draw.choice("<>")
    size = {256: 48, 257: 40, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 40, 279: 1920}
    entries = (
        [(tag, 4, 1, struct.pack(f"{order}L", value)) for tag, value in size.items()] if draw.random() < 0.7 else []
    )
    for _ in range(draw.choice((0, 1, 3))):
        tag = draw.choice(
            (
                *size,
                0x0112,
                0x011A,
                0x011B,
                0x0128,
                0x0131,
                0x0132,
                0x8769,
                0x8825,
                0x9286,
                0xA005,
                320,
                339,
                draw.randrange(65536),
            )
        )
        odd = (
            tag,
            draw.randrange(15),
            draw.choice((0, 1, 2, 4, 2**31, 2**32 - 1)),
            draw.choice((b"72\0\0", bytes(4), b"\xff" * 4, draw.randbytes(4))),
        )
        entries = [e for e in entries if e[0] != tag] + [odd]
    ifd = (
        struct.pack(f"{order}H", len(entries))
        + b"".join(struct.pack(f"{order}HHL", *e[:3]) + e[3] for e in sorted(entries))
        + bytes(4)
    )
    pixels = bytes(range(48)) * 40
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8 + len(pixels)) + pixels + ifd


PICKLED = {  # before the end of data.pkl
    "os.system": b"cos\nsystem\n(S'true'\ntR0", "builtins.eval": b"c__builtin__\neval\n0",
    "an unknown class": b"cm\nName\n)\x810", "5,000 digits": b"I" + DIGITS.encode() + b"\n0",
    "a long of 2 GB": b"\x8b\xff\xff\xff\x7f", "a string of 2 GB": b"X\xff\xff\xff\x7f",
    "deep tuples": b")" + b"\x85" * 100_000 + b"0", "doubling tuples": b")" + b"2\x86" * 60 + b"0",
    "a list in itself": b"]2a0", "no such memo": b"h\xff", "an empty stack": b"000000", "a persistent id": b"S'x'\nQ0",
    "an extension": b"\x82\x01", "a huge memo": b"Nr\xff\xff\xff\x7f0", "a list as key": b"}]Ns0",
    "build on None": b"NNb0", "a surrogate": b"V\\ud800\n0", "a mark": b"(1",
    "reduce a list": b"ctorch\nFloatStorage\n]R0", "rebuild of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n)R0",
}  # fmt: skip
