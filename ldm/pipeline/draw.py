"""From noise to samples, with any network of the U-Net's signature or with a trained model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from ldm.config import ConfigError, SampleConfig
from ldm.config.values import typed
from ldm.data import rng
from ldm.diffusion.completion import Known, blended, repaint, repaint_path
from ldm.diffusion.condition import NO_CONDITION, Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import EVERYWHERE, Guidance, mean_shift
from ldm.diffusion.samplers.ancestral import ddim_inversion
from ldm.diffusion.samplers.grids import make_grid
from ldm.diffusion.samplers.nodes import Callback
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.windows import Windows, windowed
from ldm.pipeline.checks import LONG_STEP, first_step, grid_of, sides_of
from ldm.pipeline.given import Given, read_given, started
from ldm.pipeline.guides import Guides
from ldm.pipeline.model import Model
from ldm.pipeline.prompts import Prompt, asked, texts_of, without
from ldm.pipeline.watch import Watch, unseen

MARGIN = 8  # latents that a circular picture is decoded with at each end, beyond the reach of most decoders


def draw_noise(
    seed: int, name: str, numbers: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Float[Tensor, "b *d"]:
    """One standard normal array for each image: a function of (seed, name, number), not of the batch around it."""
    return torch.from_numpy(np.stack([rng.normal(seed, f"sample/{name}", n, shape) for n in numbers])).to(device)


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    schedule: Schedule,
    target: str,
    shape: Sequence[int],
    *,
    sampler: str = "dpmpp_2m",
    steps: int = 20,
    grid: str = "trailing",
    seed: int = 0,
    cond: Condition = NO_CONDITION,
    null_cond: Condition | None = None,
    guidance_scale: float = 1.0,
    learned_variance: bool = False,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Float[Tensor, "b *d"]:
    """Draw a batch of samples of the given shape, [b, c, h, w] as diffused. No gradient is kept.

    Args:
        model: ``model(x_t, t, cond)``, such as a UNet.
        schedule, target: the process, and what the model predicts of it: eps, x0, v or score.
        sampler, steps, grid: names of ldm.config.SAMPLERS and GRIDS.
        seed: sample i of a seed starts from the same noise in every batch, and as in Pipeline.
        cond, null_cond, guidance_scale: classifier-free guidance between both conditions; 1 is the condition alone.
        learned_variance: the model returns twice the channels, the second half for the reverse variance.
        callback: ``callback(step, x, x0)`` after each step; what it returns, unless None, replaces the sample.
        device: left out, that of the model's parameters.
        options: of the sampler: ``eta``, ``variance``.

    Raises:
        ConfigError: a name that is not known; guidance without a null condition.
        ValueError: steps out of range for the schedule.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if guidance_scale != 1.0 and null_cond is None:
        raise ConfigError(f"guidance_scale {guidance_scale:g} needs null_cond, the condition to guide away from")
    if device is None:
        device = next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"
    schedule = schedule.to(device)
    guided = Guidance(
        model, cond, cond if null_cond is None else null_cond, schedule, target, learned_variance, scale=guidance_scale
    )
    denoiser, nodes = Denoiser(schedule, target, guided, learned_variance), make_grid(grid, schedule, steps)
    noise = _noise(seed, range(shape[0]), shape[1:], schedule)
    return SAMPLERS[sampler].function(
        denoiser, noise("x_T"), nodes, lambda step: noise(f"step {step}"), callback=callback, **options
    )


def _noise(seed: int, numbers: Sequence[int], shape: Sequence[int], schedule: Schedule) -> Callable[[str], Tensor]:
    """The draws of the images ``numbers`` of a seed by name, each of ``shape``, on the schedule's device."""
    return lambda name: draw_noise(seed, name, numbers, tuple(shape), schedule.betas.device)


# ---------------------------------------------------------------- with a trained model: prepare, denoise, decode


@dataclass(frozen=True)
class Drawing:
    """A call that was checked: its model, its settings and its images.

    Attributes:
        prompts, numbers: what each image is to show, and its number within the seed, which determines
            its noise.
        batch_size: images computed together.
        shape: [c, h, w] of one image as it is diffused.
        grid: t at each node of the sampler, float64.
        given: the image and the mask that the images start from; None: they start from noise.
    """

    model: Model
    guides: Guides
    settings: SampleConfig
    prompts: list[Prompt]
    numbers: Sequence[int]
    batch_size: int
    shape: tuple[int, int, int]
    grid: Float[Tensor, " nodes"]
    given: Given | None = None

    @property
    def steps(self) -> int:
        """Steps of the sampler for one batch."""
        return len(self.times)

    @property
    def times(self) -> Float[Tensor, " steps"]:
        """t at which each step begins, in the order of the steps."""
        settings = self.settings
        if settings.completion != "repaint":
            return self.grid[:-1]
        path = repaint_path(len(self.grid) - 1, settings.repaint_jump, settings.repaint_repeats)
        return self.grid[[here for here, there in pairwise(path) if there > here]]

    def batches(self) -> Iterator[Batch]:
        """The images that are computed together."""
        for i in range(0, len(self.prompts), self.batch_size):
            places = range(i, min(i + self.batch_size, len(self.prompts)))
            given = self.given and self.given.of(places)
            yield Batch([self.prompts[k] for k in places], [self.numbers[k] for k in places], given)


class Batch(NamedTuple):
    """Prompts, numbers and given images of images that are computed together."""

    prompts: list[Prompt]
    numbers: list[int]
    given: Given | None


def prepare(
    model: Model,
    guides: Guides,
    prompts: Any,
    settings: SampleConfig,
    size: Any = None,
    batch_size: Any = 16,
    numbers: Sequence[int] | None = None,
    image: Any = None,
    mask: Any = None,
    values: Any = None,
    copies: int = 1,
) -> Drawing:
    """Check a call before anything slow. Raises ConfigError; warnings point at the caller's caller."""
    sides = sides_of(size, model.sample_size)
    together: int = typed(int, batch_size, "batch_size")
    prompts = asked(prompts, values, model.conditioner, copies, model.text is not None)
    captions = texts_of(prompts)
    settings = started(settings, image is not None, mask is not None)
    model.check(settings, sides)
    if together < 1:
        raise ConfigError(f"batch_size must be at least 1, got {together}")
    if numbers is not None and len(numbers) != len(prompts):
        raise ConfigError(f"indices must number the {len(prompts)} prompts, got {len(numbers)}")
    if model.guidable and model.null_share == 0.0 and settings.guidance_scale not in (0.0, 1.0):
        warnings.warn(
            f"this model was trained without {'caption dropout' if model.conditioner is None else 'joint_dropout'}:"
            " guidance has no unconditional model to lean on",
            stacklevel=3,
        )
    for name, scale in settings.alone().items():
        if scale != 1 and model.dropout_of(name) == 0:
            warnings.warn(
                f"guidance_alone {name}: this model was trained without dropping it alone: there is nothing to lean on",
                stacklevel=3,
            )
    if settings.classifier is not None:  # every caption is one of its classes, before the first is drawn
        classes, _ = guides.classifier(model, settings.classifier)
        for caption in captions:
            classes.label(caption)
    model.warn_cut(captions, settings, stacklevel=4)
    grid = grid_of(model.schedule, settings)
    if SAMPLERS[settings.sampler].looks_ahead and (ratio := first_step(model.schedule, grid)) > LONG_STEP:
        warnings.warn(
            f"{settings.sampler} on the {settings.grid} grid: the first of {settings.steps} steps lowers the noise"
            f" {ratio:.0f}-fold, too much for it; take grid karras, or another sampler such as dpmpp_2m"
            " (docs/samplers.md)",
            stacklevel=3,
        )
    height, width = (side // model.factor for side in settings.canvas(sides))
    numbers = range(len(prompts)) if numbers is None else numbers
    given = read_given(image, mask, sides, model.image_channels, len(prompts), settings.extend, stacklevel=3)
    shape = (model.unet.in_channels, height, width)
    return Drawing(model, guides, settings, prompts, numbers, together, shape, grid, given)


def denoise(drawing: Drawing, batch: Batch, callback: Callback | None = None) -> Float[Tensor, "b c h w"]:
    """One batch from noise to clean samples, as diffused. Raises NonFiniteError naming the part and the step."""
    model, settings, watch = drawing.model, drawing.settings, Watch(drawing.steps, drawing.model.dtype)
    prompts = batch.prompts
    options = {name: getattr(settings, name) for name in SAMPLERS[settings.sampler].options}
    gradient = drawing.guides.gradient(model, texts_of(prompts), settings, "mean")
    if gradient is not None:
        gradient = watch.watched(f"the gradient of classifier {settings.classifier}", gradient)
        options["mean_shift"] = mean_shift(gradient, model.schedule, settings.guidance_interval or EVERYWHERE)
    concat = None
    if model.unet.spec.fills and batch.given is not None:
        concat = batch.given.condition(model.codec, model.device, settings.strips)
    guided = denoiser(model, drawing.guides, prompts, settings, watch, concat)
    after = watch.after_step(callback)
    known = batch.given and batch.given.known(model.codec, model.device, settings.strips)
    noise = _noise(settings.seed, batch.numbers, drawing.shape, model.schedule)
    if settings.invert and known is not None and drawing.steps:
        x = ddim_inversion(_source(drawing, prompts, watch), known.x0, drawing.grid)
        x = SAMPLERS[settings.sampler].function(guided, x, drawing.grid, callback=after, **options)
    else:
        x = _sampled(drawing, guided, known, noise, after, options)
    watch.check()
    return x


def _source(drawing: Drawing, prompts: list[Prompt], watch: Watch) -> Denoiser:
    """The denoiser for the images' own caption, without guidance, which an inversion could not undo."""
    off = {"guidance_scale": 1.0, "guidance_alone": (), "autoguidance": None, "classifier": None}
    plain = dataclasses.replace(drawing.settings, **off)
    return denoiser(drawing.model, drawing.guides, [plain.source_prompt] * len(prompts), plain, watch)


def _sampled(
    drawing: Drawing,
    denoiser: Denoiser,
    known: Known | None,
    noise: Callable[[str], Tensor],
    callback: Callback,
    options: Mapping[str, Any],
) -> Float[Tensor, "b c h w"]:
    """Samples from noise; from the noised images where less than all noise levels are drawn anew."""
    settings, grid = drawing.settings, drawing.grid.to(denoiser.schedule.betas.device)
    sampler, x = SAMPLERS[settings.sampler].function, noise("x_T")
    if known is None:
        return sampler(denoiser, x, grid, lambda step: noise(f"step {step}"), callback=callback, **options)
    eps = x
    if len(grid) == 1:
        return known.x0
    if settings.strength != 1.0 or (settings.strength_by == "steps" and bool((known.mask == 1).all())):
        x = denoiser.schedule.add_noise(known.x0, eps, grid[0].expand(len(eps)))
    if model_fills(drawing.model, settings):
        return sampler(denoiser, x, grid, lambda step: noise(f"step {step}"), callback=callback, **options)
    if settings.completion == "repaint":
        jump, repeats = settings.repaint_jump, settings.repaint_repeats
        return repaint(
            sampler, denoiser, known, x, grid, noise, jump=jump, repeats=repeats, callback=callback, **options
        )
    keep = blended(known, denoiser.schedule, grid, eps, callback)
    return sampler(denoiser, x, grid, lambda step: noise(f"step {step}"), callback=keep, **options)


def model_fills(model: Model, settings: SampleConfig) -> bool:
    """True if the model completes an image as it was trained to, without help."""
    return model.unet.spec.fills and settings.completion is None


def decode(model: Model, latent: Float[Tensor, "b c h w"], settings: SampleConfig) -> Float[Tensor, "b C H W"]:
    """Images in about [−1, 1]: decoded latents, or the sample itself of a pixel model. Raises NonFiniteError.

    A circular latent is decoded with a margin from its other end.
    """
    if model.codec is None:
        return latent
    watch, circular = Watch(0, model.dtype), circular_axes(settings)
    down, across = (min(MARGIN, n) if closed else 0 for n, closed in zip(latent.shape[2:], circular, strict=True))
    if any(circular):
        latent = pad(latent, (across, across, down, down), mode="circular")
    images = model.codec.decode(latent, settings.strips)
    top, left = down * model.factor, across * model.factor
    images = images[..., top : images.shape[2] - top, left : images.shape[3] - left]
    images = watch.see("what the autoencoder decodes", images, at_step=False)
    watch.check()
    return images


@torch.no_grad()
def draw(
    drawing: Drawing, callback: Callback | None = None, decoded: bool = True
) -> Iterator[Float[Tensor, "b C H W"]]:
    """The images of each batch, or, not decoded, what is diffused."""
    settings = drawing.settings
    for batch in drawing.batches():
        latent = denoise(drawing, batch, callback)
        if not decoded:
            yield latent
            continue
        images = decode(drawing.model, latent, settings)
        yield batch.given.pasted(images) if batch.given and settings.paste else images


def windows_of(model: Model, settings: SampleConfig) -> Windows | None:
    """The windows of these settings in diffused pixels; None: the sample is predicted whole."""
    if settings.window is None:
        return None
    side = settings.window // model.factor
    stride = max(1, side // 2) if settings.window_stride is None else settings.window_stride // model.factor
    return Windows(side, stride, circular_axes(settings))


def circular_axes(settings: SampleConfig) -> tuple[bool, bool]:
    """True for the axes along which opposite edges meet: (height, width)."""
    return settings.circular in ("y", "xy"), settings.circular in ("x", "xy")


def denoiser(
    model: Model,
    guides: Guides,
    prompts: Sequence[Prompt | str],
    settings: SampleConfig,
    watch: Watch | None = None,
    concat: Tensor | None = None,
) -> Denoiser:
    """The denoiser for these prompts, with guidance and LoRAs.

    ``watch``: sees what each part computes. ``concat``: further channels, of every condition.
    """
    changed = model.with_loras(settings)
    cond = changed.condition(prompts, concat)
    null_cond = changed.condition([settings.negative_prompt or model.null_caption] * len(prompts), concat)
    for context in (cond.context, null_cond.context):
        if watch and context is not None:
            watch.see("what the text encoder says of the caption", context, at_step=False)
    seen = watch.watched if watch else unseen
    gradient = guides.gradient(model, texts_of(prompts), settings, "score")
    away = tuple(
        (changed.condition(without(prompts, name, settings.negative_prompt or model.null_caption), concat), scale - 1)
        for name, scale in settings.alone().items()
        if scale != 1
    )
    guide, windows = None, windows_of(model, settings)
    if settings.autoguidance is not None:
        guide = guides.guide(model, settings.autoguidance, prompts, settings, windows, concat)
    guidance = Guidance(
        seen("the U-Net's prediction", windowed(changed.predict, windows) if windows else changed.predict),
        cond,
        null_cond,
        model.schedule,
        model.target,
        model.learned_variance,
        scale=settings.guidance_scale if model.guidable else 1.0,
        away=away,
        rescale=settings.guidance_rescale,
        interval=settings.guidance_interval or EVERYWHERE,
        guide=guide and seen(f"the prediction of autoguidance {settings.autoguidance}", guide),
        guide_scale=settings.autoguidance_scale,
        gradient=gradient and seen(f"the gradient of classifier {settings.classifier}", gradient),
        threshold=settings.dynamic_threshold,
    )
    return Denoiser(model.schedule, model.target, seen("the guided prediction", guidance), model.learned_variance)
