"""Arguments for opening models, among them the facts that a single file may not contain."""

from __future__ import annotations

import argparse
from typing import Any

HINTS = {  # facts about a single file that may be missing in it
    "prediction": (str, "what its U-Net predicts: eps, v or x0"),
    "groups": (int, "GroupNorm groups of its U-Net"),
    "vae_groups": (int, "GroupNorm groups of its autoencoder"),
    "scale": (float, "factor on its latents (the scaling factor, 0.18215 in Stable Diffusion)"),
    "image_size": (int, "side of its training images in pixels"),
    "text_heads": (int, "attention heads of its text encoder"),
    "text_layers": (int, "number of layers of its text encoder that are used"),
    "text_act": (str, "activation of its text encoder: quick_gelu or gelu"),
}
OPTIONS = ("variant", "weights", "tokenizer", "heads", *HINTS)
PARTS = ("vae", "text")


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that replace parts of a model."""
    parser.add_argument(
        "--vae", metavar="PATH", help="use the autoencoder of this run, folder or file instead of the model's own"
    )
    parser.add_argument(
        "--text",
        metavar="PATH_OR_NAME",
        help="use the text encoder and tokenizer of this run, folder or CLIP model of the hub instead",
    )


def parts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``add_parts`` that were given."""
    return {name: getattr(arguments, name) for name in PARTS if getattr(arguments, name) is not None}


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add all arguments for reading a model."""
    parser.add_argument(
        "--variant", metavar="NAME", help="of a folder's weight files: fp16, non_ema (default: the plain ones)"
    )
    add_parts(parser)
    single = parser.add_argument_group(
        "single files", "facts that such a file may not contain; an error asks for those that are needed"
    )
    single.add_argument("--weights", choices=("ema", "raw"), help="for a file with both (default: ema)")
    single.add_argument("--tokenizer", metavar="FOLDER_OR_NAME", help="its tokenizer: a folder, or a model of the hub")
    heads = "attention heads of its U-Net, one number for all levels or one for each"
    single.add_argument("--heads", type=int, nargs="+", metavar="N", help=heads)
    for name, (kind, text) in HINTS.items():
        metavar = {str: "NAME", int: "N", float: "X"}[kind]
        single.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``add_reading`` that were given."""
    given = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    if "heads" in given:
        given["heads"] = tuple(given["heads"])
    return given | parts(arguments)
