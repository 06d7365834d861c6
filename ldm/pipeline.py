"""Text to images: one folder holds everything, and it is a diffusers pipeline folder.

pipe = ldm.Pipeline.from_pretrained("runs/demo")
images = pipe(["a small red circle on a white background"], steps=20, guidance_scale=3.0)
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from autoencoder.config import AutoencoderConfig
from autoencoder.layout import from_diffusers as autoencoder_from_diffusers
from autoencoder.layout import to_diffusers as autoencoder_to_diffusers
from autoencoder.model import AutoencoderKL
from autoencoder.posterior import DiagonalGaussian
from ldm.config import NULL_CAPTION, ConfigError, SampleConfig, ScheduleConfig, build
from ldm.data import streams
from ldm.data.images import to_pil, to_uint8
from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import EVERYWHERE, Gradient, Guidance, classifier_gradient, mean_shift
from ldm.diffusion.samplers.grids import GRIDS, check_steps
from ldm.diffusion.samplers.path import Callback as StepCallback
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.interop import diffusers as layout
from ldm.interop.classifier import ClassifierInfo, load_classifier
from ldm.interop.weights import FolderError, file_hash, read_json, read_module, write_json, write_module
from ldm.models.classifier import NoisyClassifier
from ldm.models.unet import UNet

if TYPE_CHECKING:
    from ldm.models.text import TextEncoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
LONG_STEP = 100.0  # factor of σ/α in a first step beyond which samplers that look ahead fail (docs/samplers.md)
EXTRA = "ldm.json"  # what the folder's other files have no place for: null caption, sampling defaults, hashes


@dataclass(frozen=True)
class LatentCodec:
    """Image to latent and back, with the scale and shift of a foreign autoencoder (1 and 0 for ours: folded into its weights)."""

    autoencoder: AutoencoderKL
    scale: float = 1.0
    shift: float = 0.0
    file: Path | None = None  # where the weights were read

    @property
    def hash(self) -> str | None:
        """sha256 of the weights' file; None for an autoencoder that was read from none."""
        return None if self.file is None else file_hash(self.file)

    def latent(self, posterior: DiagonalGaussian, noise: Tensor) -> Float[Tensor, "b c h w"]:
        """A draw of the normalised latent from a posterior."""
        return (posterior.sample(noise) - self.shift) * self.scale

    def decode(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b C H W"]:
        """Images in about [−1, 1]; computed in float32, since half precision overflows in published autoencoders."""
        return self.autoencoder.decode(latent.float() / self.scale + self.shift)


@dataclass
class Pipeline:
    """A trained model, ready to draw from.

    Attributes:
        unet, schedule_config, target: the denoiser, its process, and what it predicts.
        codec: the autoencoder, or None: the samples are images.
        text: the text encoder, or None: unconditional.
        sample_size: side of the training images in pixels, the default.
        defaults: settings for arguments that a call leaves out.
        null_caption: the caption that stands for no condition.
        caption_dropout: share of captions dropped in training; None where unknown.
    """

    unet: UNet
    schedule_config: ScheduleConfig
    target: str
    codec: LatentCodec | None
    text: TextEncoder | None
    sample_size: int
    defaults: SampleConfig = field(default_factory=SampleConfig)
    null_caption: str = NULL_CAPTION
    caption_dropout: float | None = None
    hash: str = ""  # sha256 over the weights' files; empty before saving
    _weaker: dict[str, Pipeline] = field(default_factory=dict, init=False, repr=False)  # autoguidance's, as they were named
    _classifiers: dict[str, tuple[ClassifierInfo, NoisyClassifier]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.schedule = Schedule.from_config(self.schedule_config)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def factor(self) -> int:
        """Image side divided by the side of what is diffused."""
        return self.codec.autoencoder.config.factor if self.codec else 1

    @property
    def learned_variance(self) -> bool:
        """Whether the second half of the U-Net's output channels gives the reverse variance."""
        return self.unet.out_channels == 2 * self.unet.in_channels

    def to(self, device: torch.device | str) -> Pipeline:
        """Move every network to ``device``."""
        self.unet.to(device)
        self.schedule = self.schedule.to(device)
        if self.codec:
            self.codec.autoencoder.to(device)
        if self.text:
            self.text.to(device)
        for weak in self._weaker.values():
            weak.to(device)
        for _, classifier in self._classifiers.values():
            classifier.to(device)
        return self

    def __call__(
        self, prompts: str | Sequence[str], *, steps: int | None = None, guidance_scale: float | None = None, sampler: str | None = None,
        seed: int | None = None, negative_prompt: str | None = None, eta: float | None = None, size: int | None = None,
        batch_size: int = 16, callback: Callable[[int, int], None] | None = None, **further: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """One picture per prompt. Image i of a seed starts from the same noise at any batch size.

        Args:
            prompts: one or several captions (ignored by an unconditional model, where they only count).
            steps, guidance_scale, sampler, seed, negative_prompt, eta: left out, the model's own defaults hold.
            size: side in pixels, a multiple of the autoencoder's factor; left out, that of training.
            batch_size: pictures computed together.
            callback: called with (pictures finished, pictures in all) after each batch.
            further: any other field of SampleConfig: ``guidance_rescale``, ``guidance_interval``, ``autoguidance``, ``classifier`` …

        Raises:
            ConfigError: an argument is out of range; the message names it.
        """
        given = {
            "steps": steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
            "seed": seed,
            "negative_prompt": negative_prompt,
            "eta": eta,
            **further,
        }
        settings = dataclasses.replace(self.defaults, **{k: v for k, v in given.items() if v is not None})
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        pictures = []
        for images in self.sample(prompts, settings, size=size, batch_size=batch_size):
            pictures += to_pil(to_uint8(images))
            if callback:
                callback(len(pictures), len(prompts))
        return pictures

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        settings: SampleConfig,
        *,
        size: int | None = None,
        batch_size: int = 16,
        indices: Sequence[int] | None = None,
        callback: StepCallback | None = None,
    ) -> Iterator[Float[Tensor, "b C H W"]]:
        """Batches of images in about [−1, 1], in the order of the prompts.

        ``indices``: the number of each image within the seed, which determines its noise (left out: 0, 1, …); a process
        that draws a share of the images passes theirs.
        ``callback(step, x, x0)``: after each step of each batch, with the sample and the x̂_0 that the step used, both as
        diffused; what it returns, unless None, is what the sampler goes on with.
        """
        size = self.sample_size if size is None else size
        self.check(settings, size)
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if indices is not None and len(indices) != len(prompts):
            raise ConfigError(f"indices must number the {len(prompts)} prompts, got {len(indices)}")
        if self.caption_dropout == 0.0 and settings.guidance_scale not in (0.0, 1.0):
            warnings.warn("this model was trained without caption dropout: guidance has no unconditional model to lean on", stacklevel=3)
        if settings.classifier is not None:
            for caption in prompts:  # all known, before the first is drawn
                self._classifier(settings.classifier)[0].label(caption)
        indices = range(len(prompts)) if indices is None else indices
        shape = (self.unet.in_channels, size // self.factor, size // self.factor)
        sampler, grid = SAMPLERS[settings.sampler], GRIDS[settings.grid](self.schedule, settings.steps)
        options = {name: getattr(settings, name) for name in sampler.options}
        if sampler.looks_ahead and (ratio := first_step(self.schedule, grid)) > LONG_STEP:
            warnings.warn(
                f"{settings.sampler} on the {settings.grid} grid: the first of {settings.steps} steps lowers the noise {ratio:.0f}-fold,"
                " too much for it; take grid karras, or another sampler such as dpmpp_2m (docs/samplers.md)",
                stacklevel=3,
            )
        for i in range(0, len(prompts), batch_size):
            texts, numbers = list(prompts[i : i + batch_size]), indices[i : i + batch_size]
            if (gradient := self._gradient(texts, settings, "mean")) is not None:
                options["mean_shift"] = mean_shift(gradient, self.schedule, settings.guidance_interval or EVERYWHERE)
            latent = sampler.function(
                self.denoiser(texts, settings), self._noise(settings.seed, "x_T", numbers, shape), grid,
                lambda step, numbers=numbers: self._noise(settings.seed, f"step {step}", numbers, shape), callback=callback, **options,
            )  # fmt: skip
            yield self.codec.decode(latent) if self.codec else latent

    def denoiser(self, captions: list[str], settings: SampleConfig) -> Denoiser:
        """What samplers call for these captions, guidance included."""
        cond, null = self.condition(captions), self.condition([settings.negative_prompt or self.null_caption] * len(captions))
        guidance = Guidance(
            self._predict, cond, null, self.schedule, self.target, self.learned_variance,
            scale=settings.guidance_scale if self.text else 1.0,
            rescale=settings.guidance_rescale,
            interval=settings.guidance_interval or EVERYWHERE,
            weak=None if settings.autoguidance is None else self._weak(settings.autoguidance, captions, settings),
            weak_scale=settings.autoguidance_scale,
            gradient=self._gradient(captions, settings, "score"),
            threshold=settings.dynamic_threshold,
        )  # fmt: skip
        return Denoiser(self.schedule, self.target, guidance, self.learned_variance)

    def _weak(self, path: str, captions: list[str], settings: SampleConfig) -> Denoise:
        """The model at ``path``, under the condition from which autoguidance starts. Raises ConfigError where it does not fit."""
        if path not in self._weaker:
            weak = Pipeline.from_pretrained(path, self.device, self.unet.conv_in.weight.dtype)
            self._check_fits(f"autoguidance {path}", weak.codec.hash if weak.codec else None, weak.unet.in_channels, weak.schedule)
            if weak.target != self.target:
                raise ConfigError(f"autoguidance {path}: its target is {weak.target}, this model's is {self.target}: they must be equal")
            if (weak.text is None) != (self.text is None):
                raise ConfigError(f"autoguidance {path}: one of the models has a text encoder and the other has none")
            self._weaker[path] = weak
        weak = self._weaker[path]
        null = settings.negative_prompt or weak.null_caption
        cond = weak.condition(captions if settings.guidance_scale else [null] * len(captions))
        return lambda x_t, t: weak._predict(x_t, t, cond)[:, : self.unet.in_channels]

    def _gradient(self, captions: list[str], settings: SampleConfig, form: str) -> Gradient | None:
        """w ∇ log p(y | x_t) of the classifier, y the class of each caption; None where the settings ask for none in this form."""
        if settings.classifier is None or settings.classifier_form != form or settings.classifier_scale == 0:
            return None
        info, classifier = self._classifier(settings.classifier)
        labels = torch.tensor([info.label(caption) for caption in captions], device=self.device)
        return classifier_gradient(classifier, labels, settings.classifier_scale)

    def _classifier(self, path: str) -> tuple[ClassifierInfo, NoisyClassifier]:
        """The classifier at ``path``. Raises ConfigError where it does not fit this model."""
        if path not in self._classifiers:
            info, classifier = load_classifier(path)
            self._check_fits(f"classifier {path}", info.autoencoder, info.in_channels, Schedule.from_config(info.schedule))
            self._classifiers[path] = info, classifier.to(self.device)
        return self._classifiers[path]

    def _check_fits(self, name: str, autoencoder: str | None, channels: int, schedule: Schedule) -> None:
        """Raise ConfigError where another network was not trained on this model's latents or schedule."""
        mine = self.codec.hash if self.codec else None
        if channels != self.unet.in_channels or (autoencoder is None) != (self.codec is None):
            raise ConfigError(f"{name}: its latents have {channels} channels{'' if autoencoder else ' (pixels)'}, this model's"
                              f" {self.unet.in_channels}{'' if self.codec else ' (pixels)'}")  # fmt: skip
        if autoencoder != mine:
            raise ConfigError(
                f"{name}: its latents are those of another autoencoder ({autoencoder and autoencoder[:12]}, not {mine and mine[:12]})"
            )
        a, b = schedule.alphas_cumprod.cpu(), self.schedule.alphas_cumprod.cpu()
        if len(a) != len(b):
            raise ConfigError(f"{name}: its schedule has {len(a)} steps, this model's {len(b)}")
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-6):
            raise ConfigError(f"{name}: its schedule is another than this model's (ᾱ differs by up to {float((a - b).abs().max()):.2g})")

    def _noise(self, seed: int, name: str, numbers: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "b c h w"]:
        noise = np.stack([streams.normal(seed, f"sample/{name}", n, shape) for n in numbers])
        return torch.from_numpy(noise).to(self.device)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network in its own precision; the sampler's state stays in float32."""
        return self.unet(x_t.to(self.unet.conv_in.weight.dtype), t, cond).float()

    def condition(self, captions: list[str]) -> Condition:
        """What the U-Net is given for these captions."""
        if self.text is None:
            return Condition()
        return Condition(context=self.text.encode(captions).to(self.device, self.unet.conv_in.weight.dtype))

    def check(self, settings: SampleConfig, size: int) -> None:
        """Raise ConfigError where the settings do not fit this model."""
        check_sampling(settings, size, self.schedule_config.num_steps, self.factor)
        if settings.variance == "learned" and not self.learned_variance:
            raise ConfigError("variance learned: this model has not learned the reverse variance, take posterior or beta")
        check_guidance(settings, self.codec is not None)

    def save_pretrained(self, folder: str | Path, for_diffusers: bool = False) -> None:
        """Write the model folder.

        ``for_diffusers``: refuse (ConfigError, by name) what a StableDiffusionPipeline cannot express, instead of
        writing it under our own class name.
        """
        folder = Path(folder)
        parts = (self.codec is not None, self.text is not None)
        reason = layout.ours_alone(*parts, self.unet.config, self.learned_variance, self.target)
        index = layout.model_index(*parts, self.target, reason is not None)
        if for_diffusers and reason is not None:
            raise ConfigError(f"{layout.OUR_PIPELINE} {reason} cannot be expressed as a diffusers {layout.THEIR_PIPELINE}")
        side = self.sample_size // self.factor
        unet = layout.unet_to_diffusers(self.unet.config, self.unet.in_channels, self.unet.out_channels, self.unet.context_dim, side)
        write_json(folder / "unet/config.json", unet)
        write_module(self.unet, folder / "unet" / WEIGHTS)
        files = ["unet/" + WEIGHTS]
        if self.codec:
            vae = autoencoder_to_diffusers(self.codec.autoencoder.config)
            scale = {"sample_size": self.sample_size, "scaling_factor": self.codec.scale, "shift_factor": self.codec.shift or None}
            write_json(folder / "vae/config.json", {**vae, **scale})
            write_module(self.codec.autoencoder, folder / "vae" / WEIGHTS)
            files.append("vae/" + WEIGHTS)
        if self.text:
            self.text.save(folder)
            files.append("text_encoder/model.safetensors")
        write_json(folder / "scheduler/scheduler_config.json", layout.scheduler_to_diffusers(self.schedule_config, self.target))
        self.hash = _hash(folder, files)
        extra = {
            "format": 1,
            "null_caption": self.null_caption,
            "caption_dropout": self.caption_dropout,
            "sample_size": self.sample_size,
            "defaults": dataclasses.asdict(self.defaults),
            "sha256": {name: file_hash(folder / name) for name in files},
        }
        write_json(folder / EXTRA, extra)
        write_json(folder / "model_index.json", index)  # last: a folder with it is complete

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Pipeline:
        """Open a run or a model folder, ours or diffusers'. Raises FolderError or ConfigError.

        ``dtype`` is the U-Net's; the autoencoder stays in float32. ``device``: left out, a GPU where there is one.
        """
        info = FolderInfo.read(path)
        folder, unet_config = info.folder, info.unet
        unet = read_module(lambda: UNet(*unet_config), folder / "unet" / WEIGHTS)
        files = ["unet/" + WEIGHTS]
        codec = None
        if info.autoencoder is not None:
            codec = load_codec(folder)
            files.append("vae/" + WEIGHTS)
        text = None
        if info.has_text:
            from ldm.models.text import TextEncoder  # transformers takes seconds to import

            try:
                text = TextEncoder.from_pretrained(str(folder))
            except ValueError as error:
                raise FolderError(str(error)) from None
            files.append("text_encoder/model.safetensors")
        pipe = cls(
            unet.to(dtype), info.schedule, info.target, codec, text, info.sample_size, info.defaults,
            info.extra.get("null_caption", NULL_CAPTION), info.extra.get("caption_dropout"), _hash(folder, files),
        )  # fmt: skip
        return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class FolderInfo:
    """What a model folder says of itself, read without its weights."""

    folder: Path
    unet: tuple[Any, ...]  # UNet's arguments
    autoencoder: dict[str, Any] | None
    has_text: bool
    schedule: ScheduleConfig
    target: str
    extra: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> FolderInfo:
        """Find the model folder of a run, or take the folder itself. Raises FolderError or ConfigError."""
        folder = find_model(path)
        index = read_json(folder / "model_index.json")
        if index.get("_class_name") not in (layout.OUR_PIPELINE, layout.THEIR_PIPELINE):
            raise ConfigError(
                f"{folder}: a {index.get('_class_name')} cannot be opened, only {layout.THEIR_PIPELINE} and {layout.OUR_PIPELINE}"
            )
        schedule, target = layout.scheduler_from_diffusers(read_json(folder / "scheduler/scheduler_config.json"))
        has_vae, has_text = (bool(index.get(key) and index[key][0]) for key in ("vae", "text_encoder"))
        return cls(
            folder,
            layout.unet_from_diffusers(read_json(folder / "unet/config.json")),
            read_json(folder / "vae/config.json") if has_vae else None,
            has_text,
            schedule,
            target,
            read_json(folder / EXTRA) if (folder / EXTRA).exists() else {},
        )

    @property
    def factor(self) -> int:
        """Image side divided by the side of what is diffused."""
        return autoencoder_from_diffusers(self.autoencoder).factor if self.autoencoder else 1

    @property
    def sample_size(self) -> int:
        """Side of the training images in pixels."""
        return self.extra.get("sample_size") or read_json(self.folder / "unet/config.json").get("sample_size", 64) * self.factor

    @property
    def defaults(self) -> SampleConfig:
        """Sampling settings for what a caller leaves out."""
        return build(SampleConfig, self.extra.get("defaults", {}), "defaults.")


def find_model(path: str | Path) -> Path:
    """The model folder of a run directory, or the folder itself. Raises FolderError saying what is there instead."""
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "model_index.json").is_file():
            return folder
    if not path.exists():
        raise FolderError(f"no run or model folder {path}")
    if (path / "config.yaml").is_file():
        raise FolderError(f"{path} is a run without a diffusion model yet: train one with `ldm train-ldm`, or let it finish")
    raise FolderError(f"{path} holds no model_index.json, neither itself nor in model/")


def find_autoencoder(path: str | Path) -> Path:
    """The folder with an autoencoder's config.json: of a run, of a model folder, or itself. Raises FolderError."""
    path = Path(path)
    for folder in (path / "model/vae", path / "vae", path):
        if (folder / "config.json").is_file():
            return folder
    if not path.exists():
        raise FolderError(f"no autoencoder {path}: train one with `ldm train-autoencoder`, or name a folder that holds one")
    raise FolderError(f"{path} holds no autoencoder, neither in model/vae nor in vae/: let its training finish")


def load_codec(path: str | Path) -> LatentCodec:
    """The autoencoder of a run or folder, frozen, float32, with its latent scale. Raises FolderError or ConfigError."""
    folder = find_autoencoder(path)
    layout_ = read_json(folder / "config.json")
    config = autoencoder_from_diffusers(layout_)
    autoencoder = read_module(lambda: AutoencoderKL(config), folder / WEIGHTS).float()
    return LatentCodec(autoencoder, layout_.get("scaling_factor", 0.18215), layout_.get("shift_factor") or 0.0, folder / WEIGHTS)


def autoencoder_config(path: str | Path) -> AutoencoderConfig:
    """The settings of the autoencoder of a run or folder; no weights are read. Raises FolderError or ConfigError."""
    return autoencoder_from_diffusers(read_json(find_autoencoder(path) / "config.json"))


def autoencoder_hash(path: str | Path) -> str:
    """sha256 of the autoencoder's weights file."""
    return file_hash(find_autoencoder(path) / WEIGHTS)


def first_step(schedule: Schedule, grid: Tensor) -> float:
    """By what factor the first step of a grid lowers σ/α; 1 where it is the only one, which ends at clean data."""
    level = schedule.sigma(grid[:2]) / schedule.alpha(grid[:2])
    return float(level[0] / level[1]) if level[1] > 0 else 1.0


def check_sampling(settings: SampleConfig, size: int, num_steps: int, factor: int) -> None:
    """Raise ConfigError unless the settings fit a model of T = ``num_steps`` and this autoencoder factor."""
    try:
        check_steps(num_steps, settings.steps)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if settings.steps < (fewest := SAMPLERS[settings.sampler].fewest):
        raise ConfigError(f"steps must be at least {fewest} for the {settings.sampler} sampler, got {settings.steps}")
    for name in ("eta", "variance"):
        readers = [sampler for sampler, entry in SAMPLERS.items() if name in entry.options]
        if settings.sampler not in readers and getattr(settings, name) != getattr(SampleConfig, name):
            raise ConfigError(f"{name} is for {' and '.join(readers)}, and {settings.sampler} does not read it: leave it out")
    if size < factor or size % factor:
        raise ConfigError(f"size must be a positive multiple of {factor} (the autoencoder's factor), got {size}")


def check_guidance(settings: SampleConfig, latents: bool) -> None:
    """Raise ConfigError for guidance that cannot be had, or that somebody would wait for in vain."""
    if settings.dynamic_threshold is not None and latents:
        raise ConfigError("dynamic_threshold is for models of pixels, whose x̂_0 lies in [−1, 1]: latents do not, leave it out")
    if settings.classifier is not None and settings.classifier_form == "mean" and settings.sampler != "ddpm":
        raise ConfigError(
            f"classifier_form mean moves the mean of ancestral sampling: take sampler ddpm, not {settings.sampler}, or form score"
        )
    for owner, names in (("classifier", ("classifier_scale", "classifier_form")), ("autoguidance", ("autoguidance_scale",))):
        for name in names:
            if getattr(settings, owner) is None and getattr(settings, name) != getattr(SampleConfig, name):
                raise ConfigError(f"{name} is for {owner}: name one, or leave it out")


def _hash(folder: Path, files: list[str]) -> str:
    import hashlib

    return hashlib.sha256("".join(file_hash(folder / name) for name in files).encode()).hexdigest()
