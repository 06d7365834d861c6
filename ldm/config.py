"""Every knob of the pipeline, with its range, and the reading of YAML and `a.b=c` overrides. Imports no torch.

One frozen dataclass per command: ``AutoencoderRun``, ``ClipRun``, ``DiffusionRun``, ``ClassifierRun``.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from autoencoder.config import AutoencoderConfig, ConfigError, LossConfig, at_least, between, divisible, one_of

SOURCES = ("folder", "shapes", "shapes-two", "digits", "textures")
CAPTIONS = ("metadata", "sidecar", "class", "none")
SCHEDULES = ("linear", "linear_rescaled", "scaled_linear", "cosine", "sigmoid", "sigmoid_signal")
LEARNED = "learned"  # the schedule that is trained with the network
GIVEN = "given"  # the schedule whose β are listed in the configuration
TARGETS = ("eps", "x0", "v", "score")
WEIGHTINGS = ("simple", "min_snr", "p2", "variational_beta", "variational_posterior", "score_matching")
TIMESTEPS = ("uniform", "stratified", "importance")
SAMPLERS = (
    "ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_published", "dpmpp_2s", "dpmpp_sde", "dpmpp_2m_sde", "unipc",
    "euler", "euler_ancestral", "heun", "dpm2", "lms", "plms", "annealed_langevin", "predictor_corrector",
)  # fmt: skip
GRIDS = ("trailing", "leading", "linspace", "karras", "uniform_lambda")
CLASSIFIER_FORMS = ("score", "mean")
VARIANCES = ("posterior", "beta", "learned")
TRACKERS = ("tensorboard", "wandb")
PRECISIONS = ("no", "bf16", "fp16")
LR_SCHEDULES = ("constant", "cosine")
NULL_CAPTION = ""  # the caption of no condition: what dropout trains and classifier-free guidance leans on
NONE = "none"  # `autoencoder: none` is pixel space, `text: none` is unconditional


@dataclass(frozen=True)
class DataConfig:
    """Where images and captions come from, and how an image becomes [c, size, size] in [−1, 1]."""

    source: str = "folder"
    folder: str | None = None  # for source: folder
    captions: str = "metadata"  # folder: metadata.jsonl or .csv; sidecar: a.txt beside a.png; class: class_name/a.png; none
    text_column: str = "text"  # folder with metadata: the column that holds the caption
    caption_templates: tuple[str, ...] = ("a photo of a {}",)  # folder with classes: {} is the class name; one for each image
    image_size: int = 256
    image_channels: int = 3
    size: int | None = None  # procedural sources: number of training images; null: without end
    crop: str = "center"  # or random
    flip: bool = False  # mirror left–right with probability ½, but for captions that say left or right
    background: tuple[int, int, int] = (255, 255, 255)  # folder: the colour under transparent pixels, 0 to 255
    min_side: int | None = None  # folder: images with a shorter side are left out; null: a quarter of image_size
    max_skipped: float = 0.01  # folder: share of images and rows that may be unusable before the run stops
    accept_changes: bool = False  # folder: go on with a run although its images or captions have changed
    validation_fraction: float = 0.05  # folder: share of files, chosen by a hash of the file name
    workers: int = 0  # data worker processes per training process

    def __post_init__(self) -> None:
        one_of(self, SOURCES, "source")
        one_of(self, CAPTIONS, "captions")
        one_of(self, ("center", "random"), "crop")
        at_least(self, 1, "image_size", "image_channels", "size", "min_side")
        at_least(self, 0, "workers")
        between(self, 0.0, 0.5, "validation_fraction")
        between(self, 0.0, 1.0, "max_skipped")
        if (self.folder is not None) != (self.source == "folder"):
            raise ConfigError(f"folder goes with source: folder and with no other, got source {self.source!r} and folder {self.folder!r}")
        if self.size is not None and self.source in ("folder", "digits"):
            raise ConfigError(f"size is for procedural sources (shapes, shapes-two, textures), not for {self.source}")
        if self.flip and self.source in ("shapes-two", "digits"):
            raise ConfigError(f"flip must be false for {self.source}: a mirrored image no longer fits its caption")
        if not all(0 <= part <= 255 for part in self.background):
            raise ConfigError(f"background must be three numbers from 0 to 255, got {list(self.background)}")
        if not self.caption_templates or any(template.count("{}") != 1 for template in self.caption_templates):
            raise ConfigError(f"caption_templates must each hold {{}} once, got {list(self.caption_templates)}")
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Settings that the chosen source does not read must be left as they are, or somebody waits for an effect."""
        unread: dict[str, str] = {}
        if self.source != "folder":
            unread = dict.fromkeys(("captions", "background", "min_side", "max_skipped", "accept_changes"), "source: folder")
        if self.captions != "metadata" or self.source != "folder":
            unread["text_column"] = "captions: metadata"
        if self.captions != "class":
            unread["caption_templates"] = "captions: class"
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, where in unread.items():
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name} is for {where}: leave it out")

    @property
    def smallest_side(self) -> int:
        """Images of a folder with a shorter side than this are left out."""
        return max(1, self.image_size // 4) if self.min_side is None else self.min_side


@dataclass(frozen=True)
class TrainConfig:
    """What the one training loop needs. Schedules and intervals count optimizer updates."""

    steps: int = 100_000
    batch_size: int = 64  # the GLOBAL batch of one update
    micro_batch: int | None = None  # per process and forward pass; null: batch_size / processes
    lr: float = 1e-4
    lr_schedule: str = "constant"
    warmup: int = 0  # updates of linear rise
    lr_end: float = 0.0  # cosine: the last learning rate, as a fraction of lr
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0  # global gradient norm; null: none
    ema_decay: float = 0.9999  # ramped: min(ema_decay, (1 + k) / (10 + k)) at update k
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False
    seed: int = 0
    log_every: int = 50
    validate_every: int = 1000
    validation_size: int = 256
    sample_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size", "micro_batch", "log_every", "validate_every")
        at_least(self, 1, "validation_size", "sample_every", "checkpoint_every")
        at_least(self, 2, "keep_checkpoints")
        at_least(self, 0.0, "weight_decay", "warmup", "adam_eps")
        at_least(self, 1e-12, "lr", "clip")
        between(self, 0.0, 1.0, "lr_end")
        between(self, 0.0, 0.9999999, "ema_decay")
        between(self, 0, 2**63 - 1, "seed")
        one_of(self, PRECISIONS, "mixed_precision")
        one_of(self, LR_SCHEDULES, "lr_schedule")
        if not all(0.0 <= b < 1.0 for b in self.betas):
            raise ConfigError(f"betas must lie in [0, 1), got {list(self.betas)}")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ConfigError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise ConfigError(f"trackers: {tracker!r} is none of {', '.join(TRACKERS)}")


@dataclass(frozen=True)
class AutoencoderRun:
    """`ldm train-autoencoder`: stage 1."""

    run: str
    data: DataConfig
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _same("data.image_channels", self.data.image_channels, "model.image_channels", self.model.image_channels)
        _multiple("data.image_size", self.data.image_size, self.model.factor, "the autoencoder's factor")
        if self.train.mixed_precision == "fp16":
            raise ConfigError("train.mixed_precision fp16 overflows in the autoencoder: use bf16")


@dataclass(frozen=True)
class ClipConfig:
    """A small CLIP: transformers' text tower and vision tower of one width."""

    width: int = 128
    layers: int = 2
    heads: int = 2
    max_length: int = 77  # tokens, start and end included
    merges: int = 512  # learned BPE merges on top of the 2 × 256 byte symbols
    patch_size: int = 4
    projection: int = 64

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "layers", "heads", "patch_size", "projection")
        at_least(self, 0, "merges")
        between(self, 4, 77, "max_length")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True)
class ClipRun:
    """`ldm train-clip`: a text encoder where no pretrained one is at hand."""

    run: str
    data: DataConfig
    model: ClipConfig = field(default_factory=ClipConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _multiple("data.image_size", self.data.image_size, self.model.patch_size, "model.patch_size")
        if self.data.captions == "none":
            raise ConfigError("data.captions none: there is nothing to train a text encoder on")
        if self.train.micro_batch not in (None, self.train.batch_size):
            raise ConfigError(
                "train.micro_batch must be null: the contrastive loss compares the whole global batch, so accumulation is refused"
            )


@dataclass(frozen=True)
class UNetConfig:
    """The conditional U-Net, expressible as diffusers' UNet2DConditionModel.

    Channel counts of input and output follow from the latent; the context width from the text encoder.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_level: int = 2  # residual blocks per level going down; one more going up
    attention_levels: tuple[int, ...] = (0, 1, 2)  # levels with self- and cross-attention; the middle always has it
    heads: tuple[int, ...] = (8,)  # one number, or one per level
    transformer_layers: int = 1
    groups: int = 32
    linear_projection: bool = False  # the transformer's projections as Linear (SD 2) or 1×1 convolution (SD 1)
    scale_shift: bool = False  # timestep embedding scales and shifts, or is added
    vector_dim: int | None = None  # width of a vector condition added to the timestep embedding
    concat_channels: int = 0  # further input channels (mask, low-resolution image, …)

    def __post_init__(self) -> None:
        at_least(self, 1, "layers_per_level", "transformer_layers", "groups", "vector_dim")
        at_least(self, 0, "concat_channels")
        divisible(self.channels, self.groups)
        for level in self.attention_levels:
            if not 0 <= level < len(self.channels):
                raise ConfigError(f"attention_levels: {level} is no level of {len(self.channels)} (0 to {len(self.channels) - 1})")
        if len(self.heads) not in (1, len(self.channels)):
            raise ConfigError(f"heads must be one number or one per level ({len(self.channels)}), got {list(self.heads)}")
        for level, c in enumerate(self.channels):
            if (h := self.heads[level if len(self.heads) > 1 else 0]) < 1 or c % h:
                raise ConfigError(f"heads: {h} does not divide channels {c} of level {level}")


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule (math.md F4, F5). ``beta_start`` and ``beta_end``: null takes the published values."""

    name: str = "scaled_linear"
    num_steps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    betas: tuple[float, ...] | None = None  # for name: given, all of them
    shift: float = 1.0  # side of what is diffused over the side that the schedule was made for: λ' = λ − log(shift)
    zero_terminal_snr: bool = False  # no signal at all at the last step (v or x0 targets)
    start: str = "cosine"  # learned: the shape before training, cosine or linear in γ = −2λ
    ends: tuple[float, float] = (-10.0, 10.0)  # learned: γ of the first and of the last step before training
    lr: float = 3e-3  # learned: the learning rate of its table, with the run's warm-up and decay

    def __post_init__(self) -> None:
        one_of(self, (*SCHEDULES, LEARNED, GIVEN), "name")
        self._check_learned()
        at_least(self, 2, "num_steps")
        between(self, 1e-12, 0.999, "beta_start", "beta_end")
        between(self, 1e-3, 1e3, "shift")
        if self.name in ("cosine", "sigmoid_signal", GIVEN) and (self.beta_start, self.beta_end) != (None, None):
            raise ConfigError(f"beta_start and beta_end have no meaning for the {self.name} schedule: leave them out")
        if self.name == "linear_rescaled" and (self.beta_end or 0.02) * 1000 / self.num_steps >= 1:
            raise ConfigError(
                f"num_steps {self.num_steps} is too few for linear_rescaled: its last β, times 1000/num_steps, must be below 1"
            )
        if (self.betas is not None) != (self.name == GIVEN):
            raise ConfigError(f"betas go with name: given and with no other, got name {self.name!r}")
        if self.betas is not None:
            if len(self.betas) != self.num_steps:
                raise ConfigError(f"betas must be num_steps = {self.num_steps} numbers, got {len(self.betas)}")
            if not all(0 < beta < 1 for beta in self.betas[:-1]) or not 0 < self.betas[-1] <= 1:
                raise ConfigError("betas must lie strictly between 0 and 1 (the last may be 1)")

    def _check_learned(self) -> None:
        """Raise ConfigError for settings of a learned schedule that are out of range or have no schedule to act on."""
        one_of(self, ("cosine", "linear"), "start")
        at_least(self, 1e-12, "lr")
        if not -19.0 <= self.ends[0] <= -2.0 or not 2.0 <= self.ends[1] <= 19.0:
            raise ConfigError(f"ends must be γ in [-19, -2] and γ in [2, 19], got {list(self.ends)}")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        learned = ("start", "ends", "lr")
        for name in ("beta_start", "beta_end", "shift", "zero_terminal_snr") if self.name == LEARNED else learned:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name} has no meaning for {'a' if self.name == LEARNED else 'any but a'} learned schedule: leave it out"
                )

    @property
    def ends_without_signal(self) -> bool:
        """Whether the SNR of the last step is 0."""
        return self.zero_terminal_snr or (self.betas is not None and self.betas[-1] == 1)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network predicts, how timesteps are weighted, and how they are drawn (math.md L1, L2, L4, L7, L10)."""

    target: str = "eps"
    weighting: str = "simple"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    learned_variance: bool = False  # the U-Net also gives the reverse variance, in c further output channels
    vlb_weight: float = 0.001  # learned_variance: of the variational bound, the sum over all t in bits per dimension
    timesteps: str = "uniform"

    def __post_init__(self) -> None:
        one_of(self, TARGETS, "target")
        one_of(self, WEIGHTINGS, "weighting")
        one_of(self, TIMESTEPS, "timesteps")
        at_least(self, 1e-6, "min_snr_gamma", "p2_gamma")
        at_least(self, 1e-12, "vlb_weight")
        if self.vlb_weight != 0.001 and not self.learned_variance:
            raise ConfigError("vlb_weight is for learned_variance: true: leave it out")


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn from a trained model."""

    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5
    eta: float = 0.0  # ddim: 0 deterministic, 1 ancestral
    negative_prompt: str = ""
    seed: int = 0
    grid: str = "trailing"  # where the steps lie
    variance: str | None = None  # ddpm: posterior, beta or learned; null: learned where the model has it, else posterior
    guidance_rescale: float = 0.0  # share of the conditional output's deviation that guidance keeps
    guidance_interval: tuple[float, float] | None = None  # σ = s/a, lowest and highest, between which there is guidance
    dynamic_threshold: float | None = None  # pixel models: the quantile of |x̂_0| at which it is clipped
    autoguidance: str | None = None  # a run or folder: a weaker model of the same latents, target and schedule
    autoguidance_scale: float = 2.0
    classifier: str | None = None  # a run of train-classifier: the prompt is one of its classes' captions
    classifier_scale: float = 1.0
    classifier_form: str = "score"  # or mean, for ddpm

    def __post_init__(self) -> None:
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
        at_least(self, 1, "steps")
        between(self, 0.0, 100.0, "guidance_scale")
        between(self, 0.0, 1.0, "eta")
        between(self, 0, 2**63 - 1, "seed")


@dataclass(frozen=True)
class DiffusionRun:
    """`ldm train-ldm`: stage 2."""

    run: str
    data: DataConfig
    autoencoder: str  # a run of train-autoencoder, a model folder, or `none`: diffuse the pixels themselves
    text: str  # a run of train-clip, a CLIP text model by folder or name, or `none`: unconditional
    cache_latents: bool = True  # posterior moments encoded once, beside the run
    cache_captions: int = 20_000  # encode captions once when the set has at most so many; 0: always in the step
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    prompts: tuple[str, ...] = ()  # of the grids drawn while training; empty: the first validation captions

    def __post_init__(self) -> None:
        between(self, 0.0, 1.0, "caption_dropout")
        at_least(self, 0, "cache_captions")
        if self.data.captions == "none" and self.text != NONE:
            raise ConfigError("data.captions none: set text: none, or say where the captions are")
        if self.cache_latents and self.autoencoder != NONE and self.data.crop == "random":
            raise ConfigError("cache_latents cannot keep random crops: set data.crop=center or cache_latents=false")
        if self.cache_latents and self.autoencoder != NONE and self.data.source not in ("folder", "digits") and self.data.size is None:
            raise ConfigError("cache_latents needs a finite set: set data.size or cache_latents=false")
        for name, unset in (("vector_dim", None), ("concat_channels", 0)):
            if getattr(self.unet, name) != unset:
                raise ConfigError(f"unet.{name}: captioned images give no such condition, leave it unset")
        if self.schedule.ends_without_signal and self.objective.target in ("eps", "score"):
            raise ConfigError(
                f"objective.target {self.objective.target} says nothing of the image where the schedule leaves no signal: predict v or x0"
            )
        if self.sample.variance == "learned" and not self.objective.learned_variance:
            raise ConfigError("sample.variance learned needs objective.learned_variance: true")
        if self.schedule.name == LEARNED:
            self._check_learned_schedule()

    def _check_learned_schedule(self) -> None:
        if self.train.compile or self.train.mixed_precision == "fp16":
            raise ConfigError(
                "schedule.name learned differentiates the network by its input as well: set train.compile=false and no fp16 (bf16 or no)"
            )
        if self.objective.timesteps == "importance":
            raise ConfigError(
                "objective.timesteps importance lowers the variance of one loss, a learned schedule that of the bound at uniform t:"
                " choose uniform or stratified, or another schedule"
            )


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier of noisy samples (math.md L11): the down half of a U-Net, pooled."""

    channels: tuple[int, ...] = (64, 128, 256)
    layers_per_level: int = 1
    groups: int = 32

    def __post_init__(self) -> None:
        at_least(self, 1, "layers_per_level", "groups")
        divisible(self.channels, self.groups)


@dataclass(frozen=True)
class ClassifierRun:
    """`ldm train-classifier`: what classifier guidance asks."""

    run: str
    data: DataConfig
    diffusion: str  # a run of train-ldm or a model folder: its latents and its schedule are those of the classifier
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.data.source != "digits" and self.data.captions != "class":
            raise ConfigError("data: classes are those of source: digits, or of a folder with captions: class")
        if self.train.gradient_checkpointing:
            raise ConfigError("train.gradient_checkpointing: the classifier offers none, leave it out")


RUNS: dict[str, type[AutoencoderRun | ClipRun | DiffusionRun | ClassifierRun]] = {
    "train-autoencoder": AutoencoderRun,
    "train-clip": ClipRun,
    "train-ldm": DiffusionRun,
    "train-classifier": ClassifierRun,
}


def _same(name_a: str, a: Any, name_b: str, b: Any) -> None:
    if a != b:
        raise ConfigError(f"{name_a} is {a} but {name_b} is {b}: they must be equal")


def _multiple(name: str, value: int, factor: int, what: str) -> None:
    if value % factor:
        raise ConfigError(f"{name} {value} is not a multiple of {factor} ({what})")


T = TypeVar("T")


def build(cls: type[T], values: Any, path: str = "") -> T:
    """Make the dataclass ``cls`` from nested dicts and lists; every fault is one ConfigError that names the key."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path.rstrip('.') or 'the configuration'} must be a mapping of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            raise ConfigError(
                f"unknown key {path}{key}: " + (f"did you mean {path}{near[0]}?" if near else f"known are {', '.join(fields)}")
            )
    missing = [
        n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing key {path}{missing[0]}")
    try:
        return cls(**{key: _convert(hints[key], value, path + key) for key, value in values.items()})
    except ConfigError as error:
        text = str(error)
        if path and text.split(" ")[0].rstrip(":,") in fields:
            text = path + text
        raise ConfigError(text) from None


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, name + ".")  # type: ignore[arg-type]
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        items, parts = value if isinstance(value, (list, tuple)) else [value], typing.get_args(hint)
        if parts[-1] is not Ellipsis and len(items) != len(parts):
            raise ConfigError(f"{name} must be {len(parts)} values, got {list(items)}")
        return tuple(_convert(parts[0], item, f"{name}[{i}]") for i, item in enumerate(items))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name} must be {_TYPE_NAMES[hint]}, got {value!r}")
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{name}: interpolation (${{…}}) is not offered, write the value itself")
    return value


_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def load(cls: type[T], file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> T:
    """Read a YAML file, apply ``a.b=c`` overrides, and check everything. Raises ConfigError."""
    return build(cls, _read(Path(file), overrides))


def config_file(run: str | Path) -> Path:
    """The saved configuration of a run directory. Raises ConfigError where there is none."""
    file = Path(run) / "config.yaml"
    if not file.is_file():
        below = sorted(str(other.parent) for other in Path(run).glob("*/config.yaml"))
        hint = f"; there is one in {' and in '.join(below)}" if below else ""
        raise ConfigError(f"{run} is no run: it has no config.yaml{hint}")
    return file


def load_run(run: str | Path) -> AutoencoderRun | ClipRun | DiffusionRun | ClassifierRun:
    """The configuration of a run directory, whichever command of ``RUNS`` wrote it. Raises ConfigError."""
    file = config_file(run)
    values = _read(file, ())
    # a saved configuration is resolved: of the classes with the most keys in common, the smallest is the one that wrote it
    kind = max(RUNS.values(), key=lambda cls: (len(_names(cls) & values.keys()), -len(_names(cls))))
    try:
        return build(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _read(file: Path, overrides: list[str] | tuple[str, ...]) -> dict[Any, Any]:
    """The settings of a YAML file with ``a.b=c`` overrides applied, as plain dicts and lists; not yet checked."""
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not file.is_file():
        raise ConfigError(f"no configuration file {file}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        loaded = OmegaConf.load(file)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{file} must be a mapping of settings, not a list")
        tree = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        return typing.cast(dict[Any, Any], OmegaConf.to_container(tree, resolve=False, throw_on_missing=True))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None


def save(config: Any, file: str | Path) -> None:
    """Write the resolved configuration as YAML that ``load`` reads back to an equal object."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(to_dict(config)), file)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts and lists, as JSON and YAML hold them."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v) else list(v) if isinstance(v, tuple) else v
        for f in dataclasses.fields(config)
        for v in [getattr(config, f.name)]
    }
