"""Draw images from a run, a model folder (ours or diffusers') or a single file that `ldm convert` wrote.

  ldm sample runs/demo --prompt "a small red circle on a white background" --count 4

Each PNG carries its settings (`ldm` in its metadata), from which `ldm reproduce` draws it again; grid-*.png shows all of
them. Settings left out are the model's own. Image i of a seed starts from the same noise at any batch size and number of
processes; started by `accelerate launch scripts/sample.py` or torchrun, each process draws its share.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.console import Console
from ldm.cli.reading import add_parts, parts
from ldm.config import CLASSIFIER_FORMS, GRIDS, SAMPLERS, VARIANCES, ConfigError, SampleConfig
from ldm.files.text import lines, read_text

GIVEN = (  # settings that the command line may replace
    "steps", "sampler", "guidance_scale", "eta", "negative_prompt", "seed", "guidance_rescale", "guidance_interval", "dynamic_threshold",
    "autoguidance", "autoguidance_scale", "classifier", "classifier_scale", "classifier_form", "grid", "variance", "lora",
)  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.distributed.processes import Processes
    from ldm.pipeline.provenance import Provenance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, prompts and sampling settings."""
    parser.add_argument("model", metavar="RUN_OR_FOLDER", help="a run of train-ldm, or a model folder")
    parser.add_argument("--variant", help="of a folder's weights: fp16, non_ema")
    add_parts(parser)
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    parser.add_argument("--prompts-file", help="a text file with one caption a line")
    parser.add_argument("--count", type=int, default=1, help="images per caption (default 1)")
    parser.add_argument("--size", type=int, help="side in pixels, a multiple of the autoencoder's factor")
    parser.add_argument("--steps", type=int, help="1 to the T of training, one network call each (heun and dpm2: two)")
    parser.add_argument("--sampler", help=f"one of {', '.join(SAMPLERS)}")
    parser.add_argument("--guidance-scale", type=float, help="1: the conditional model, more: closer to the caption")
    parser.add_argument("--grid", help=f"where the steps lie: one of {', '.join(GRIDS)} (docs/samplers.md)")
    parser.add_argument("--eta", type=float, help="noise of ddim: 0 none, 1 as much as ddpm")
    parser.add_argument("--variance", help=f"of ddpm's noise: one of {', '.join(VARIANCES)}")
    parser.add_argument("--negative-prompt", help="what to steer away from")
    parser.add_argument(
        "--guidance-rescale", type=float, help="0 to 1: how much of the deviation that guidance adds is taken back"
    )
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"), help="guide where LO ≤ σ = s/a ≤ HI alone"
    )
    parser.add_argument(
        "--dynamic-threshold", type=float, metavar="P", help="pixel models: clip x̂_0 at the quantile P of its size"
    )
    parser.add_argument("--autoguidance", metavar="RUN_OR_FOLDER", help="a weaker model to lean away from")
    parser.add_argument("--autoguidance-scale", type=float, help="1: not at all (default 2)")
    parser.add_argument(
        "--classifier", metavar="RUN", help="a run of train-classifier: prompts are captions of its classes"
    )
    parser.add_argument("--classifier-scale", type=float, metavar="W", help="0: not at all (default 1)")
    parser.add_argument(
        "--classifier-form", help=f"one of {', '.join(CLASSIFIER_FORMS)} (mean: with ddpm; default score)"
    )
    parser.add_argument(
        "--lora",
        action="append",
        metavar="PATH[:SCALE]",
        help="a LoRA file, folder or run on top of the model; may be given several times",
    )
    parser.add_argument("--seed", type=int, help="0 to 2^63 − 1")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="images computed together by one process (default 16)"
    )
    parser.add_argument("--out", default="images", help="folder for the PNGs (default images)")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 … (default: a GPU where there is one, each process its own)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Check everything, then load, draw and save."""
    given = {name: getattr(arguments, name) for name in GIVEN if getattr(arguments, name) is not None}
    if "guidance_interval" in given:
        given["guidance_interval"] = tuple(given["guidance_interval"])
    if "lora" in given:
        given["lora"] = tuple(given["lora"])
    SampleConfig(**given)  # ranges, before anything slow
    prompts = _prompts(arguments)
    from ldm.pipeline import Pipeline
    from ldm.pipeline.checks import check_drawable, check_guidance, check_sampling, check_start
    from ldm.pipeline.info import ModelInfo
    from ldm.pipeline.provenance import Provenance, other_hashes, part_hashes, surroundings

    try:
        info = ModelInfo.read(arguments.model, arguments.variant, **parts(arguments))
        if info.has_text and not info.bundle.tokenizer:
            raise ConfigError("it holds no tokenizer: give tokenizer, or name a text encoder that has one by --text")
    except ConfigError as error:
        if Path(arguments.model).is_file():  # there are more options than this command should have
            raise ConfigError(
                f"{arguments.model}: {error} (to `ldm convert {arguments.model} FOLDER`; then draw from the folder)"
            ) from None
        raise
    settings = dataclasses.replace(info.defaults, **given)
    size = info.sample_size if arguments.size is None else arguments.size
    check_sampling(settings, size, info.schedule.num_steps, info.factor)
    check_guidance(settings, info.autoencoder is not None)
    check_drawable(info.unet.config)
    check_start(info.schedule, info.target, settings)
    captioned = info.has_text or settings.classifier is not None
    if prompts and not captioned:
        raise ConfigError(
            "this model is unconditional: it draws without captions, leave --prompt and --prompts-file out"
        )
    if settings.classifier is not None:
        from ldm.interop.classifier import read_classifier

        classes = read_classifier(settings.classifier)[0]
        for prompt in prompts:
            classes.label(prompt)
    if not prompts:
        if captioned:
            raise ConfigError("--prompt or --prompts-file is needed: this model draws what a caption says")
        prompts = [""] * arguments.count
    console = Console()
    processes, device = devices(arguments.device)
    out = Path(arguments.out)
    first = processes.each(lambda: _first_number(out))[0]  # agreed, before anyone writes
    pipe = Pipeline.from_pretrained(arguments.model, device, variant=arguments.variant, **parts(arguments))
    pipe.check(settings, size)
    pipe.warn_cut(prompts, settings, stacklevel=1)
    work = {"images": len(prompts), "batch_size": arguments.batch_size, "processes": processes.count}
    origin = Provenance(
        tuple(prompts), None, settings, size, pipe.hash, arguments.model, arguments.variant, part_hashes(info), other_hashes(settings),
        {**surroundings(device), **work}, **parts(arguments),
    )  # fmt: skip
    images = processes.over(len(prompts), lambda mine: _draw(pipe, origin, mine, first, out, console))
    if processes.main and len(prompts) > 1:
        _save_grid(
            images,
            arguments.count if arguments.count > 1 else min(8, len(prompts)),
            origin,
            out / f"grid-{first:05d}.png",
        )
    console.say(f"{len(prompts)} image{'s' if len(prompts) > 1 else ''} in {arguments.out}/ from {first:05d}")


def _prompts(arguments: argparse.Namespace) -> list[str]:
    for name in ("count", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    prompts = list(arguments.prompt)
    if arguments.prompts_file is not None:
        try:
            captions = [line.strip() for line in lines(read_text(Path(arguments.prompts_file))) if line.strip()]
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--prompts-file {arguments.prompts_file}: cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        if not captions:
            raise ConfigError(f"--prompts-file {arguments.prompts_file} holds no caption")
        prompts += captions
    return [prompt for prompt in prompts for _ in range(arguments.count)]


def devices(name: str | None) -> tuple[Processes, torch.device]:
    """Who draws, and where this process does."""
    import torch

    from ldm.distributed.launch import launched

    count = int(os.environ.get("WORLD_SIZE", "1"))
    if name not in (None, "cpu") and count > 1:
        raise ConfigError(
            f"--device {name} with {count} processes: each takes the GPU of its number; leave it out, or say cpu"
        )
    try:
        if name is not None:
            torch.zeros(1, device=name).cpu()  # `meta` has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    processes, device = launched(cpu=name == "cpu")
    return processes, torch.device(name) if name is not None else device


def _first_number(out: Path) -> int:
    """The number after the highest in the folder, which is made where it is missing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be a folder: {error.strerror}") from None
    return 1 + max((int(m[1]) for f in out.glob("*.png") if (m := re.match(r"(?:grid-)?(\d+)", f.name))), default=-1)


def _draw(pipe: Any, whole: Provenance, mine: range, first: int, out: Path, console: Console) -> list[np.ndarray]:
    """Draw and save the images numbered ``mine``; returns them, uint8 [h, w, c]."""
    from ldm.data.transforms import to_pil, to_uint8
    from ldm.evaluation.figures.plots import write_png

    drawn: list[np.ndarray] = []
    prompts, batch_size = whole.prompts, whole.drawn["batch_size"]
    for images in pipe.sample(
        [prompts[i] for i in mine], whole.settings, size=whole.size, batch_size=batch_size, indices=mine
    ):
        arrays = to_uint8(images)
        for picture, i in zip(to_pil(arrays), mine[len(drawn) :], strict=False):
            origin = dataclasses.replace(whole, prompts=(prompts[i],), index=i)
            write_png(picture, out / f"{first + i:05d}-{_slug(prompts[i])}.png", origin.png())
        drawn += list(arrays)
        console.progress(len(drawn), len(mine), {})
    return drawn


def _save_grid(images: list[np.ndarray], columns: int, origin: Provenance, file: Path) -> None:
    import numpy as np
    from PIL import Image

    from ldm.data.transforms import grid
    from ldm.evaluation.figures.plots import write_png

    write_png(Image.fromarray(grid(np.stack(images), columns)), file, origin.png())


def _slug(text: str) -> str:
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60] or "empty"
