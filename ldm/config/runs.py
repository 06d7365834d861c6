"""One dataclass for each training command. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autoencoder.config import AutoencoderConfig, ConfigError, LossConfig, between
from ldm.config.conditions import ConditionConfig, InpaintConfig, check_names
from ldm.config.data import AugmentConfig, DataConfig
from ldm.config.figure import Figure
from ldm.config.networks import ClassifierConfig, ClipConfig, UNetConfig
from ldm.config.process import LEARNED, DistillConfig, ObjectiveConfig, ScheduleConfig
from ldm.config.sample import SampleConfig
from ldm.config.train import TrainConfig

NULL_CAPTION = ""  # the unconditional caption: trained by caption dropout, used by classifier-free guidance
NONE = "none"  # `autoencoder: none` is pixel space, `text: none` is unconditional


@dataclass(frozen=True)
class AutoencoderTrainingConfig:
    """`ldm train-autoencoder`: stage 1."""

    run: str
    data: DataConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _named(self.run)
        _same("data.image_channels", self.data.image_channels, "model.image_channels", self.model.image_channels)
        _multiple("data.image_size", self.data.image_size, self.model.factor, "the autoencoder's factor")
        if self.train.mixed_precision == "fp16":
            raise ConfigError("train.mixed_precision fp16 overflows in the autoencoder: use bf16")
        _no_lora(self.train)
        _comparable(
            self.figure, self.train, "a discriminator lowers PSNR while texture gets sharper: it needs loss.lpips"
        )

    @property
    def figure(self) -> Figure | None:
        """LPIPS where it means something, else PSNR; None for a discriminator without LPIPS."""
        if self.loss.lpips > 0 and self.loss.lpips_weights != "random":
            return Figure("lpips")
        return None if self.loss.gan > 0 else Figure("psnr", higher=True)


@dataclass(frozen=True)
class ClipTrainingConfig:
    """`ldm train-clip`: a text encoder for when no pretrained one is available."""

    run: str
    data: DataConfig
    model: ClipConfig = field(default_factory=ClipConfig)
    # also contrast images with their captions in which left and right, above and below are exchanged
    swap_relations: bool = False
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _named(self.run)
        _multiple("data.image_size", self.data.image_size, self.model.patch_size, "model.patch_size")
        _no_lora(self.train)
        if self.data.captions == "none":
            raise ConfigError("data.captions none: there is nothing to train a text encoder on")
        if self.train.micro_batch not in (None, self.train.batch_size):
            raise ConfigError(
                "train.micro_batch must be null: the contrastive loss compares the whole global batch,"
                " so accumulation is refused"
            )

    @property
    def figure(self) -> Figure:
        """Top-1 retrieval among validation captions."""
        return Figure("retrieval_top1", higher=True)


@dataclass(frozen=True)
class DiffusionTrainingConfig:
    """`ldm train-ldm`: stage 2."""

    run: str
    data: DataConfig
    autoencoder: str  # a run of train-autoencoder, a model folder, a single file, or `none`: pixel space
    text: str  # a run of train-clip, a CLIP text model by folder or name, or `none`: unconditional
    init: str | None = None  # a run, model folder or single file whose U-Net it starts from; null: random
    cache_latents: bool = True  # encode posterior moments once, into the run
    cache_captions: int = 20_000  # encode captions once if there are at most so many; 0: in every step
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    conditions: tuple[ConditionConfig, ...] = ()  # columns of the data that it is given beside the caption
    inpaint: InpaintConfig | None = None  # fill masked parts of images: the mask and the rest are given too
    joint_dropout: float = 0.05  # with conditions: share of samples that lose the caption and all of them at once
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    distill: DistillConfig | None = None  # distil the model of `init` for sampling in 1 to 4 steps
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    prompts: tuple[str, ...] = ()  # for image grids during training; empty: the first validation captions

    def __post_init__(self) -> None:
        _named(self.run)
        between(self, 0.0, 1.0, "caption_dropout", "joint_dropout")
        between(self, 0, 10**7, "cache_captions")
        check_names(self.conditions)
        if self.data.captions == "none" and self.text != NONE:
            raise ConfigError("data.captions none: set text: none, or say where the captions are")
        if self.cache_latents and self.autoencoder != NONE and self.data.crop == "random":
            raise ConfigError("cache_latents cannot keep random crops: set data.crop=center or cache_latents=false")
        endless = self.data.source not in ("folder", "digits") and self.data.size is None
        if self.cache_latents and self.autoencoder != NONE and endless:
            raise ConfigError("cache_latents needs a finite set: set data.size or cache_latents=false")
        for name in ("vector_dim", "num_labels", "sinusoidal_labels", "concat_channels"):
            if getattr(self.unet, name) != getattr(UNetConfig, name):
                raise ConfigError(f"unet.{name} is set where conditions or inpaint need it: leave it out")
        if self.schedule.blind_at_the_end(self.objective.target):
            raise ConfigError(
                f"objective.target {self.objective.target} does not determine the image where the schedule leaves no"
                " signal: predict v or x0"
            )
        if self.sample.variance == "learned" and not self.objective.learned_variance:
            raise ConfigError("sample.variance learned needs objective.learned_variance: true")
        if self.schedule.name == LEARNED:
            self._check_learned_schedule()
        if self.init is not None and self.schedule.name == LEARNED:
            raise ConfigError("schedule.name learned needs a network that is trained from scratch: leave init out")
        if self.train.lora is not None and self.init is None:
            raise ConfigError("train.lora needs init: the run or folder whose U-Net it changes")
        if self.distill is not None:
            self._check_distillation(self.distill)
        for name in ("lora", "strength", "strength_by", "extend", "invert", "completion", "paste"):
            if getattr(self.sample, name) != getattr(SampleConfig, name):
                raise ConfigError(f"sample.{name} is for drawing (ldm sample): leave it out")
        known = [*(["caption"] if self.text != NONE else []), *(condition.name for condition in self.conditions)]
        if unknown := [name for name in self.sample.alone() if name not in known]:
            raise ConfigError(f"sample.guidance_alone {unknown[0]}: the conditions are: {', '.join(known) or 'none'}")
        _comparable(self.figure, self.train, "with schedule.name learned the losses of two updates cannot be compared")

    @property
    def figure(self) -> Figure | None:
        """The unweighted loss; None for a learned schedule, under which it is of another task at each update."""
        return None if self.schedule.name == LEARNED else Figure("loss")

    def _check_distillation(self, distill: DistillConfig) -> None:
        if self.init is None:
            raise ConfigError("distill needs init: the run or folder whose model is the teacher")
        if self.objective.weighting != "simple" or self.objective.learned_variance:
            raise ConfigError("distill has a loss of its own: leave objective.weighting and learned_variance out")
        if self.text == NONE and not self.conditions and distill.guidance_scale != 1.0:
            raise ConfigError("distill.guidance_scale: a model without captions is not guided: set it to 1")
        wanted: dict[str, tuple[Any, Any]] = {
            "sample.sampler": (self.sample.sampler, "lcm"),
            "sample.guidance_scale": (self.sample.guidance_scale, 1),
        }
        if self.text != NONE:
            wanted["caption_dropout"] = self.caption_dropout, 0
        if self.conditions:
            wanted["joint_dropout"] = self.joint_dropout, 0
            wanted |= {f"dropout of condition {c.name}": (c.dropout, 0) for c in self.conditions}
        for name, (found, value) in wanted.items():
            if found != value:
                reason = "guidance is learned, and nothing dropped"
                raise ConfigError(f"{name} must be {value} with distill ({reason}), got {found}")

    def _check_learned_schedule(self) -> None:
        if self.train.compile or self.train.mixed_precision == "fp16":
            raise ConfigError(
                "schedule.name learned also differentiates the network with respect to its input:"
                " set train.compile=false and no fp16 (bf16 or no)"
            )
        if self.objective.timesteps == "importance":
            raise ConfigError(
                "objective.timesteps importance lowers the variance of one loss, a learned schedule that of the bound"
                " at uniform t: choose uniform or stratified, or another schedule"
            )


@dataclass(frozen=True)
class ClassifierTrainingConfig:
    """`ldm train-classifier`: the classifier for classifier guidance."""

    run: str
    data: DataConfig
    diffusion: str  # a run of train-ldm or a model folder, for its latents and noise schedule
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _named(self.run)
        if self.data.source != "digits" and self.data.captions != "class":
            raise ConfigError("data: classes are those of source: digits, or of a folder with captions: class")
        _no_lora(self.train)
        if self.train.gradient_checkpointing:
            raise ConfigError("train.gradient_checkpointing: the classifier does not support it, leave it out")

    @property
    def figure(self) -> Figure:
        """The cross-entropy."""
        return Figure("loss")


RUNS: dict[
    str, type[AutoencoderTrainingConfig | ClipTrainingConfig | DiffusionTrainingConfig | ClassifierTrainingConfig]
] = {
    "train-autoencoder": AutoencoderTrainingConfig,
    "train-clip": ClipTrainingConfig,
    "train-ldm": DiffusionTrainingConfig,
    "train-classifier": ClassifierTrainingConfig,
}


def _named(run: str) -> None:
    if not run.strip():
        raise ConfigError("run must name the folder that is trained in, such as runs/photos")


def _no_lora(train: TrainConfig) -> None:
    if train.lora is not None:
        raise ConfigError("train.lora is for train-ldm: leave it out")


def _comparable(figure: Figure | None, train: TrainConfig, reason: str) -> None:
    for name, given in (("keep_best", train.keep_best), ("patience", train.patience is not None)):
        if given and figure is None:
            raise ConfigError(f"train.{name}: {reason}: leave it out")


def _same(name_a: str, a: Any, name_b: str, b: Any) -> None:
    if a != b:
        raise ConfigError(f"{name_a} is {a} but {name_b} is {b}: they must be equal")


def _multiple(name: str, value: int, factor: int, what: str) -> None:
    if value % factor:
        raise ConfigError(f"{name} {value} is not a multiple of {factor} ({what})")
