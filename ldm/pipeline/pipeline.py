"""Text to images: one folder holds everything, and it is a diffusers pipeline folder.

pipe = ldm.Pipeline.from_pretrained("runs/demo")
images = pipe(["a small red circle on a white background"], steps=20, guidance_scale=3.0)
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from autoencoder.config import shown
from autoencoder.layout import to_diffusers as autoencoder_to_diffusers
from ldm.config import NULL_CAPTION, ConfigError, SampleConfig, ScheduleConfig
from ldm.config.sample import check_lora_scale
from ldm.config.values import changed, typed
from ldm.data.transforms import to_pil, to_uint8
from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import EVERYWHERE, Guidance, mean_shift
from ldm.diffusion.samplers.nodes import Callback as StepCallback
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.files.disk import file_hash
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
from ldm.interop.diffusers import index as layout
from ldm.interop.diffusers import schedulers
from ldm.interop.diffusers.folder import write_folder
from ldm.interop.diffusers.unet import unet_to_diffusers
from ldm.interop.lora import find_lora, read_lora
from ldm.models.lora import Lora, shared_copy
from ldm.models.unet import UNet
from ldm.pipeline.checks import (
    LONG_STEP,
    check_drawable,
    check_guidance,
    check_opening,
    check_prompts,
    check_sampling,
    check_start,
    first_step,
    grid_of,
)
from ldm.pipeline.codec import LatentCodec, codec_of, joined_hash
from ldm.pipeline.draw import draw_noise
from ldm.pipeline.guides import Guides
from ldm.pipeline.info import ModelInfo, load_unet
from ldm.pipeline.watch import Watch, unseen

if TYPE_CHECKING:
    from typing import SupportsFloat, SupportsIndex, TypeAlias

    from ldm.models.text import TextEncoder

    Whole: TypeAlias = SupportsIndex
    Number: TypeAlias = SupportsFloat
    Text: TypeAlias = str
    Place: TypeAlias = str | Path
    Device: TypeAlias = torch.device | str
    Dtype: TypeAlias = torch.dtype
else:  # checked by the call itself, as the configuration checks them and with the argument's name
    Whole = Number = Text = Place = Device = Dtype = Any
SHOWN = 3  # prompts that a warning quotes
QUOTED = 200  # characters of what is dropped of one
_READING = RLock()  # a LoRA that several threads ask for at once is read once


@dataclass
class Pipeline:
    """A trained model, ready to draw from.

    Several threads may draw at the same time, each with LoRAs and guides of its own. What changes the model for all
    (``load_lora``, ``merge_lora``, ``to``) is for a moment when none draws.

    Attributes:
        unet, schedule_config, target: the denoiser, its process, and what it predicts.
        codec: the autoencoder, or None: the samples are images.
        text: the text encoder, or None: unconditional.
        sample_size: side of the training images in pixels, the default.
        defaults: settings for arguments that a call leaves out.
        null_caption: the caption that means no condition.
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
    files: tuple[Path, ...] = ()  # of the weights; none before saving
    _cut: set[str] = field(default_factory=set, init=False, repr=False)  # prompts whose cut was warned about
    _guides: Guides = field(default_factory=Guides, init=False, repr=False)
    _loras: dict[tuple[Path, int, int], dict[str, Lora]] = field(
        default_factory=dict, init=False, repr=False
    )  # by file, time, size
    _loaded: list[tuple[str, float]] = field(default_factory=list, init=False, repr=False)  # LoRAs, live and merged
    _live: list[tuple[Lora, float, Callable[[], None]]] = field(
        default_factory=list, init=False, repr=False
    )  # with how to take it off

    def __post_init__(self) -> None:
        self.schedule = Schedule.from_config(self.schedule_config)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.unet.conv_in.weight.device

    @property
    def hash(self) -> str:
        """sha256 over the weights' files and the LoRAs loaded since, read for it; empty before saving."""
        digest = joined_hash(self.files) if self.files else ""
        for path, scale in self._loaded:
            digest = sha256(f"{digest} {file_hash(find_lora(path))} {scale}".encode()).hexdigest()
        return digest

    @property
    def factor(self) -> int:
        """Image side divided by the side of what is diffused."""
        return self.codec.autoencoder.config.factor if self.codec else 1

    @property
    def learned_variance(self) -> bool:
        """True if the second half of the U-Net's output channels is the reverse variance."""
        return self.unet.spec.learned_variance

    def to(self, device: torch.device | str) -> Pipeline:
        """Move every network to ``device``."""
        self.unet.to(device)
        self.schedule = self.schedule.to(device)
        if self.codec:
            self.codec.autoencoder.to(device)
        if self.text:
            self.text.to(device)
        self._guides.to(device)
        for lora in (lora for loras in self._loras.values() for lora in loras.values()):
            lora.to(device)
        return self

    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Let the networks compute with the LoRA at ``path`` (a file, folder or run), times ``scale``, besides those loaded before.

        It holds for every later call, in all threads; call it while no thread draws. For one call: ``pipe(…, lora=…)``.
        Raises FolderError where it does not fit and ConfigError for a scale that is out of range, and then changes nothing.
        """
        check_lora_scale(scale, path)
        self._live += [(lora, scale, lora.attach(scale)) for lora in self._lora(str(path)).values()]
        self._loaded.append((str(path), scale))

    def merge_lora(self) -> None:
        """Add the loaded LoRAs to the weights for good, which costs nothing when drawing. To be without them, open the model again.

        Call it while no thread draws: the weights are those of all threads.
        """
        for lora, scale, detach in self._live:
            detach()
            lora.merge(scale)
        self._live.clear()

    def _lora(self, path: str) -> dict[str, Lora]:
        """The changes of each network by the LoRA at ``path``, not attached."""
        file = find_lora(path)
        version = file, file.stat().st_mtime_ns, file.stat().st_size  # a file that was written anew is read anew
        with _READING:
            if version not in self._loras:
                self._loras[version] = {
                    part: lora.to(self.device) for part, lora in read_lora(file, self.networks).items()
                }
            return self._loras[version]

    def _under(self, settings: SampleConfig) -> Pipeline:
        """This model under the LoRAs of a call: the weights are shared, so that no other call sees them."""
        wanted = [(part, lora, scale) for path, scale in settings.loras() for part, lora in self._lora(path).items()]
        if not wanted:
            return self
        pipe = copy.copy(self)
        pipe.unet = shared_copy(self.unet)
        pipe.text = self.text and self.text.shared_copy()
        networks = pipe.networks
        for part, lora, scale in wanted:
            lora.attach(scale, networks[part])
        return pipe

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The networks that a LoRA may change: the U-Net and the text encoder's tower."""
        return {UNET: self.unet} | ({TEXT: self.text.tower} if self.text else {})

    def __call__(
        self, prompts: Text | Iterable[Text], *, steps: Whole | None = None, guidance_scale: Number | None = None,
        sampler: Text | None = None, seed: Whole | None = None, negative_prompt: Text | None = None, eta: Number | None = None,
        size: Whole | None = None, batch_size: Whole = 16, callback: Callable[[int, int], None] | None = None, **further: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """One picture per prompt. Image i of a seed starts from the same noise at any batch size.

        Args:
            prompts: one or several captions (ignored by an unconditional model, where they only count); "" is the caption that
                says nothing.
            steps, guidance_scale, sampler, seed, negative_prompt, eta: left out, the model's own defaults hold.
            size: side in pixels, a multiple of the autoencoder's factor; left out, that of training.
            batch_size: pictures computed together.
            callback: called with (pictures finished, pictures in all) after each batch.
            further: any other field of SampleConfig: ``guidance_rescale``, ``guidance_interval``, ``autoguidance``, ``classifier`` …

        Raises:
            ConfigError: an argument is unknown, of another type or out of range; the message names it.
            NonFiniteError: something computed is NaN or infinite; the message names the part and the step.
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
        given = {name: value for name, value in given.items() if value is not None}
        settings = changed(self.defaults, given)
        texts = check_prompts(prompts)
        if callback is not None and not callable(callback):
            raise ConfigError(f"callback must be a function, got {shown(callback)}")
        pictures = []
        for images in self.sample(texts, settings, size=size, batch_size=batch_size):
            pictures += to_pil(to_uint8(images))
            if callback:
                callback(len(pictures), len(texts))
        return pictures

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        settings: SampleConfig,
        *,
        size: Whole | None = None,
        batch_size: Whole = 16,
        indices: Sequence[int] | None = None,
        callback: StepCallback | None = None,
    ) -> Iterator[Float[Tensor, "b C H W"]]:
        """Batches of images in about [−1, 1], in the order of the prompts.

        ``indices``: the number of each image within the seed, which determines its noise (left out: 0, 1, …); a process
        that draws a share of the images passes theirs.
        ``callback(step, x, x0)``: after each step of each batch, with the sample and the x̂_0 that the step used, both as
        diffused; what it returns, unless None, replaces the sample.
        """
        side: int = self.sample_size if size is None else typed(int, size, "size")
        together: int = typed(int, batch_size, "batch_size")
        prompts = check_prompts(prompts)
        self.check(settings, side)
        if together < 1:
            raise ConfigError(f"batch_size must be at least 1, got {together}")
        if indices is not None and len(indices) != len(prompts):
            raise ConfigError(f"indices must number the {len(prompts)} prompts, got {len(indices)}")
        if self.caption_dropout == 0.0 and settings.guidance_scale not in (0.0, 1.0):
            warnings.warn(
                "this model was trained without caption dropout: guidance has no unconditional model to lean on",
                stacklevel=3,
            )
        if settings.classifier is not None:
            for caption in prompts:  # all known, before the first is drawn
                self._guides.classifier(self, settings.classifier)[0].label(caption)
        self.warn_cut(prompts, settings, 4)
        indices = range(len(prompts)) if indices is None else indices
        shape = (self.unet.in_channels, side // self.factor, side // self.factor)
        sampler, grid = SAMPLERS[settings.sampler], grid_of(self.schedule, settings)
        options = {name: getattr(settings, name) for name in sampler.options}
        if sampler.looks_ahead and (ratio := first_step(self.schedule, grid)) > LONG_STEP:
            warnings.warn(
                f"{settings.sampler} on the {settings.grid} grid: the first of {settings.steps} steps lowers the noise {ratio:.0f}-fold,"
                " too much for it; take grid karras, or another sampler such as dpmpp_2m (docs/samplers.md)",
                stacklevel=3,
            )
        for i in range(0, len(prompts), together):
            texts, numbers = list(prompts[i : i + together]), indices[i : i + together]
            watch = Watch(len(grid) - 1, self.unet.conv_in.weight.dtype)
            if (gradient := self._guides.gradient(self, texts, settings, "mean")) is not None:
                gradient = watch.watched(f"the gradient of classifier {settings.classifier}", gradient)
                options["mean_shift"] = mean_shift(gradient, self.schedule, settings.guidance_interval or EVERYWHERE)
            latent = sampler.function(
                self.denoiser(texts, settings, watch), draw_noise(settings.seed, "x_T", numbers, shape, self.device), grid,
                lambda step, numbers=numbers: draw_noise(settings.seed, f"step {step}", numbers, shape, self.device),
                callback=watch.after_step(callback), **options,
            )  # fmt: skip
            images = (
                watch.see("what the autoencoder decodes", self.codec.decode(latent), False) if self.codec else latent
            )
            watch.check()
            yield images

    def warn_cut(self, prompts: Iterable[str], settings: SampleConfig, stacklevel: int) -> None:
        """Warn of prompts, and of a negative prompt, that are longer than the text encoder takes: once of each."""
        if self.text is None:
            return
        found = [("prompt", cut) for cut in self.text.cut(one for one in prompts if one not in self._cut)]
        found += [("negative prompt", cut) for cut in self.text.cut({settings.negative_prompt} - self._cut)]
        self._cut |= {cut.caption for _, cut in found}
        lines = [f"{kind} {_short(cut.caption, 40)} ends early, its last {cut.tokens} tokens are dropped: {_short(cut.text, QUOTED)}"
                 for kind, cut in found[:SHOWN]]  # fmt: skip
        if lines:
            more = [f"{len(found) - SHOWN} more are cut"] if len(found) > SHOWN else []
            room = self.text.max_length - 2
            warnings.warn(f"the text encoder takes {room} tokens: {'; '.join([*lines, *more])}", stacklevel=stacklevel)

    def denoiser(self, captions: list[str], settings: SampleConfig, watch: Watch | None = None) -> Denoiser:
        """The denoiser for these captions, with guidance and LoRAs. ``watch``: sees what each part computes."""
        model = self._under(settings)
        cond, null = (
            model.condition(captions),
            model.condition([settings.negative_prompt or self.null_caption] * len(captions)),
        )
        for context in (cond.context, null.context):
            if watch and context is not None:
                watch.see("what the text encoder says of the caption", context, False)
        seen = watch.watched if watch else unseen
        gradient = self._guides.gradient(self, captions, settings, "score")
        weak = (
            None
            if settings.autoguidance is None
            else self._guides.weak(self, settings.autoguidance, captions, settings)
        )
        guidance = Guidance(
            seen("the U-Net's prediction", model._predict), cond, null, self.schedule, self.target, self.learned_variance,
            scale=settings.guidance_scale if self.text else 1.0,
            rescale=settings.guidance_rescale,
            interval=settings.guidance_interval or EVERYWHERE,
            guide=weak and seen(f"the prediction of autoguidance {settings.autoguidance}", weak),
            guide_scale=settings.autoguidance_scale,
            gradient=gradient and seen(f"the gradient of classifier {settings.classifier}", gradient),
            threshold=settings.dynamic_threshold,
        )  # fmt: skip
        return Denoiser(self.schedule, self.target, seen("the guided prediction", guidance), self.learned_variance)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network in its own precision; the sampler's state stays in float32."""
        return self.unet(x_t.to(self.unet.conv_in.weight.dtype), t, cond).float()

    def condition(self, captions: list[str]) -> Condition:
        """The condition for these captions."""
        if self.text is None:
            return Condition()
        return Condition(context=self.text.encode(captions).to(self.device, self.unet.conv_in.weight.dtype))

    def check(self, settings: SampleConfig, size: int) -> None:
        """Raise ConfigError where the settings do not fit this model."""
        check_sampling(settings, size, self.schedule_config.num_steps, self.factor)
        if settings.variance == "learned" and not self.learned_variance:
            raise ConfigError(
                "variance learned: this model has not learned the reverse variance, take posterior or beta"
            )
        check_guidance(settings, self.codec is not None)
        check_drawable(self.unet.config)
        check_start(self.schedule_config, self.target, settings)
        for path, _ in settings.loras():
            self._lora(path)

    def bundle(self) -> Bundle:
        """The model as its files hold it; the tensors are those of the networks, not copies. Raises ConfigError under live LoRAs."""
        if self._live:
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
        return Bundle(
            parts, schedulers.scheduler_to_diffusers(self.schedule_config, self.target, self.defaults), tokenizer, extra
        )

    def save_pretrained(self, folder: str | Path, for_diffusers: bool = False) -> None:
        """Write the model folder.

        ``for_diffusers``: refuse (ConfigError, by name) what no pipeline of diffusers can express, instead of writing it
        under our own class name.
        """
        bundle = self.bundle()
        if for_diffusers and (reason := layout.ours_alone(bundle)) is not None:
            raise ConfigError(
                f"{layout.OUR_PIPELINE} {reason} cannot be expressed as a diffusers {layout.DIFFUSERS_PIPELINE}"
            )
        self.files = write_folder(bundle, Path(folder))
        self._loaded.clear()  # merged, and so in the files

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
    ) -> Pipeline:
        """Open a run, a model folder (ours or diffusers') or a single file. Raises FolderError or ConfigError.

        Args:
            dtype: of the U-Net; the autoencoder and the text encoder stay in float32.
            device: left out, a GPU where there is one.
            variant: of a folder's weights: fp16, non_ema.
            vae, text: another autoencoder or text encoder than the model's own, or those that it lacks: a run, folder or file.
            reading: what a single file does not say (``ldm.interop.open.read_file``): ``prediction``, ``tokenizer`` …
        """
        place = check_opening(path, device, dtype, variant=variant, vae=vae, text=text)
        info = ModelInfo.read(path, variant, vae and str(vae), text and str(text), **reading)
        if info.lora is not None:
            info.lora.check(info.hash)
        codec = codec_of(info.bundle.parts[VAE]) if info.autoencoder is not None else None
        encoder = None
        if info.has_text:
            from ldm.interop.text import text_of  # transformers takes seconds to import

            encoder = text_of(info.bundle, info.path)
        pipe = cls(
            load_unet(info).to(dtype), info.schedule, info.target, codec, encoder, info.sample_size, info.defaults,
            info.extra.get("null_caption", NULL_CAPTION), info.extra.get("caption_dropout"), info.bundle.files,
        )  # fmt: skip
        if info.lora is not None:
            pipe.load_lora(info.lora.folder)
        return pipe.to(place)


def _short(text: str, most: int) -> str:
    """A text as a message quotes it: a long one by its two ends."""
    return repr(text if len(text) <= most else f"{text[: most // 2]} … {text[-(most // 2) :]}")
