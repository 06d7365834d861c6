"""Write a model in another layout: a diffusers pipeline folder, or a single file as CompVis' code and many tools read it.

  ldm convert sd-v1-5.ckpt models/sd15 --verify            # a single file to a folder
  ldm convert runs/demo demo.safetensors --verify          # a run or folder to a single file
  ldm convert kl-f8.ckpt models/kl-f8                      # an autoencoder alone
  ldm convert runs/lora lora.safetensors --lora-layout kohya   # a LoRA for kohya's scripts, ComfyUI, AUTOMATIC1111

SRC is opened as by `ldm inspect`. Every tensor is used, or known to be carried besides and named; anything else is an error.
Types are kept unless --dtype says otherwise. A weight that is not finite, and a file that has changed since it was written with
its folder, are refused. --verify reads what was written, compares the hash of every tensor, there and
back again, and one forward pass of each network; where they differ, nothing is left.
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
    """From where, to where."""
    parser.add_argument("source", metavar="SRC", help="a run, a model folder, or a single file (.safetensors, .ckpt)")
    parser.add_argument("target", metavar="DST", help="a new folder, or a new file that ends in .safetensors")
    parser.add_argument("--verify", action="store_true", help="compare what was written with what was read")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the weights (default keep)")
    parser.add_argument(
        "--shard-size", type=float, metavar="GB", help="split the files of a folder's weights above this size"
    )
    parser.add_argument(
        "--openclip",
        action="store_true",
        help="a single file of Stable Diffusion 2: the text encoder in OpenCLIP's names",
    )
    parser.add_argument(
        "--lora-layout",
        choices=LORA_LAYOUTS,
        help="SRC is a LoRA: the names in the new file (float32 unless --dtype says another)",
    )
    parser.add_argument(
        "--lora-base", metavar="MODEL", help="the model that a LoRA changes, where SRC is not a run, which knows it"
    )
    add_reading(parser)


def run(arguments: argparse.Namespace) -> None:
    """Check everything, convert, and say what became of each tensor."""
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
        raise ConfigError(f"{target} lies inside {arguments.source}, which it would add to: name a place beside it")
    source = read_any(arguments.source, **reading(arguments))
    if target.suffix != ".safetensors":  # a single file may hold a part of a model, a folder is drawn from
        check_complete(source, arguments.source)
    if TEXT in source.parts and not source.tokenizer and target.suffix != ".safetensors":
        raise ConfigError(
            f"{arguments.source} holds no tokenizer, without which a folder draws nothing: give --tokenizer, a folder that has it or"
            " a name of the hub (Stable Diffusion: openai/clip-vit-large-patch14)"
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
    """A LoRA into another layout."""
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
    """Raise ConfigError where nothing should be written."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists already: name a new place, nothing is overwritten")
    if target.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ConfigError(f"{target}: pickled files are read, never written: end the name in .safetensors")
    if openclip and target.suffix != ".safetensors":
        raise ConfigError("--openclip is for a single file: a folder has transformers' names")
    if shard_size is not None and (not 0 < shard_size < float("inf") or target.suffix == ".safetensors"):
        raise ConfigError("--shard-size must be above 0, and is for folders: a single file is one file")
