"""Draw an image of `ldm sample` again from the metadata of its PNG, and compare the pixels.

  ldm reproduce images/00000-a-small-red-circle.png

A grid works as well. The model is looked for under the path given when the image was drawn (if that was
relative, run this in the same folder), or under --model; it must have the hash in the PNG. So must the
LoRAs, guides and images that it started from, whose new places are given by --moved OLD=NEW.

exit codes: 0 identical or within 1 of 255 (the difference is printed), 1 the pixels differ by more,
2 not an image of `ldm sample`, 4 the model, a LoRA, a guide or an image is missing or has changed
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.console import Console
from ldm.cli.reading import add_parts, parts
from ldm.cli.target import check_target
from ldm.config import ConfigError
from ldm.files.disk import resolved

if TYPE_CHECKING:
    import torch

    from ldm.pipeline.provenance import Provenance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The image, and where its model is if it has moved."""
    parser.add_argument("image", metavar="IMAGE.png", help="a PNG that `ldm sample` wrote")
    parser.add_argument(
        "--model", metavar="RUN_OR_FOLDER", help="where the model is now (default: the path in the PNG)"
    )
    parser.add_argument(
        "--moved",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="where a LoRA, guide or image is now: OLD is its path in the PNG; may be given several times",
    )
    add_parts(parser)
    parser.add_argument("--out", metavar="FILE", help="save the new image as this PNG")
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: the kind used for the image, if there is one)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read, check, draw and compare; returns the exit code."""
    file, out = Path(arguments.image), None if arguments.out is None else Path(arguments.out)
    if out is not None and (out.is_dir() or not out.parent.is_dir() or resolved(out) == resolved(file)):
        raise ConfigError(f"--out {out} must be a file in an existing folder, and not the image itself")
    if out is not None:
        check_target(out, lambda content: False)
    from PIL import Image

    from ldm.evaluation.figures.plots import write_png
    from ldm.pipeline import Pipeline
    from ldm.pipeline.info import ModelInfo
    from ldm.pipeline.provenance import read_provenance, surroundings
    from ldm.pipeline.reproduce import PROMISED, check_model, deviation, elsewhere, redraw, relocated

    origin, pixels = read_provenance(file)
    if moved := dict(_moved(pair) for pair in arguments.moved):
        origin = relocated(origin, moved)
    path = arguments.model or origin.path
    if path is None:
        raise ConfigError(f"{file} does not say where its model (sha256 {origin.model[:12]}) is: name it with --model")
    device = _device(arguments.device, origin)
    given = origin.given | parts(arguments)
    info = ModelInfo.read(path, origin.variant, **given)
    pipe = Pipeline.from_pretrained(path, device, variant=origin.variant, **given)
    check_model(origin, pipe, info, file)
    drawn = redraw(pipe, origin, pixels.shape[1], together=origin.index is None)
    try:
        if origin.index is not None and any(deviation(pixels, drawn)):
            drawn = redraw(pipe, origin, pixels.shape[1], together=True)  # a batch may sum in another order
        count, most = deviation(pixels, drawn)
        total = pixels.shape[0] * pixels.shape[1]
        result = f"{count:,} of {total:,} pixels differ, by at most {most} of 255" if count else "identical"
    except ValueError as error:  # other sizes or channels
        result, most = str(error), 256
    here = surroundings(device)
    if out is not None:
        write_png(Image.fromarray(drawn), out, dataclasses.replace(origin, drawn={**origin.drawn, **here}).png())
    console = Console()
    within = " (within what is promised)" if 0 < most <= PROMISED else ""
    console.say(f"{file}: {result}{within}; model {origin.model[:12]} of {path}")
    for line in elsewhere(origin, here):
        console.say(f"  {line}")
    return int(most > PROMISED)


def _moved(pair: str) -> tuple[str, str]:
    old, separator, new = pair.partition("=")
    if not (old and separator and new):
        raise ConfigError(f"--moved must be OLD=NEW, got {pair!r}")
    return old, new


def _device(name: str | None, origin: Provenance) -> torch.device:
    """The device that was asked for, else one of the kind that the image was drawn on."""
    from ldm.cli.sample import devices

    return devices(name or ("cpu" if origin.drawn.get("device") == "cpu" else None))[1]
