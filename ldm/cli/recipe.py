"""Configuration files written by `ldm init`: the templates in recipes/, sized to data and machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from string import Template

from ldm.config import ClipConfig, DataConfig

TEMPLATES = Path(__file__).with_name("recipes")
COMMENTS = 34  # column of the comments

# Seconds of one update on two CPU cores at 32 px, from the status.json files of `make demo` (docs/results.md):
# 153 s / 3000 updates of 8 images, 24 s / 300 of 64, 368 s / 2200 of 32. They grow with the number of pixels.
CPU_SECONDS = {"autoencoder": 0.051, "clip": 0.08, "ldm": 0.167}

# (passes over the data, the template's batch size, fewest and most updates)
LENGTHS = {
    ("cpu", "autoencoder"): (40, 8, 1500, 3000),
    ("cpu", "clip"): (20, 64, 200, 600),
    ("cpu", "ldm"): (200, 32, 1500, 4000),
    ("gpu", "autoencoder"): (40, 32, 20_000, 200_000),
    ("gpu", "clip"): (20, 256, 2_000, 20_000),
    ("gpu", "ldm"): (200, 64, 50_000, 400_000),
}

# Validations of a stage: as many as show a rise early, and as take a few per cent of its time on a small set.
VALIDATIONS = {"autoencoder": 10, "clip": 10, "ldm": 20}


@dataclass(frozen=True)
class Plan:
    """Facts that the recipe depends on."""

    name: str  # of the runs: runs/NAME
    out: str  # folder of the configurations
    data: DataConfig
    train_images: int
    machine: str  # cpu or gpu
    tokens: int  # room for captions, start and end included
    prompts: tuple[str, ...]  # captions drawn while training
    relations: bool = False  # captions say left of, right of, above or below

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages in order; without captions there is no text encoder."""
        return ("autoencoder", "ldm") if self.data.captions == "none" else ("autoencoder", "clip", "ldm")

    def steps(self, stage: str) -> int:
        """Updates of a stage, a multiple of 100 between its limits."""
        passes, batch, low, high = LENGTHS[self.machine, stage]
        return min(high, max(low, passes * self.train_images // batch // 100 * 100))

    @property
    def seen(self) -> float:
        """Number of times that the diffusion model sees each image."""
        return self.steps("ldm") * LENGTHS[self.machine, "ldm"][1] / self.train_images

    def seconds(self, stage: str) -> float:
        """Estimated training time of a stage on two CPU cores."""
        return CPU_SECONDS[stage] * self.steps(stage) * (self.data.image_size / 32) ** 2


def write(plan: Plan) -> dict[str, str]:
    """File name → YAML of each stage."""
    return {f"{stage}.yaml": _fill(f"{plan.machine}/{stage}.yaml", _values(plan, stage)) for stage in plan.stages}


def _fill(template: str, values: dict[str, object]) -> str:
    filled = Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(values).rstrip()
    return "".join(_aligned(line) + "\n" for line in filled.splitlines())


def _aligned(line: str) -> str:
    """The line with its comment moved to column COMMENTS, whatever the length of the value."""
    setting, mark, comment = line.partition("  #")
    if not mark or not setting.strip() or '"' in setting:
        return line
    return f"{setting.rstrip():{COMMENTS}}# {comment.strip()}"


def _values(plan: Plan, stage: str) -> dict[str, object]:
    data, captioned = plan.data, plan.data.captions != "none"
    caption_settings = ""
    if data.text_column != "text":
        caption_settings = f"  text_column: {_quoted(data.text_column)}\n"
    if data.captions == "class":
        templates = _quoted(list(data.caption_templates))
        caption_settings = f"  caption_templates: {templates}   # {{}} is the class; each image keeps one of them\n"
    minutes = max(1, round(plan.seconds(stage) / 60))
    own = {
        "folder": _quoted(data.folder),
        "captions": data.captions,
        "caption_settings": caption_settings,
        "min_side": data.smallest_side,
        "max_skipped": data.max_skipped,
        "validation_fraction": data.validation_fraction,
        "image_size": data.image_size,
        "image_channels": data.image_channels,
    }
    text = f"runs/{plan.name}/text         # or a pretrained CLIP text model, by folder or name, without clip.yaml"
    return own | {
        "data": _fill("data.yaml", own),
        "name": plan.name,
        "out": plan.out,
        "minutes": "1 minute" if minutes == 1 else f"{minutes} minutes",
        "steps": plan.steps(stage),
        "every": max(50, plan.steps(stage) // 4),
        "validate": plan.steps(stage) // VALIDATIONS[stage],
        "tokens": plan.tokens,
        "relations": str(plan.relations).lower(),
        "position_std": 1.0 if plan.relations else ClipConfig.position_std,
        "text": text if captioned else "none",
        "guidance": 3.0 if captioned else 1.0,
        "prompts": f"prompts: {_quoted(list(plan.prompts))}   # of the grids drawn while training" if captioned else "",
    }


def _quoted(value: object) -> str:
    """As JSON, which is YAML for any characters."""
    return json.dumps(value, ensure_ascii=False)
