"""What `make fuzz` feeds the commands: for each kind of input a function that damages a small example.

A kind is called in a folder with a fresh copy of the examples, changes files there, and returns the call to make.
"""

from __future__ import annotations

import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz_examples import COMMANDS, DRAW, HINTS, LOOKS, NETWORKS, RESUME, TRAINING, Call, reader
from fuzz_oddities import (
    DIGITS,
    ODD,
    ODD_TEXT,
    PICKLED,
    WORDS,
    chunks,
    damaged,
    header,
    misplaced,
    odd_chunks,
    oddly,
    png,
    tiff,
    upset,
    written,
)
from PIL import Image

from ldm.cli.main import parser

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
    out = "out" if argv[0] not in TRAINING else "out/model"  # a run's status says why it failed
    return Call(f"{argv}", argv, (2, 3, 4), out=(out,), encoding=draw.choice(("utf-8", "utf-8", "ascii", "latin-1")))


def config(draw: random.Random) -> Call:
    """A configuration file and its overrides."""
    name = draw.choice(list(NETWORKS))
    argv, file = [f"train-{name}", f"configs/{name}.yaml", "run=new"], Path(f"configs/{name}.yaml")
    tree = yaml.safe_load(file.read_text())
    if draw.random() < 0.3:
        keys = [key for key, value in tree.items() if not isinstance(value, dict)]
        keys += [f"{key}.{inner}" for key, value in tree.items() if isinstance(value, dict) for inner in value]
        odd = draw.choice([*WORDS, "[", "{", "[1,2", "*a", "${x}", "!!python/name:os.system", "null"])
        return Call(f"{odd[:40]}", [*argv, f"{draw.choice(keys)}={odd}"], (2, 3, 4, 5), out=("new/model",))
    if draw.random() < 0.1:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
        return Call("a byte order mark and CRLF", argv, (), same=True, out=())
    return Call(upset(draw, file), argv, (2, 3, 4, 5), out=("new/model",))


def folder(draw: random.Random) -> Call:
    """The JSON files and tokenizers of a model folder."""
    argv = reader(draw, "run/model")
    if draw.random() < 0.5:
        Path("run/model/ldm.json").unlink()
    file = draw.choice(sorted(p for p in Path("run/model").rglob("*") if p.suffix in (".json", ".txt")))
    if draw.random() < 0.1 and file.suffix == ".json" and "tokenizer" not in str(file):
        file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items())), indent=7))
        return Call(
            f"{file}: keys in another order", argv, (), same=argv[0] == "sample" and Path("run/model/ldm.json").exists()
        )
    return Call(upset(draw, file), argv, (2, 4))


def tensors(draw: random.Random) -> Call:
    """Bytes of safetensors files, in a folder and alone."""
    inside = draw.choice(sorted(Path("run/model").rglob("*.safetensors")))
    file, model = draw.choice([(Path("model.safetensors"), "model.safetensors"), (inside, "run/model")])
    argv, content = reader(draw, model), file.read_bytes()
    if draw.random() < 0.1 and file != inside:
        length = struct.unpack("<Q", content[:8])[0]
        file.write_bytes(struct.pack("<Q", length + 64) + content[8 : 8 + length] + b" " * 64 + content[8 + length :])
        return Call("blanks behind the header", argv, (), same=True)
    words, changed = header(draw, content) if draw.random() < 0.6 else damaged(draw, content)
    file.write_bytes(changed)
    drawn = argv[0] == "sample" and file == inside and changed != content  # it has a hash
    infinite = argv[0] in ("sample", "convert") and "not finite" in words
    return Call(f"{file}: {words}", argv, (2, 4, 5), refused=drawn or infinite)


def pickle(draw: random.Random) -> Call:
    """Archives of torch."""
    alone = [["inspect", "model.ckpt", *HINTS], ["convert", "model.ckpt", "out", *HINTS]]
    in_folder = Path("pickled/unet/diffusion_pytorch_model.bin")
    source, argv = draw.choice(((Path("model.ckpt"), draw.choice(alone)), (in_folder, reader(draw, "pickled"))))
    if draw.random() < 0.25:
        words, content = damaged(draw, source.read_bytes())
        source.write_bytes(content)
        return Call(f"{source}: {words}", argv, (2, 4, 5))
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
    return Call(f"{source}: {words}", argv, (2, 4, 5))


def image(draw: random.Random) -> Call:
    """Headers and bodies of images, and what stands beside the pixels."""
    mode = draw.choice(("RGB", "RGB", "L", "RGBA", "P", "1", "LA", "I;16"))
    ending = draw.choice(("png", "png", "png", "jpg", "jpg", "gif", "bmp", "tif", "webp"))
    file, original = Path(f"images/odd.{ending}"), Image.open("images/3.png")
    exif: dict[str, Any] = {"exif": b"Exif\0\0" + tiff(draw)} if ending == "jpg" else {}
    original.convert(mode if ending == "png" else "RGB").save(file, **exif)
    words, content = f"{ending} {mode}", tiff(draw) if ending == "tif" else file.read_bytes()
    if ending == "png":
        parts = chunks(content)
        words, content = f"{words}: {odd_chunks(draw, parts)}", png(parts)
    if draw.random() < 0.5:
        more, content = damaged(draw, content)
        words += f", {more}"
    file.write_bytes(content)
    with Path("images/metadata.jsonl").open("a") as stream:
        stream.write(json.dumps({"file_name": file.name, "text": "a photo"}) + "\n")
    words = misplaced(draw, file) if draw.random() < 0.1 else words
    return Call(
        words,
        draw.choice((["init", "images", "--out", "out"], ["cache-latents", "configs/ldm.yaml", "run=new"])),
        (2, 3),
    )


def rows(draw: random.Random) -> Call:
    """Metadata in JSON lines and CSV, captions beside the images, names of folders."""
    way, table = draw.choice(("jsonl", "jsonl", "csv", "csv", "sidecar", "class")), Path("images/metadata.jsonl")
    parsed = [json.loads(line) for line in table.read_text().splitlines()]
    table.unlink()
    if way == "jsonl":
        words, file = oddly(draw, parsed), table
        file.write_bytes(b"".join(written(row).replace(b"\n", b"") + b"\n" for row in parsed))
    elif way == "csv":
        head = draw.choice(("file_name,text", "file_name,text,text", "text", "", "file_name,text,", '"file_name,text'))
        parsed[5]["text"] = draw.choice(
            ('"', "a,b", '"a""b"', "\0", "x" * 200_000, "", "=1+1", '"a\nb"', "a\u2028b", DIGITS)
        )
        words, file = f"{head!r} {parsed[5]['text'][:20]!r}", Path("images/metadata.csv")
        file.write_text("\n".join([head, *(f"{row['file_name']},{row['text']}" for row in parsed), ""]))
    else:
        words, file = way, Path("images/3.txt")
        names = draw.sample(("red", "blue", "n" * 200, "a\nb", "caf\udce9", " ", "é", "e\u0301"), 2)
        for image_file, text in ((Path("images") / row["file_name"], row["text"]) for row in parsed):
            image_file.with_suffix(".txt").write_text(text)
            if way == "class":
                (target := Path("images") / draw.choice(names)).mkdir(exist_ok=True)
                image_file.rename(target / image_file.name)
    words += f"; {upset(draw, file)}" if way == "sidecar" or draw.random() < 0.4 else ""
    argv = [
        "cache-latents",
        "configs/ldm.yaml",
        "run=new",
        f"data.captions={way if way in ('sidecar', 'class') else 'metadata'}",
    ]
    return Call(f"{way}: {words}", draw.choice((argv, ["init", "images", "--out", "out"])), (2, 3))


def prompts(draw: random.Random) -> Call:
    """Files of prompts."""
    file, argv = Path("prompts.txt"), ["sample", "run", "--steps", "2", "--prompts-file", "prompts.txt", "--out", "out"]
    content, way = file.read_bytes(), draw.random()
    if way < 0.3:
        same = (b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), b"\n" + content + b"\n \n", content[:-1])
        file.write_bytes(draw.choice(same))
        return Call(f"{file.read_bytes()!r}", argv, (), same=True)
    if way < 0.6:
        odd = draw.choice(ODD_TEXT)
        file.write_bytes(f"a photo{odd}of\n".encode("utf-8", "surrogatepass"))
        return Call(f"a prompt with {odd[:9]!r}", argv, (2,))
    return Call(upset(draw, file), argv, (2,))


def lora(draw: random.Random) -> Call:
    """LoRA files, and folders that hold one."""
    argv = ["sample", "run", *DRAW, "--lora", "adapter/model"]
    if draw.random() < 0.3:
        argv = draw.choice(
            (["sample", "adapter", *DRAW], ["inspect", "adapter/model/pytorch_lora_weights.safetensors"])
        )
    file = draw.choice(sorted(p for p in Path("adapter/model").rglob("*") if p.is_file()))
    if file.suffix != ".safetensors":
        return Call(upset(draw, file), argv, (2, 4, 5))
    if draw.random() < 0.3:
        settings = {
            "r": 2,
            "lora_alpha": 2,
            "target_modules": ["to_q"],
            "peft_type": "LORA",
            "use_dora": False,
            "bias": "none",
        }
        file.rename(file := file.with_name("adapter_model.safetensors"))
        words = oddly(draw, settings)
        file.with_name("adapter_config.json").write_bytes(written(settings))
        return Call(f"adapter_config.json: {words}", ["sample", "run", *DRAW, "--lora", "adapter/model"], (2, 4))
    words, content = header(draw, file.read_bytes()) if draw.random() < 0.7 else damaged(draw, file.read_bytes())
    file.write_bytes(content)
    return Call(f"{file}: {words}", argv, (2, 4, 5), refused="not finite" in words and argv[0] == "sample")


def latents(draw: random.Random) -> Call:
    """The latent cache that a training continues with."""
    file = draw.choice(sorted(Path("run/latents").iterdir()))
    if file.suffix == ".safetensors" and draw.random() < 0.6:
        words, content = header(draw, file.read_bytes())
        file.write_bytes(content)
    else:
        words = upset(draw, file, text=file.suffix == ".json")
    return Call(f"{file}: {words}", RESUME, (2, 3, 4), same=True, out=())


def run(draw: random.Random) -> Call:
    """What a run directory holds, checkpoints included."""
    files = sorted(
        p
        for p in Path("run").rglob("*")
        if p.is_file() and not {"model", "latents"} & set(p.parts) and p.name != ".lock"
    )
    file = draw.choice([*files, *(p for p in files if p.suffix in (".json", ".jsonl", ".yaml"))])
    words = upset(draw, file, text=file.suffix not in (".safetensors", ".png"))
    argv = draw.choice(LOOKS)
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
    **dict.fromkeys(("guidance_scale", "eta", "guidance_rescale", "dynamic_threshold"), NUMBER),
    **dict.fromkeys(("autoguidance_scale", "classifier_scale"), NUMBER),
    **dict.fromkeys(("sampler", "negative_prompt", "classifier_form", "grid", "variance"), (str, Path)),
    **dict.fromkeys(("classifier", "autoguidance"), (str, Path)),
    **dict.fromkeys(("prompts", "lora"), (str, list, tuple, range, set, np.ndarray, Iterator)), "callback": Callable,
    "end_clean": bool, "guidance_interval": (tuple, list, set, range, np.ndarray, torch.Tensor),
}  # fmt: skip
OPENING = ("path", "device", "dtype", "variant", "tokenizer", "heads", "prediction", "groups", "scale")


def disk(draw: random.Random) -> Call:
    """A disk that takes no more after some bytes."""
    argv = list(draw.choice(COMMANDS))
    size = draw.choice((0, 100, 4000, 30_000, 200_000))
    out = (
        ("out", "out.safetensors") if argv[0] in ("init", "convert", "reproduce", "report") else ()
    )  # whole or not at all
    return Call(f"room for {size} bytes in a file", argv, (2, 3, 4), disk=size, out=out)


@cache
def pipeline() -> Any:
    """The example as the library opens it."""
    from ldm.pipeline import Pipeline

    return Pipeline.from_pretrained("run", "cpu")


def python(draw: random.Random) -> Call:
    """Arguments of the library's calls."""
    odd = [
        *(value for value in ODD if not (isinstance(value, str) and value.startswith("@"))), b"x", 1.5, 2.0, 1j,
        10**400, np.int64(2), np.float32(0.5), np.array([1, 2]), torch.tensor(2), torch.zeros(2, 2), Path("run"),
        object, {1, 2}, range(3), (v for v in "ab"), (1,), (0.1, 0.5, 2.0), (5.0, 0.1), ("0", "1"), ["x", 2],
        ["a", ["b"]], [""], "caf\udce9", "a " * 5000, "run:2", ("adapter/model",), ["adapter/model:x"],
    ]  # fmt: skip
    name, value = draw.choice([*TYPES, *OPENING, "prompts", "no_such"]), draw.choice(odd)
    words = f"{name}={str(value)[:60]!r} ({type(value).__name__})"
    if name in OPENING:
        opened = {"path": "run", name: value}
        return Call(
            f"from_pretrained {words}",
            ["python"],
            (2, 4),
            python=lambda: type(pipeline()).from_pretrained(**opened) and [],
        )
    right = value is None or (
        isinstance(value, TYPES.get(name, ())) and isinstance(value, bool) == (name == "end_clean")
    )
    arguments = {"prompts": ["a photo"], "steps": 2, name: value}
    return Call(words, ["python"], (2, 4), not right, names=name, python=lambda: pipeline()(**arguments))


KINDS: dict[str, Callable[[random.Random], Call]] = {
    f.__name__: f
    for f in (
        command, config, folder, tensors, pickle, image, rows, prompts, lora, latents, run, picture, disk, python,
    )
}  # fmt: skip
