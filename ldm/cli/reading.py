"""Arguments of the commands that open other people's files: what a single file does not say of itself."""

from __future__ import annotations

import argparse
from typing import Any

HINTS = {  # of a single file that does not say it
    "prediction": (str, "what its U-Net predicts: eps, v or x0"),
    "groups": (int, "GroupNorm groups of its U-Net"),
    "vae_groups": (int, "GroupNorm groups of its autoencoder"),
    "scale": (float, "factor on its autoencoder's latents"),
    "image_size": (int, "side of its training images in pixels"),
    "text_heads": (int, "attention heads of its text encoder"),
    "text_layers": (int, "layers of its text encoder that are used"),
    "text_act": (str, "activation of its text encoder: quick_gelu or gelu"),
}
OPTIONS = ("variant", "weights", "tokenizer", "heads", *HINTS)


PARTS = ("vae", "text")


def add_parts(parser: argparse.ArgumentParser) -> None:
    """The arguments that name parts of a model which lie elsewhere."""
    parser.add_argument(
        "--vae", metavar="PATH", help="a run, folder or file whose autoencoder is taken in the place of the model's own"
    )
    parser.add_argument(
        "--text", metavar="PATH_OR_NAME", help="the same of the text encoder with its tokenizer; also a CLIP of the hub"
    )


def parts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    return {name: getattr(arguments, name) for name in PARTS if getattr(arguments, name) is not None}


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("--variant", help="of a folder's weights: fp16, non_ema")
    add_parts(parser)
    single = parser.add_argument_group(
        "single files", "what such a file may not say of itself; asked for where it is needed"
    )
    single.add_argument("--weights", choices=("ema", "raw"), help="of a file with both (default: ema where they are)")
    single.add_argument(
        "--tokenizer", metavar="FOLDER_OR_NAME", help="a folder, or a model of the hub, whose tokenizer it has"
    )
    single.add_argument(
        "--heads",
        type=int,
        nargs="+",
        metavar="N",
        help="attention heads of its U-Net, one number or one for each level",
    )
    for name, (kind, text) in HINTS.items():
        single.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    given = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    if "heads" in given:
        given["heads"] = tuple(given["heads"])
    return given | parts(arguments)
