"""A trained model: its networks, its process and its settings, read from files and written to them."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoencoder.layout import to_diffusers as autoencoder_to_diffusers
from ldm.config import NULL_CAPTION, ConfigError, SampleConfig, ScheduleConfig
from ldm.diffusion.condition import Condition
from ldm.diffusion.conditioner import Conditioner
from ldm.diffusion.schedule import Schedule
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
from ldm.interop.diffusers import index as layout
from ldm.interop.diffusers import schedulers
from ldm.interop.diffusers.folder import write_folder
from ldm.interop.diffusers.unet import unet_to_diffusers
from ldm.models.lora import shared_copy
from ldm.models.unet import UNet
from ldm.pipeline import habits
from ldm.pipeline.checks import (
    check_device,
    check_drawable,
    check_dtype,
    check_guidance,
    check_opening,
    check_sampling,
    check_start,
    sides_of,
)
from ldm.pipeline.codec import LatentCodec, codec_of, joined_hash, masked_condition
from ldm.pipeline.info import ModelInfo, load_unet
from ldm.pipeline.loras import Loras
from ldm.pipeline.prompts import CAPTION, Prompt, cut_prompts, texts_of

if TYPE_CHECKING:
    from typing import Self, TypeAlias

    from ldm.models.text import TextEncoder

    Text: TypeAlias = str
    Place: TypeAlias = str | Path
    Device: TypeAlias = torch.device | str
    Dtype: TypeAlias = torch.dtype
else:  # checked by the call itself, as the configuration checks them and with the argument's name
    Self = Text = Place = Device = Dtype = Any


@dataclass
class Model:
    """A trained model.

    Attributes:
        unet, schedule_config, target: the denoiser, its process, and what it predicts.
        codec: the autoencoder, or None: the samples are images.
        text: the text encoder, or None: unconditional.
        sample_size: side of the training images in pixels, the default.
        defaults: sampling settings for what a call leaves out.
        null_caption: the caption that means no condition.
        caption_dropout: share of captions dropped in training; None where unknown.
        files: of the weights; none before saving.
        conditioner: encodes values of the conditions beside the caption; None: there are none.
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
    files: tuple[Path, ...] = ()
    conditioner: Conditioner | None = None
    _loras: Loras = field(default_factory=Loras, init=False, repr=False)
    _blank: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _cut: set[str] = field(default_factory=set, init=False, repr=False)  # prompts whose cut was warned about

    def __post_init__(self) -> None:
        self.schedule = Schedule.from_config(self.schedule_config)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the U-Net's weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def factor(self) -> int:
        """Image side divided by the side of what is diffused."""
        return self.codec.autoencoder.config.factor if self.codec else 1

    @property
    def image_channels(self) -> int:
        """Channels of a picture."""
        return self.codec.autoencoder.config.image_channels if self.codec else self.unet.in_channels

    @property
    def learned_variance(self) -> bool:
        """True if the second half of the U-Net's output channels is the reverse variance."""
        return self.unet.spec.learned_variance

    @property
    def hash(self) -> str:
        """sha256 over the weights' files and the LoRAs loaded since, read for it; empty before saving."""
        return self._loras.hash(joined_hash(self.files) if self.files else "")

    def to(self, *place: Device | Dtype | None, device: Device | None = None, dtype: Dtype | None = None) -> Self:
        """Move every network to a device, cast it to a floating-point type, or both; returns itself.

        The schedule stays in float64, the sampler's state in float32, and decoding in float32.
        Raises ConfigError.
        """
        for given in place:
            if isinstance(given, torch.dtype):
                dtype = given
            elif given is not None:
                device = given
        if dtype is not None:
            self._cast(check_dtype(dtype))
        if device is not None:
            self._move(check_device(device))
        return self

    def _cast(self, dtype: torch.dtype) -> None:
        self.unet.to(dtype)
        if self.codec:
            self.codec.autoencoder.to(dtype)
        if self.text:
            self.text.model.to(dtype)  # type: ignore[arg-type]

    def _move(self, device: torch.device) -> None:
        self.unet.to(device)
        self.schedule = self.schedule.to(device)
        if self.codec:
            self.codec.autoencoder.to(device)
        if self.text:
            self.text.to(device)
        self._loras.to(device)

    # ------------------------------------------------------------ what the networks compute

    def condition(self, prompts: Sequence[Prompt | str], concat: Tensor | None = None) -> Condition:
        """The condition for these captions, for the values of those that are a Prompt, and for further channels."""
        context = vector = None
        if self.text is not None:
            context = self.text.encode(texts_of(prompts)).to(self.device, self.dtype)
        if self.conditioner is not None:
            values = [{} if isinstance(prompt, str) else prompt.values for prompt in prompts]
            vector = self.conditioner.encode(values).to(self.device, self.dtype)
        return Condition(context, vector, None if concat is None else concat.to(self.device, self.dtype))

    @property
    def guidable(self) -> bool:
        """True if there is a condition to guide by."""
        return self.text is not None or self.conditioner is not None

    def dropout_of(self, name: str) -> float | None:
        """Share of samples that lost this condition alone in training; None where unknown. Raises ConfigError."""
        shares: dict[str, float | None] = {} if self.text is None else {CAPTION: self.caption_dropout}
        if self.conditioner is not None:
            shares |= {config.name: config.dropout for config in self.conditioner.configs}
        if name not in shares:
            raise ConfigError(f"guidance_alone {name}: this model's conditions are: {', '.join(shares) or 'none'}")
        return shares[name]

    @property
    def null_share(self) -> float | None:
        """Share of samples that training showed without any condition, to lean on in guidance; None where unknown."""
        shares = [] if self.text is None else [self.caption_dropout]
        joint = 0.0
        if self.conditioner is not None:
            joint, shares = self.conditioner.joint_dropout, [*shares, *(c.dropout for c in self.conditioner.configs)]
        return None if None in shares else joint + (1 - joint) * math.prod(shares)  # type: ignore[arg-type]

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The U-Net's prediction, computed in its own precision and returned in float32, the sampler's.

        A model that fills masked parts, and is given none, draws everything.
        """
        if self.unet.spec.fills and cond.concat is None:
            cond = dataclasses.replace(cond, concat=self._everything(x_t))
        return self.unet(x_t.to(self.dtype), t, cond).float()

    @torch.no_grad()
    def _everything(self, x_t: Tensor) -> Tensor:
        """The further channels for a mask of everything, computed once for each size."""
        size = tuple(x_t.shape[-2:])
        if size not in self._blank:
            height, width = (self.factor * side for side in size)
            image, mask = torch.zeros(1, self.image_channels, height, width), torch.ones(1, 1, height, width)
            self._blank[size] = masked_condition(self.codec, image.to(self.device), mask.to(self.device))
        return self._blank[size].to(self.device, self.dtype).expand(len(x_t), -1, -1, -1)

    def check(self, settings: SampleConfig, sides: tuple[int, int] | None = None) -> None:
        """Raise ConfigError where the settings do not fit this model; ``sides`` left out are those of training."""
        sides = sides or sides_of(None, self.sample_size)
        check_sampling(settings, sides, self.schedule_config.num_steps, self.factor)
        if settings.variance == "learned" and not self.learned_variance:
            raise ConfigError(
                "variance learned: this model has not learned the reverse variance, take posterior or beta"
            )
        check_guidance(settings, self.codec is not None)
        for name in settings.alone():
            self.dropout_of(name)
        check_drawable(self.unet.spec, self.conditioner is not None)
        check_start(self.schedule_config, self.target, settings)
        for path, _ in settings.loras():
            self._loras.read(path, self.networks)

    def warn_cut(self, prompts: Iterable[str], settings: SampleConfig, stacklevel: int) -> None:
        """Warn once of each prompt or negative prompt that is longer than the text encoder takes."""
        if self.text and (line := cut_prompts(self.text, prompts, settings.negative_prompt, self._cut)):
            warnings.warn(line, stacklevel=stacklevel)

    # ------------------------------------------------------------ LoRAs

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that a LoRA may change: the U-Net and the text encoder's tower."""
        return {UNET: self.unet} | ({TEXT: self.text.tower} if self.text else {})

    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Let the networks compute with the LoRA at ``path`` (a file, folder or run), times ``scale``.

        It is added to those loaded before and holds for every later call, in all threads: call it
        while no thread draws. For one call: ``pipe(…, lora=…)``. Raises FolderError where it does not
        fit and ConfigError for a scale that is out of range, and then changes nothing.
        """
        self._loras.load(str(path), scale, self.networks)

    def merge_lora(self) -> None:
        """Add the loaded LoRAs to the weights for good, so that they cost nothing when drawing.

        To be without them, open the model again. Call it while no thread draws: the weights are those of all threads.
        """
        self._loras.merge()

    def with_loras(self, settings: SampleConfig) -> Self:
        """This model under the LoRAs of a call: the weights are shared, so that no other call sees them."""
        if not settings.loras():
            return self
        model = copy.copy(self)
        model.unet = shared_copy(self.unet)
        model.text = self.text and self.text.shared_copy()
        networks = model.networks
        for path, scale in settings.loras():
            for part, lora in self._loras.read(path, self.networks).items():
                lora.attach(scale, networks[part])
        return model

    # ------------------------------------------------------------ files

    @classmethod
    def from_pretrained(
        cls,
        path: Place,
        device: Device | None = None,
        dtype: Dtype = torch.float32,
        variant: Text | None = None,
        vae: Text | None = None,
        text: Text | None = None,
        **reading: Any,
    ) -> Self:
        """Open a run, a model folder (ours or diffusers') or a single file. Raises FolderError or ConfigError.

        Args:
            dtype: of the U-Net; the autoencoder and the text encoder stay in float32.
            device: left out, a GPU where there is one.
            variant: of a folder's weights: fp16, non_ema.
            vae, text: a run, folder or file with the autoencoder or text encoder to use instead of the
                model's own, or that it lacks.
            reading: what a single file does not state (``ldm.interop.open.read_file``):
                ``prediction``, ``tokenizer`` …
        """
        dtype, reading = habits.opening(dtype, reading)
        place = check_opening(path, device, dtype, variant=variant, vae=vae, text=text)
        info = ModelInfo.read(path, variant, vae and str(vae), text and str(text), **reading)
        if info.lora is not None:
            info.lora.check(info.hash)
        codec = codec_of(info.bundle.parts[VAE]) if info.autoencoder is not None else None
        encoder = None
        if info.has_text:
            from ldm.interop.text import text_of  # transformers takes seconds to import

            encoder = text_of(info.bundle, info.path)
        model = cls(
            load_unet(info).to(dtype), info.schedule, info.target, codec, encoder, info.sample_size, info.defaults,
            info.extra.get("null_caption", NULL_CAPTION), info.extra.get("caption_dropout"), info.bundle.files,
            info.conditioner,
        )  # fmt: skip
        if info.lora is not None:
            model.load_lora(info.lora.folder)
        return model.to(place)

    def save_pretrained(self, folder: str | Path, for_diffusers: bool = False) -> None:
        """Write the model folder.

        ``for_diffusers``: refuse (ConfigError, by name) what no pipeline of diffusers can express,
        instead of writing it under our own class name.
        """
        bundle = self.bundle()
        if for_diffusers and (reason := layout.ours_alone(bundle)) is not None:
            raise ConfigError(
                f"{layout.OUR_PIPELINE} {reason} cannot be expressed as a diffusers {layout.DIFFUSERS_PIPELINE}"
            )
        self.files = write_folder(bundle, Path(folder))
        self._loras.loaded.clear()  # merged, and so in the files

    def bundle(self) -> Bundle:
        """The model as its files hold it; the tensors are the networks' own. Raises ConfigError under live LoRAs."""
        if self._loras.live:
            raise ConfigError("a model with live LoRAs cannot be written: merge_lora() first, or open it without them")
        config = unet_to_diffusers(self.unet.spec, self.sample_size // self.factor)
        parts, tokenizer = {UNET: Part(config, self.unet.state_dict())}, {}
        if self.codec:
            vae = autoencoder_to_diffusers(self.codec.autoencoder.config)
            scale = {
                "sample_size": self.sample_size,
                "scaling_factor": self.codec.scale,
                "shift_factor": self.codec.shift or None,
            }
            parts[VAE] = Part({**vae, **scale}, self.codec.autoencoder.state_dict())
        if self.text:
            parts[TEXT], tokenizer = Part(self.text.config, self.text.tensors), self.text.tokenizer_files()
        extra = {
            "format": 1,
            "null_caption": self.null_caption,
            "caption_dropout": self.caption_dropout,
            "sample_size": self.sample_size,
            "defaults": dataclasses.asdict(self.defaults),
        }
        if self.conditioner is not None:
            extra["conditions"] = self.conditioner.to_dict()
        scheduler = schedulers.scheduler_to_diffusers(self.schedule_config, self.target, self.defaults)
        return Bundle(parts, scheduler, tokenizer, extra)
