"""Decoding in strips beside decoding whole: peak memory, seconds and largest difference, of random weights.

    python benchmarks/strips.py [--sizes 512 1024] [--rows 16]

The autoencoder has the sizes of Stable Diffusion's. Each decode is a process of its own; its memory is the peak of what
is resident, less that of a process that only makes the weights and the latent. Prints a table in markdown.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from autoencoder.config import AutoencoderConfig
from autoencoder.model import AutoencoderKL
from autoencoder.strips import decode_in_strips

FACTOR = 8
WAYS = ("none", "whole", "strips")


@torch.no_grad()
def decode(way: str, size: int, rows: int) -> dict[str, Any]:
    """Decode one latent of a picture of side ``size``; returns MiB, seconds and the pixels of a coarse grid."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(AutoencoderConfig(channels=(128, 256, 512, 512))).eval().requires_grad_(False)
    latent, started = torch.randn(1, 4, size // FACTOR, size // FACTOR), time.monotonic()
    image = latent
    if way == "whole":
        image = autoencoder.decode(latent)
    elif way == "strips":
        image = decode_in_strips(autoencoder, latent, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"MiB": peak, "seconds": time.monotonic() - started, "pixels": image[0, 0, ::7, ::7].flatten().tolist()}


def apart(way: str, size: int, rows: int) -> dict[str, Any]:
    """``decode`` in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--sizes", str(size), "--rows", str(rows)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(sizes: Sequence[int], rows: int) -> str:
    """A row for each size."""
    titles = ("side", "whole, MiB", "strips, MiB", "ratio", "seconds, whole", "strips", "largest difference")
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join(['---'] * len(titles))} |"]
    for size in sizes:
        found = {way: apart(way, size, rows) for way in WAYS}
        whole, strips = (found[way]["MiB"] - found["none"]["MiB"] for way in WAYS[1:])
        pairs = zip(found["whole"]["pixels"], found["strips"]["pixels"], strict=True)
        seconds = f"{found['whole']['seconds']:.1f} | {found['strips']['seconds']:.1f}"
        difference = max(abs(a - b) for a, b in pairs)
        lines.append(f"| {size} | {whole:.0f} | {strips:.0f} | {strips / whole:.2f} | {seconds} | {difference:.1e} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides in pixels (default 512 1024)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a strip (default 16)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.way:
        print(json.dumps(decode(asked.way, asked.sizes[0], asked.rows)))
    else:
        print(table(asked.sizes, asked.rows))


if __name__ == "__main__":
    main()
