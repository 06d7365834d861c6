"""Time and peak memory of opening a full-size Stable Diffusion 1.5 with random weights, beside diffusers.

    python benchmarks/opening.py [--what unet] [--rounds 5] [--folder /where/5/GB/fit]

The pipeline folder is written once and deleted afterwards (4.3 GB in float32). Every opening is a fresh
process, the two in turn, with a warm page cache and imports done before the clock starts. Memory is the
resident set above that before opening: its peak, and its anonymous part (without pages of the file, which
the system can drop). "open" ends with a module that can be called, "touched" after a sum over every
parameter.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ldm.interop.bundle import UNET
from ldm.interop.diffusers.folder import read_part, write_folder
from ldm.interop.diffusers.unet import unet_from_diffusers
from ldm.interop.weights import fill
from ldm.pipeline import Pipeline

COLUMNS = ("open, s", "open, peak MB", "open, anonymous MB", "touched, s", "touched, peak MB", "touched, anonymous MB")


def prepare(folder: Path) -> None:
    """Write a pipeline folder of random weights."""
    from stable_diffusion import random_bundle

    write_folder(random_bundle("sd1"), folder)


def ours(folder: Path, what: str) -> list[torch.nn.Module]:
    """Open as our pipeline does: modules built without memory, then given memory-mapped tensors."""
    if what == "pipeline":
        pipe = Pipeline.from_pretrained(folder, "cpu")
        assert pipe.codec and pipe.text
        return [pipe.unet, pipe.codec.autoencoder, pipe.text.model]
    part, _ = read_part(folder / UNET, UNET)
    return [fill(unet_from_diffusers(part.config).make, part)]


def theirs(folder: Path, what: str) -> list[torch.nn.Module]:
    """Open as diffusers does with the least memory."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    if what == "pipeline":
        pipe = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=True)
        return [pipe.unet, pipe.vae, pipe.text_encoder]
    return [UNet2DConditionModel.from_pretrained(folder / UNET, low_cpu_mem_usage=True)]


def memory(key: str) -> float:
    """An entry of the status of this process, in MB."""
    match = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) / 1024


def measure(who: str, folder: Path, what: str) -> tuple[float, ...]:
    """Measure COLUMNS; run in a fresh process."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401  # both processes import the same modules

    from ldm.models.text import TextEncoder  # noqa: F401

    torch.set_num_threads(1)
    open_ = {"ours": ours, "theirs": theirs}[who]
    rss, anonymous = memory("VmRSS"), memory("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    modules = open_(folder, what)
    opened = (time.perf_counter() - start, memory("VmHWM") - rss, memory("RssAnon") - anonymous)
    start = time.perf_counter()
    assert all(parameter.detach().sum(dtype=torch.float32).isfinite() for m in modules for parameter in m.parameters())
    return *opened, time.perf_counter() - start, memory("VmHWM") - rss, memory("RssAnon") - anonymous


def main() -> None:
    """Measure both in turn; print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("pipeline", "unet"), default="pipeline")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    arguments = parser.parse_args()
    measured: dict[str, list[tuple[float, ...]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(prepare, (Path(name),))
        for _ in range(arguments.rounds):
            for who, rows in measured.items():
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows.append(pool.apply(measure, (who, Path(name), arguments.what)))
    print(f"{arguments.what}, float32, {arguments.rounds} rounds, medians (lowest to highest)")
    print(f"{'':24}{'ours':>30}{'diffusers':>30}{'ours/theirs':>14}")
    for i, column in enumerate(COLUMNS):
        values = [[row[i] for row in rows] for rows in measured.values()]
        a, b = map(statistics.median, values)
        cells = [f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in values]
        print(f"{column:24}{cells[0]:>30}{cells[1]:>30}{a / b:>14.3f}")


if __name__ == "__main__":
    main()
