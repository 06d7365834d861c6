"""Describe a model: a run, a model folder (ours or diffusers'), an autoencoder or a single file.

  ldm inspect runs/demo
  ldm inspect sd-v1-5.ckpt --json
  ldm inspect runs/demo --verify

Prints sizes, attention heads, prediction target, noise schedule, latent scale, types, and a sha256 of
each part that is the same in every layout. Weights stay on disk: they are read piece by piece for their
hashes, and not at all with --no-hashes. Tensors that hold NaN or infinity are named. --verify fails
(exit code 4) at such a tensor, and at a file that has changed since it was written with its folder:
every file is hashed and compared with ldm.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ldm.cli.console import Console
from ldm.cli.reading import add_reading, reading
from ldm.config import ConfigError

TITLES = {"unet": "U-Net", "vae": "autoencoder", "text_encoder": "text encoder", "process": "process"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, how to read it, and what to check."""
    parser.add_argument(
        "model", metavar="FILE_OR_FOLDER", help="a run, a model folder, or a single file (.safetensors, .ckpt)"
    )
    add_reading(parser)
    parser.add_argument("--no-hashes", action="store_true", help="do not read the weights: print no hashes")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="fail if a weight is not finite, or a file has changed since it was written",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Read the headers, hash the weights, and print."""
    if arguments.verify and arguments.no_hashes:
        raise ConfigError("--verify reads the weights and --no-hashes does not: leave one of them out")
    from ldm.interop.complete import OPTIONS, lacking
    from ldm.interop.describe import describe
    from ldm.interop.intact import check_finite, check_hashes
    from ldm.interop.open import read_any

    bundle = read_any(arguments.model, **reading(arguments))
    console = Console()
    if arguments.verify:
        for name, part in bundle.parts.items():
            check_finite(part, TITLES[name])
            check_hashes(part, anew=True)
    about = {"layout": bundle.layout, **describe(bundle, not arguments.no_hashes)}
    if missing := lacking(bundle):
        about["lacks"] = {TITLES[name]: f"{sign}: give --{OPTIONS[name]}" for name, sign in missing.items()}
    if arguments.verify:
        about["verified"] = {
            "finite": list(bundle.parts),
            "unchanged": [name for name, part in bundle.parts.items() if part.sha256],
        }
    if arguments.json:
        console.say(json.dumps(about, indent=2, ensure_ascii=False))
        return
    console.say(f"{arguments.model}: {about.pop('layout')}")
    for name, facts in about.items():
        console.say("\n".join(_lines(TITLES.get(name, name), facts)))


def _lines(title: str, facts: Any) -> list[str]:
    """A title, then one line for each fact."""
    if not isinstance(facts, Mapping):
        return [f"  {title:14s} {_value(facts)}"]
    return [f"  {title}", *(f"    {name.replace('_', ' '):20s} {_value(value, name)}" for name, value in facts.items())]


def _value(value: Any, name: str = "") -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    if name == "parameters":
        return f"{value:,} ({value / 1e6:.2f} M)"
    if name == "bytes":
        return f"{value:,} ({value / 1e9:.2f} GB)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
