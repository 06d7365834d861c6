"""Convert a model: to a diffusers pipeline folder, or to a single file in CompVis' layout.

  ldm convert sd-v1-5.ckpt models/sd15 --verify               # a single file to a folder
  ldm convert runs/demo demo.safetensors --verify             # a run or folder to a single file
  ldm convert kl-f8.ckpt models/kl-f8                         # an autoencoder alone
  ldm convert runs/lora lora.safetensors --lora-layout kohya  # a LoRA for kohya, ComfyUI, AUTOMATIC1111

SRC may be anything that `ldm inspect` opens. Every tensor is converted, or listed as one that is known
to be unused; any other is an error. Types are kept unless --dtype is given. Weights that are not finite
are refused, and so is a file that has changed since it was written with its folder. --verify reads the
result back, compares the hash of every tensor in both directions and one forward pass of each network;
if anything differs, nothing is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.console import Console
from ldm.cli.reading import add_reading, parts, reading
from ldm.config import ConfigError
from ldm.files.disk import resolved, whole

DTYPES = ("keep", "fp32", "fp16", "bf16")
LORA_LAYOUTS = ("diffusers", "kohya")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, target, and what to change on the way."""
    parser.add_argument("source", metavar="SRC", help="a run, a model folder, or a single file (.safetensors, .ckpt)")
    parser.add_argument("target", metavar="DST", help="a new folder, or a new file whose name ends in .safetensors")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare it with SRC")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="type of the weights written (default keep)")
    parser.add_argument(
        "--shard-size",
        type=float,
        metavar="GB",
        help="for a folder: split weight files above this size (default: never)",
    )
    parser.add_argument(
        "--openclip",
        action="store_true",
        help="for a single file of Stable Diffusion 2: write the text encoder under OpenCLIP's names",
    )
    parser.add_argument(
        "--lora-layout",
        choices=LORA_LAYOUTS,
        help="SRC is a LoRA: names to use in the new file (in float32 unless --dtype is given)",
    )
    parser.add_argument(
        "--lora-base",
        metavar="MODEL",
        help="the model that a LoRA was trained on (default: the one named by the run SRC)",
    )
    add_reading(parser)


def run(arguments: argparse.Namespace) -> None:
    """Check everything, convert, and print what became of each tensor."""
    target = Path(arguments.target)
    _check_target(target, arguments.shard_size, arguments.openclip)
    if arguments.lora_layout is not None:
        return _run_lora(arguments, target)
    if arguments.lora_base is not None:
        raise ConfigError("--lora-base is for a LoRA: give --lora-layout too")
    from ldm.files.tensors.archive import open_archive
    from ldm.interop.bundle import TEXT
    from ldm.interop.complete import check_complete
    from ldm.interop.convert import cast, coverage, write_model
    from ldm.interop.intact import check_intact
    from ldm.interop.open import read_any
    from ldm.pipeline.verify_conversion import verify

    console = Console()
    if Path(arguments.source).is_dir() and resolved(target).is_relative_to(resolved(arguments.source)):
        raise ConfigError(f"{target} lies inside {arguments.source}, the model itself: name a place outside it")
    source = read_any(arguments.source, **reading(arguments))
    if target.suffix != ".safetensors":  # a single file may hold part of a model; a folder must be able to draw
        check_complete(source, arguments.source)
    if TEXT in source.parts and not source.tokenizer and target.suffix != ".safetensors":
        raise ConfigError(
            f"{arguments.source} holds no tokenizer, and a model folder cannot draw without one: name a folder or"
            " a model of the hub that has it by --tokenizer (Stable Diffusion: openai/clip-vit-large-patch14)"
        )
    for name, part in source.parts.items():
        check_intact(part, name)
    for line in coverage(source):
        console.say(line)
    converted = cast(source, arguments.dtype)
    shard = None if arguments.shard_size is None else int(arguments.shard_size * 1e9)
    verified: list[str] = []
    with whole(target) as place:
        write_model(converted, place, shard, arguments.openclip)
        if arguments.verify:
            single = Path(arguments.source).is_file() and arguments.dtype == "keep" and not parts(arguments)
            verified = verify(converted, place, open_archive(arguments.source).tensors if single else None)
    for line in (f"written: {target}", *verified):
        console.say(line)


def _run_lora(arguments: argparse.Namespace, target: Path) -> None:
    """Convert a LoRA to another layout."""
    if target.suffix != ".safetensors" or arguments.shard_size is not None or arguments.openclip:
        raise ConfigError("--lora-layout writes one file: end DST in .safetensors, without --shard-size and --openclip")
    from ldm.pipeline.convert_lora import base_of, convert_lora, networks_of, verify_lora

    console, source = Console(), Path(arguments.source)
    networks = networks_of(base_of(source, arguments.lora_base), **reading(arguments))
    verified: list[str] = []
    with whole(target) as place:
        loras = convert_lora(source, place, arguments.lora_layout, arguments.dtype, networks)
        if arguments.verify:
            verified = [verify_lora(loras, place, networks)]
    for line in (f"written: {target}", *verified):
        console.say(line)


def _check_target(target: Path, shard_size: float | None, openclip: bool) -> None:
    """Raise ConfigError for a target that must not be written, or an option that does not fit it."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists already: name a new one, nothing is overwritten")
    if target.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ConfigError(f"{target}: pickled files are read, never written: end the name in .safetensors")
    if openclip and target.suffix != ".safetensors":
        raise ConfigError("--openclip is for a single file: a folder has transformers' names")
    if shard_size is not None and (not 0 < shard_size < float("inf") or target.suffix == ".safetensors"):
        raise ConfigError("--shard-size must be above 0 and is for folders: a single file is never split")
