"""Draw images from a run, a model folder (ours or diffusers') or a single file that `ldm convert` wrote.

  ldm sample runs/demo --prompt "a small red circle on a white background" --count 4
  ldm sample runs/demo --prompts-file captions.txt --sampler ddim --steps 50 --seed 7
  ldm sample runs/demo --image start.png --strength 0.6 --prompt "a small red star on a white background"
  ldm sample runs/demo --image start.png --mask hole.png --prompt "a small red star on a white background"
  ldm sample runs/digits-class --value "digit=[0,1,2,3]" --count 4
  ldm sample runs/demo --size 32x128 --window 32 --circular x --prompt "a large blue square on a gray background"

Settings left out are the model's own. Each PNG carries all of them in its metadata (key `ldm`), from
which `ldm reproduce` draws it again; grid-*.png shows all images of a call. Image i of a seed starts
from the same noise at any batch size and number of processes: under `accelerate launch
scripts/sample.py` or torchrun each process draws its share.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.console import Console
from ldm.cli.reading import add_parts, parts
from ldm.config import (
    CIRCULAR,
    CLASSIFIER_FORMS,
    COMPLETIONS,
    GRIDS,
    SAMPLERS,
    STRENGTHS,
    VARIANCES,
    ConfigError,
    SampleConfig,
)
from ldm.files.text import lines, read_text

SETTINGS = (  # of a SampleConfig, that an option of the same name replaces
    "steps", "sampler", "grid", "eta", "variance", "seed", "negative_prompt", "dynamic_threshold", "lora",
    "guidance_scale", "guidance_alone", "guidance_rescale", "guidance_interval", "autoguidance", "autoguidance_scale",
    "classifier", "classifier_scale", "classifier_form",
    "strength", "strength_by", "extend", "invert", "source_prompt", "completion", "repaint_jump", "repaint_repeats",
    "paste", "window", "window_stride", "circular", "strips",
)  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.distributed.processes import Processes
    from ldm.pipeline.info import ModelInfo
    from ldm.pipeline.provenance import Provenance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, prompts, sampling settings, and where to draw and write."""
    parser.add_argument("model", metavar="RUN_OR_FOLDER", help="a run of train-ldm, a model folder or a single file")
    parser.add_argument(
        "--variant", metavar="NAME", help="of a folder's weight files: fp16, non_ema (default: the plain ones)"
    )
    add_parts(parser)
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    parser.add_argument("--prompts-file", metavar="FILE", help="a text file with one caption per line")
    value = "of a condition of the model, for all captions, or [one, for, each]; may be given several times"
    parser.add_argument("--value", action="append", default=[], type=value_of, metavar="NAME=VALUE", help=value)
    parser.add_argument("--count", type=int, default=1, metavar="N", help="images per caption (default 1)")
    sides = "side of the images in pixels, or HEIGHTxWIDTH, multiples of the autoencoder's factor"
    parser.add_argument("--size", type=size_of, metavar="PIXELS", help=sides)
    parser.add_argument("--seed", type=int, metavar="N", help="0 to 2^63 − 1")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="images per batch and process (default 16)"
    )
    parser.add_argument("--out", default="images", metavar="FOLDER", help="folder for the PNGs (default images)")
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: a GPU if there is one, each process its own)"
    )
    _add_sampler(parser)
    _add_guidance(parser)
    _add_image(parser)


def value_of(text: str) -> tuple[str, Any]:
    """A condition's name and value, which is read as in a configuration."""
    import yaml

    name, equals, value = text.partition("=")
    try:
        if equals and name:
            return name, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise argparse.ArgumentTypeError(f"must be NAME=VALUE, such as digit=7 or digit=[1,2,3], got {text!r}")


def size_of(text: str) -> int | tuple[int, int]:
    """One side, or height and width."""
    try:
        height, separator, width = text.lower().replace("×", "x").partition("x")
        return (int(height), int(width)) if separator else int(height)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be PIXELS or HEIGHTxWIDTH, such as 32 or 32x128, got {text!r}"
        ) from None


def _add_image(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("start from an image", "docs/editing.md")
    group.add_argument("--image", metavar="FILE", help="a picture to start from")
    anew = "share of the noise levels drawn anew: 0 keeps the image, 1 ignores it (default 0.8, or 1 with --mask)"
    group.add_argument("--strength", type=float, metavar="SHARE", help=anew)
    by = f"one of {', '.join(STRENGTHS)} (default levels; steps is the strength of diffusers)"
    group.add_argument("--strength-by", metavar="NAME", help=by)
    found = "begin at the noise that DDIM inversion finds for the image, not at drawn noise (see `ldm invert`)"
    group.add_argument("--invert", action="store_true", default=None, help=found)
    source = "with --invert: the caption of the image as it is (default: none)"
    group.add_argument("--source-prompt", metavar="PROMPT", help=source)
    group.add_argument("--mask", metavar="FILE", help="white where --image is drawn, black where it is kept")
    beyond = "draw so many pixels beyond each side of the image"
    group.add_argument("--extend", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help=beyond)
    how = (
        f"one of {', '.join(COMPLETIONS)} (default blend, or what the model was trained for; repaint: many more steps)"
    )
    group.add_argument("--completion", metavar="NAME", help=how)
    group.add_argument("--repaint-jump", type=int, metavar="N", help="steps that repaint goes back (default 5)")
    group.add_argument("--repaint-repeats", type=int, metavar="N", help="times that it goes through them (default 5)")
    kept = "keep the pixels outside the mask as the autoencoder decodes them"
    group.add_argument("--no-paste", dest="paste", action="store_false", default=None, help=kept)
    group = parser.add_argument_group("larger than in training", "docs/editing.md")
    group.add_argument("--window", type=int, metavar="PIXELS", help="draw in overlapping windows of this side")
    group.add_argument("--window-stride", type=int, metavar="PIXELS", help="distance of two windows (default: half)")
    rows = "encode and decode so many rows at a time: the same picture in less memory, slower"
    group.add_argument("--strips", type=int, metavar="ROWS", help=rows)
    ends = f"opposite edges meet: one of {', '.join(CIRCULAR)} (default none)"
    group.add_argument("--circular", metavar="NAME", help=ends)


def _add_sampler(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampler", "default: the model's own settings")
    calls = "network calls, at most the T of training (heun and dpm2: steps of two calls)"
    group.add_argument("--steps", type=int, metavar="N", help=calls)
    group.add_argument("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)}")
    group.add_argument(
        "--grid", metavar="NAME", help=f"spacing of the steps: one of {', '.join(GRIDS)} (docs/samplers.md)"
    )
    group.add_argument("--eta", type=float, help="noise of ddim: 0 for none, 1 for as much as ddpm")
    group.add_argument("--variance", metavar="NAME", help=f"variance of ddpm's noise: one of {', '.join(VARIANCES)}")
    quantile = "pixel models: clip x̂_0 at this quantile of its absolute values"
    group.add_argument("--dynamic-threshold", type=float, metavar="P", help=quantile)
    lora = "apply a LoRA file, folder or run; may be given several times"
    group.add_argument("--lora", action="append", metavar="PATH[:SCALE]", help=lora)


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("guidance", "default: the model's own settings (docs/guidance.md)")
    closer = "1: the conditional model; above: closer to the caption"
    group.add_argument("--guidance-scale", type=float, metavar="SCALE", help=closer)
    alone = "guide one condition of the model, or caption, beside --guidance-scale; may be given several times"
    group.add_argument("--guidance-alone", action="append", metavar="NAME:SCALE", help=alone)
    group.add_argument("--negative-prompt", metavar="PROMPT", help="a caption to steer away from")
    rescale = "0 to 1: how much of the standard deviation added by guidance is removed"
    group.add_argument("--guidance-rescale", type=float, metavar="SHARE", help=rescale)
    interval = "guide only where LO ≤ σ = s/a ≤ HI"
    group.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"), help=interval)
    group.add_argument("--autoguidance", metavar="RUN_OR_FOLDER", help="a weaker model to steer away from")
    group.add_argument("--autoguidance-scale", type=float, metavar="SCALE", help="1: no autoguidance (default 2)")
    labels = "a run of train-classifier; prompts are then captions of its classes"
    group.add_argument("--classifier", metavar="RUN", help=labels)
    group.add_argument("--classifier-scale", type=float, metavar="W", help="0: no classifier guidance (default 1)")
    forms = f"one of {', '.join(CLASSIFIER_FORMS)} (default score; mean is for ddpm)"
    group.add_argument("--classifier-form", metavar="NAME", help=forms)


def run(arguments: argparse.Namespace) -> None:
    """Check everything, then load, draw and save."""
    given = _settings(arguments)
    SampleConfig(**given)  # ranges, before anything slow
    prompts = _prompts(arguments)
    from ldm.pipeline import Pipeline
    from ldm.pipeline.checks import check_drawable, check_guidance, check_sampling, check_start, sides_of
    from ldm.pipeline.given import read_given, started
    from ldm.pipeline.prompts import asked, texts_of
    from ldm.pipeline.provenance import Provenance, other_hashes, part_hashes, surroundings

    # everything that can be refused from configurations alone, before the weights are read
    info = _model_info(arguments)
    settings = dataclasses.replace(info.defaults, **given)
    size = info.sample_size if arguments.size is None else arguments.size
    sides = sides_of(size, info.sample_size)
    settings = started(settings, arguments.image is not None, arguments.mask is not None)
    check_sampling(settings, sides, info.schedule.num_steps, info.factor)
    check_guidance(settings, info.autoencoder is not None)
    check_drawable(info.unet, info.conditioner is not None)
    check_start(info.schedule, info.target, settings)
    values = _values(arguments)
    captions = _fitting(prompts, info, settings) or (None if values else [""])
    wanted = asked(captions, values or None, info.conditioner, arguments.count)
    prompts = texts_of(wanted)

    console = Console()
    processes, device = devices(arguments.device)
    out = Path(arguments.out)
    first = processes.each(lambda: _first_number(out))[0]  # agreed before any process writes
    pipe = Pipeline.from_pretrained(arguments.model, device, variant=arguments.variant, **parts(arguments))
    pipe.check(settings, sides)
    pipe.warn_cut(prompts, settings, stacklevel=1)
    start = {name: path for name in ("image", "mask") if (path := getattr(arguments, name)) is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # drawing says it again
        read_given(arguments.image, arguments.mask, sides, pipe.image_channels, len(prompts), settings.extend)
    work = {"images": len(prompts), "batch_size": arguments.batch_size, "processes": processes.count}
    given_values = tuple(prompt.values for prompt in wanted) if values else ()
    origin = Provenance(
        tuple(prompts), None, settings, size, pipe.hash, arguments.model, arguments.variant,
        part_hashes(info), other_hashes(settings, start.values()), {**surroundings(device), **work},
        **parts(arguments), **start, values=given_values,
    )  # fmt: skip
    images = processes.over(len(prompts), lambda share: _draw(pipe, origin, share, first, out, console))
    if processes.main and len(prompts) > 1:
        columns = arguments.count if arguments.count > 1 else min(8, len(prompts))
        _save_grid(images, columns, origin, out / f"grid-{first:05d}.png")
    console.say(f"{len(prompts)} image{'s' if len(prompts) > 1 else ''} in {arguments.out}/ from {first:05d}")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings given on the command line."""
    given = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of conditions. Raises ConfigError for one that is given twice."""
    names = [name for name, _ in arguments.value]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ConfigError(f"--value {twice} is given twice: several values are a list, such as {twice}=[1,2]")
    return dict(arguments.value)


def _model_info(arguments: argparse.Namespace) -> ModelInfo:
    """The model's description, without weights. Raises ConfigError or FolderError."""
    from ldm.pipeline.info import ModelInfo

    try:
        info = ModelInfo.read(arguments.model, arguments.variant, **parts(arguments))
        if info.has_text and not info.bundle.tokenizer:
            raise ConfigError("it holds no tokenizer: give tokenizer, or name a text encoder that has one by --text")
    except ConfigError as error:
        if Path(arguments.model).is_file():  # `ldm convert` has the options that such a file may need
            convert = f"`ldm convert {arguments.model} FOLDER`"
            raise ConfigError(f"{arguments.model}: {error} (to {convert}; then draw from the folder)") from None
        raise
    return info


def _fitting(prompts: list[str], info: ModelInfo, settings: SampleConfig) -> list[str]:
    """The prompts, checked against the model and its classifier; raises ConfigError where they do not fit."""
    captioned = info.has_text or settings.classifier is not None
    if prompts and not captioned:
        what = "is unconditional: it draws" if info.conditioner is None else "has conditions for --value and draws"
        raise ConfigError(f"this model {what} without captions, leave --prompt and --prompts-file out")
    if captioned and not prompts:
        raise ConfigError("--prompt or --prompts-file is needed: this model draws what a caption says")
    if settings.classifier is not None:
        from ldm.interop.classifier import read_classifier

        classes = read_classifier(settings.classifier)[0]
        for prompt in prompts:
            classes.label(prompt)
    return prompts


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts. Raises ConfigError for a file that cannot be read or holds none."""
    for name in ("count", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    prompts = list(arguments.prompt)
    if arguments.prompts_file is not None:
        try:
            captions = [line.strip() for line in lines(read_text(Path(arguments.prompts_file))) if line.strip()]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--prompts-file {arguments.prompts_file}: cannot be read: {reason}") from None
        if not captions:
            raise ConfigError(f"--prompts-file {arguments.prompts_file} holds no caption")
        prompts += captions
    return prompts


def devices(name: str | None) -> tuple[Processes, torch.device]:
    """The processes that draw, and the device of this one. Raises ConfigError for a device that cannot be used."""
    import torch

    from ldm.distributed.launch import launched

    count = int(os.environ.get("WORLD_SIZE", "1"))
    if name not in (None, "cpu") and count > 1:
        raise ConfigError(
            f"--device {name} with {count} processes: each uses the GPU of its number; leave it out, or give cpu"
        )
    try:
        if name is not None:
            torch.zeros(1, device=name).cpu()  # fails for `meta`, which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    processes, device = launched(cpu=name == "cpu")
    return processes, torch.device(name) if name is not None else device


def _first_number(out: Path) -> int:
    """One above the highest number of an image in the folder, which is made if it is missing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be a folder: {error.strerror}") from None
    return 1 + max((int(m[1]) for f in out.glob("*.png") if (m := re.match(r"(?:grid-)?(\d+)", f.name))), default=-1)


def _draw(pipe: Any, whole: Provenance, share: range, first: int, out: Path, console: Console) -> list[np.ndarray]:
    """Draw and save the images numbered ``share``; returns them, uint8 [h, w, c]."""
    from ldm.data.transforms import to_pil, to_uint8
    from ldm.evaluation.figures.plots import write_png

    drawn: list[np.ndarray] = []
    prompts, batch_size = whole.prompts, whole.drawn["batch_size"]
    captions = [prompts[i] for i in share]
    how: dict[str, Any] = {"size": whole.size, "batch_size": batch_size, "indices": share, **whole.start}
    if whole.values:
        how["values"] = [whole.values[i] for i in share]
    for images in pipe.sample(captions, whole.settings, **how):
        arrays = to_uint8(images)
        for picture, i in zip(to_pil(arrays), share[len(drawn) :], strict=False):
            values = whole.values[i : i + 1]
            origin = dataclasses.replace(whole, prompts=(prompts[i],), index=i, values=values)
            write_png(picture, out / f"{first + i:05d}-{_slug(prompts[i], *values)}.png", origin.png())
        drawn += list(arrays)
        console.progress(len(drawn), len(share), {})
    return drawn


def _save_grid(images: list[np.ndarray], columns: int, origin: Provenance, file: Path) -> None:
    import numpy as np
    from PIL import Image

    from ldm.data.transforms import grid
    from ldm.evaluation.figures.plots import write_png

    write_png(Image.fromarray(grid(np.stack(images), columns)), file, origin.png())


def _slug(text: str, values: Mapping[str, Any] | None = None) -> str:
    text = " ".join([text, *(f"{name} {value}" for name, value in (values or {}).items())])
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60] or "empty"
