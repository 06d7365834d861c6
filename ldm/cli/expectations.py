"""Expectations of a training, said by `ldm init`: how far so many images and such a machine go, and what is better.

Only what is computed from the plan, or measured in docs/results.md, is stated as a fact.
"""

from __future__ import annotations

import shlex

from ldm.cli.recipe import Plan

FEW = 5_000  # training images below which a pretrained model is named as the better start
ENLARGED = 2  # the images' short side over that of training, from which the loss of size is mentioned
SIDE = 512  # of the pretrained model's images


def expectations(plan: Plan, short_side: int) -> list[str]:
    """Lines to print. ``short_side``: median of the images' shorter sides, in pixels."""
    few, reduced = plan.train_images < FEW, short_side >= ENLARGED * plan.data.image_size
    lines = []
    if plan.machine == "cpu":
        minutes = sum(plan.seconds(stage) for stage in plan.stages) / 60
        lines.append(f"about {minutes:.0f} minutes on two idle cores, extrapolated from `make demo`")
    else:
        lines.append("the time on a GPU was not measured: the progress bar tells it after a minute")
    if reduced:
        lines.append(
            f"images of {plan.data.image_size}×{plan.data.image_size} pixels, where half of yours have a short side of"
            f" {short_side} or more"
        )
    if few:
        lines += _few(plan)
    marked = [f"{'  expect    ' if i == 0 else '            '}{line}" for i, line in enumerate(lines)]
    return marked + (_better(plan) if few or (reduced and plan.machine == "cpu") else [])


def _few(plan: Plan) -> list[str]:
    return [
        f"{plan.train_images} images are few for a model that starts from nothing: it sees each {plan.seen:.0f} times,"
        " and may blur what",
        "they do not share, or repeat them. If the validation loss rises, training says so, and the model from before",
        f"it rose is kept in runs/{plan.name}/best (docs/training.md). Measured so far: 1,437 handwritten digits are",
        "enough to draw legible ones; 200 images were only timed; photographs were not measured (docs/results.md)",
    ]


def _better(plan: Plan) -> list[str]:
    """The start from a pretrained model, with its command."""
    data, folder = plan.data, "models/stable-diffusion-v1-5"
    if data.captions == "none":
        return [
            "  better    with captions a pretrained Stable Diffusion, or a LoRA of it, can start from what it knows",
            "            (docs/data.md, docs/lora.md)",
        ]
    overrides = {"data.folder": data.folder, "data.captions": data.captions}
    if data.captions == "class":
        overrides["data.caption_templates"] = f"[{', '.join(repr(one) for one in data.caption_templates)}]"
    if data.text_column != "text":
        overrides["data.text_column"] = data.text_column
    overrides["data.validation_fraction"] = data.validation_fraction
    overrides |= {"run": f"runs/{plan.name}-lora", "train.lora.rank": 8, "train.lr": "1e-4", "train.keep_best": "true"}
    given = " ".join(shlex.quote(f"{name}={value}") for name, value in overrides.items())
    gpu = "" if plan.machine == "gpu" else ", which needs a GPU"
    return [
        f"  better    a LoRA of a pretrained Stable Diffusion at {SIDE} px{gpu}, with its folder in {folder}:",
        f"            ldm train-ldm configs/sd1/ldm.yaml {given}",
        "            without train.lora.rank, and with train.lr=1e-5, the whole U-Net is fine-tuned. A smaller model",
        "            of your own is a start too: init: in ldm.yaml (docs/training.md, docs/lora.md)",
    ]
