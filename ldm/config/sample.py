"""Sampling settings. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

from autoencoder.config import ConfigError, between, one_of
from ldm.config.values import check_types

SAMPLERS = (
    "ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_published", "dpmpp_2s", "dpmpp_sde", "dpmpp_2m_sde", "unipc",
    "euler", "euler_ancestral", "heun", "dpm2", "lms", "plms", "annealed_langevin", "predictor_corrector",
    "lcm",
)  # fmt: skip
GRIDS = (
    "trailing", "leading", "linspace", "linspace_fractional", "linspace_positive", "leading_positive", "karras",
    "uniform_lambda", "lcm",
)  # fmt: skip
CLASSIFIER_FORMS = ("score", "mean")
VARIANCES = ("posterior", "beta", "learned")
STRENGTHS = ("levels", "steps")
COMPLETIONS = ("blend", "repaint")
CIRCULAR = ("none", "x", "y", "xy")
LORA_SCALE = 100  # largest magnitude
ALONE = 100  # largest scale of one condition


@dataclass(frozen=True)
class SampleConfig:
    """Settings for sampling images from a trained model."""

    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5
    eta: float = 0.0  # ddim: 0 deterministic, 1 ancestral
    negative_prompt: str = ""
    seed: int = 0
    grid: str = "trailing"  # spacing of the timesteps
    grid_offset: int = 1  # of the leading grids, in timesteps
    end_clean: bool = True  # false: the last step ends at the noise of t = 0, as in Stable Diffusion's own schedulers
    variance: str | None = None  # ddpm: posterior, beta or learned; null: learned if the model has it, else posterior
    guidance_rescale: float = 0.0  # 0: not at all; 1: back to the conditional output's standard deviation
    guidance_alone: tuple[str, ...] = ()  # NAME:SCALE: guides one condition, or the caption, beside guidance_scale
    guidance_interval: tuple[float, float] | None = None  # lowest and highest σ = s/a with guidance
    dynamic_threshold: float | None = None  # pixel models: the quantile of |x̂_0| at which it is clipped
    autoguidance: str | None = None  # a run or folder: a weaker model of the same latents, target and schedule
    autoguidance_scale: float = 2.0
    classifier: str | None = None  # a run of train-classifier: the prompt is one of its classes' captions
    classifier_scale: float = 1.0
    classifier_form: str = "score"  # or mean, for ddpm
    lora: tuple[str, ...] = ()  # LoRA files, folders or runs on top of the model, each PATH or PATH:SCALE
    strength: float | None = None  # with an image: share of the noise levels drawn anew; null: 0.8, or 1 with a mask
    strength_by: str = "levels"  # or steps: only the last share of the steps of a whole grid is made, as in diffusers
    extend: tuple[int, int, int, int] | None = None  # with an image: pixels drawn beyond its left, top, right, bottom
    invert: bool = False  # with an image: begin at the noise that DDIM inversion finds for it, not at drawn noise
    source_prompt: str = ""  # with invert: the caption of the image as it is
    completion: str | None = (
        None  # with a mask: blend; repaint, several times as slow; null: blend unless trained for it
    )
    repaint_jump: int = 5  # steps that repaint goes back
    repaint_repeats: int = 5  # times that repaint goes through them
    paste: bool = True  # with a mask: keep the pixels outside it as they are
    window: int | None = None  # draw in overlapping windows of so many pixels, for pictures larger than in training
    window_stride: int | None = None  # distance of two windows in pixels; null: half a window
    strips: int | None = None  # encode and decode so many rows at a time: the same picture in less memory, slower
    circular: str = "none"  # x, y or xy: windows continue at the other end, so that opposite edges of a picture meet

    def __post_init__(self) -> None:
        check_types(self)
        self.loras()
        self.alone()
        one_of(self, SAMPLERS, "sampler")
        one_of(self, GRIDS, "grid")
        one_of(self, CLASSIFIER_FORMS, "classifier_form")
        between(self, 0.0, 1.0, "guidance_rescale")
        between(self, 1e-6, 1.0, "dynamic_threshold")
        between(self, 0.0, 100.0, "autoguidance_scale")
        between(self, 0.0, 1e4, "classifier_scale")
        if (interval := self.guidance_interval) is not None and not 0 <= interval[0] < interval[1] < float("inf"):
            raise ConfigError(f"guidance_interval must be two numbers 0 ≤ lo < hi, got {list(interval)}")
        if self.variance is not None:
            one_of(self, VARIANCES, "variance")
        between(self, 1, 100_000, "steps")
        between(self, 0, 100_000, "grid_offset")
        between(self, 0.0, 100.0, "guidance_scale")
        between(self, 0.0, 1.0, "eta")
        between(self, 0, 2**63 - 1, "seed")
        one_of(self, STRENGTHS, "strength_by")
        if self.completion is not None:
            one_of(self, COMPLETIONS, "completion")
        one_of(self, CIRCULAR, "circular")
        between(self, 0.0, 1.0, "strength")
        between(self, 1, 1000, "repaint_jump", "repaint_repeats")
        between(self, 1, 2**14, "window", "window_stride", "strips")
        self._check_owned("window", self.window is not None, "window_stride", "circular")
        self._check_owned("invert", self.invert, "source_prompt")
        self._check_owned("completion repaint", self.completion == "repaint", "repaint_jump", "repaint_repeats")
        if self.window is not None and self.window_stride is not None and self.window_stride > self.window:
            raise ConfigError(f"window_stride must be at most window {self.window}, got {self.window_stride}")

        if self.extend is not None and not (min(self.extend) >= 0 < max(self.extend) <= 2**14):
            raise ConfigError(f"extend must be pixels beyond left, top, right and bottom, got {list(self.extend)}")

    def canvas(self, sides: tuple[int, int]) -> tuple[int, int]:
        """Height and width that are drawn, from those of the image, or of the picture where nothing is extended."""
        left, top, right, bottom = self.extend or (0, 0, 0, 0)
        return sides[0] + top + bottom, sides[1] + left + right

    def _check_owned(self, owner: str, there: bool, *names: str) -> None:
        """Raise ConfigError for settings that are given although nothing reads them."""
        for name in names:
            if not there and getattr(self, name) != getattr(SampleConfig, name):
                raise ConfigError(f"{name} is for {owner}: give it, or leave {name} out")

    def alone(self) -> dict[str, float]:
        """The scale of each condition that is guided alone."""
        scales: dict[str, float] = {}
        for entry in self.guidance_alone:
            name, _, scale = entry.rpartition(":")
            try:
                scales[name], again = float(scale), name in scales
            except ValueError:
                name, again = "", False
            if not name or again or not 0 <= scales[name] <= ALONE:
                raise ConfigError(
                    f"guidance_alone must be NAME:SCALE, each name once, with a scale from 0 to {ALONE}, got {entry!r}"
                )
        return scales

    def loras(self) -> list[tuple[str, float]]:
        """Path and scale of each LoRA; a number after the last colon is the scale."""
        pairs: list[tuple[str, float]] = []
        for entry in self.lora:
            path, _, scale = entry.rpartition(":")
            try:
                pairs.append((path, float(scale)) if path else (entry, 1.0))
            except ValueError:
                pairs.append((entry, 1.0))
            if not pairs[-1][0] or not abs(pairs[-1][1]) <= LORA_SCALE:
                scales = f"a scale from -{LORA_SCALE} to {LORA_SCALE}"
                raise ConfigError(f"lora must be PATH or PATH:SCALE with {scales}, got {entry!r}")
        return pairs


def check_lora_scale(scale: Any, path: object) -> None:
    """Raise ConfigError unless ``scale`` is a valid scale for the LoRA at ``path``."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or not abs(float(scale)) <= LORA_SCALE:
        raise ConfigError(f"lora {path}: its scale must be a number from -{LORA_SCALE} to {LORA_SCALE}, got {scale!r}")
