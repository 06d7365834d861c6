"""Find the noise of an image by DDIM inversion, and measure how well DDIM returns from it.

  ldm invert runs/demo --image start.png --prompt "a small red circle on a white background"

Prints the PSNR of what the autoencoder alone makes of the image, and of the way to noise and back under the
same caption, without guidance; writes a picture of them. More steps bring the way back closer to the
autoencoder. To change the image from there: `ldm sample --image FILE --invert --source-prompt … --prompt …`.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from pathlib import Path

from ldm.cli.console import Console
from ldm.cli.reading import add_parts, parts
from ldm.cli.target import check_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, image, caption, steps and the output file."""
    from ldm.cli.sample import size_of

    parser.add_argument("model", metavar="RUN_OR_FOLDER", help="a run of train-ldm, a model folder or a single file")
    parser.add_argument("--image", metavar="FILE", required=True, help="the picture")
    parser.add_argument("--prompt", default="", help="its caption (default: none)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps each way (default 50)")
    parser.add_argument("--size", type=size_of, metavar="PIXELS", help="side of the picture, or HEIGHTxWIDTH")
    parser.add_argument("--variant", metavar="NAME", help="of a folder's weight files: fp16, non_ema")
    add_parts(parser)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument(
        "--out", metavar="FILE", default="inversion.png", help="the picture: .png, .pdf or .svg (default inversion.png)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Invert, draw, compare, write."""
    from ldm.evaluation.figures.plots import SUFFIXES, captioned, is_figure

    out = Path(arguments.out)
    check_target(out, is_figure, SUFFIXES)
    import torch

    from autoencoder.metrics import psnr
    from ldm.cli.sample import devices
    from ldm.config import SampleConfig
    from ldm.data.transforms import to_uint8
    from ldm.pipeline import Pipeline
    from ldm.pipeline.checks import sides_of
    from ldm.pipeline.given import read_given

    device = devices(arguments.device)[1]
    pipe = Pipeline.from_pretrained(arguments.model, device, variant=arguments.variant, **parts(arguments))
    sides = sides_of(arguments.size, pipe.sample_size)
    given = read_given(arguments.image, None, sides, pipe.image_channels, 1)
    assert given is not None
    plain = SampleConfig(sampler="ddim", steps=arguments.steps, guidance_scale=1.0, strength=0.0)
    there = dataclasses.replace(plain, strength=1.0, invert=True, source_prompt=arguments.prompt)
    ways = {"autoencoder": plain} if pipe.codec else {}
    ways[f"{arguments.steps} steps to noise and back"] = there
    images, names, console = [given.images], ["image"], Console()
    for what, settings in ways.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reading the image has said that it is cut
            (image,) = pipe.sample([arguments.prompt], settings, size=sides, image=arguments.image)
        images.append(image.cpu().clamp(-1, 1))
        names.append(f"{what}: {float(psnr(given.images, images[-1])):.2f} dB")
        console.say(names[-1])
    captioned(to_uint8(torch.cat(images)), names, out, columns=len(images))
    console.say(f"picture: {out}")
