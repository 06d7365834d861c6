"""Habits of diffusers' users: the name here of what they write, or the answer in one line.

Names that are the same in both (``guidance_scale``, ``negative_prompt``, ``eta`` …) are not listed.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from autoencoder.config import shown
from ldm.config import ConfigError, SampleConfig
from ldm.config.values import typed
from ldm.data.transforms import to_pil, to_uint8
from ldm.diffusion.samplers.nodes import Callback

# ---------------------------------------------------------------- arguments of a call

RENAMED = {"prompt": "prompts", "num_inference_steps": "steps", "mask_image": "mask"}
TAKEN = (  # under their name; height and width become size
    "num_images_per_prompt", "height", "width", "output_type", "return_dict", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)  # fmt: skip
OUTPUTS = ("pil", "np", "pt", "latent")
OF_THE_CALL = (  # not of SampleConfig
    "prompts", "size", "output_type", "num_images_per_prompt", "callback_on_step_end", "image", "mask",
    "values",
)  # fmt: skip
_FROM_TEXT = "the text encoder reads prompts: give prompts and negative_prompt"
_FROM_GRID = "steps and grid say where the steps lie (docs/samplers.md)"
_NOISE = "noise is a function of the seed and of an image's number, whatever batch it is in: give seed"
ANSWERS = {
    "generator": _NOISE,
    "latents": _NOISE,
    "timesteps": _FROM_GRID,
    "sigmas": _FROM_GRID,
    "prompt_embeds": _FROM_TEXT,
    "negative_prompt_embeds": _FROM_TEXT,
    "clip_skip": "a model's text encoder is used whole: leave it out",
    "ip_adapter_image": "IP adapters are not supported",
    "ip_adapter_image_embeds": "IP adapters are not supported",
    "masked_image_latents": "give image and mask",
    "padding_mask_crop": "give the part of the image and of the mask that is to be drawn",
    "cross_attention_kwargs": 'the scale of a LoRA stands behind its path: lora=("PATH:0.8",)',
    "callback_steps": "callback(done, total) is called after each batch, callback_on_step_end after each step",
}


def in_our_words(given: Mapping[str, Any], sample_size: int) -> dict[str, Any]:
    """The arguments of a call by our names, without those that are None.

    Raises ConfigError for an argument that is answered, not known, or given by both names.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name in ANSWERS:
            raise ConfigError(f"{name}: {ANSWERS[name]}")
    for theirs, ours in RENAMED.items():
        if theirs in given:
            if ours in given:
                raise ConfigError(f"{theirs} is {ours}: give one of them")
            given[ours] = given.pop(theirs)
    sides = {name: given.pop(name) for name in ("height", "width") if name in given}
    if sides:
        given["size"] = _size(sides, given.get("size"), sample_size)
    if given.pop("return_dict", True) is not True:
        raise ConfigError("return_dict: a call returns the list of pictures, which is its own .images: leave it out")
    tensors = given.pop("callback_on_step_end_tensor_inputs", ["latents"])
    if tensors not in (["latents"], ("latents",)):
        raise ConfigError(f"callback_on_step_end_tensor_inputs must be ['latents'], got {shown(tensors)}")
    if given.setdefault("output_type", "pil") not in OUTPUTS:
        raise ConfigError(f"output_type must be one of {', '.join(OUTPUTS)}, got {shown(given['output_type'])}")
    count = typed(int, given.get("num_images_per_prompt", 1), "num_images_per_prompt")
    if count < 1:
        raise ConfigError(f"num_images_per_prompt must be at least 1, got {count}")
    _check_names(given)
    return {**given, "num_images_per_prompt": count}


def _size(sides: Mapping[str, Any], size: Any, sample_size: int) -> tuple[Any, Any]:
    """Height and width; the one that is left out is that of training, as in diffusers."""
    if size is not None:
        raise ConfigError(f"{' and '.join(sides)} {'is' if len(sides) == 1 else 'are'} size: give one of them")
    return sides.get("height", sample_size), sides.get("width", sample_size)


def _check_names(given: Iterable[str]) -> None:
    """Raise ConfigError for a misspelt name of the call's own; ``changed`` checks those of SampleConfig."""
    settings = [field.name for field in dataclasses.fields(SampleConfig)]
    own = [*OF_THE_CALL, "batch_size", "callback", "progress", *RENAMED, *TAKEN]
    for name in given:
        begun = [full for full in (*settings, *own) if full.startswith(str(name))]
        near = begun or difflib.get_close_matches(str(name), [*settings, *own], n=1)
        if name not in (*settings, *own) and near and near[0] in own:
            raise ConfigError(f"unknown key {name}: did you mean {near[0]}?")


# ---------------------------------------------------------------- results and callbacks of a call


class Pictures(list):
    """The pictures of a call, or its arrays; ``images`` is the list itself, or the arrays in one."""

    def __init__(self, items: Iterable[Any] = (), stacked: Any = None) -> None:
        super().__init__(items)
        self._stacked = stacked

    @property
    def images(self) -> Any:
        """The pictures as diffusers' outputs name them."""
        return self if self._stacked is None else self._stacked


def finished(kind: str, images: Float[Tensor, "b c h w"]) -> list[Image.Image] | np.ndarray | Tensor:
    """One batch in [−1, 1] as pictures (pil), in [0, 1] as np [b, h, w, c] or pt, or as it is (latent)."""
    if kind == "pil":
        return to_pil(to_uint8(images))
    if kind == "latent":
        return images
    images = (images * 0.5 + 0.5).clamp(0, 1)
    return images if kind == "pt" else images.permute(0, 2, 3, 1).float().cpu().numpy()


def together(kind: str, batches: Sequence[Any]) -> Pictures:
    """The batches that ``finished`` made, as one list."""
    if kind == "pil" or not batches:
        return Pictures(picture for batch in batches for picture in batch)
    stacked = np.concatenate(batches) if kind == "np" else torch.cat(list(batches))
    return Pictures(stacked, stacked)


def step_end(pipe: Any, function: Callable[..., Any], times: Float[Tensor, " steps"]) -> Callback:
    """A sampler's callback that calls ``function(pipe, step, t, {"latents": x})`` and takes the latents it returns."""

    def after(step: int, x: Tensor, x0: Tensor) -> Tensor | None:
        returned = function(pipe, step, times[step], {"latents": x})
        latents = x if returned is None else returned.get("latents", x)
        if not isinstance(latents, Tensor) or latents.shape != x.shape:
            got = list(latents.shape) if isinstance(latents, Tensor) else shown(latents)
            raise ConfigError(f"callback_on_step_end must return latents {list(x.shape)}, got {got}")
        return latents.to(x)

    return after


# ---------------------------------------------------------------- arguments of from_pretrained

OPENING = {  # torch_dtype is taken for dtype
    **dict.fromkeys(("safety_checker", "requires_safety_checker", "feature_extractor"), "there is none: leave it out"),
    "scheduler": 'name a sampler in the call: sampler="dpmpp_2m" (docs/samplers.md)',
    "unet": "open the model whole, then set pipe.unet",
    "text_encoder": "give text, the path of a model with another text encoder",
    "device_map": "give device",
    **dict.fromkeys(
        (
            "use_safetensors",
            "low_cpu_mem_usage",
            "local_files_only",
            "revision",
            "cache_dir",
            "token",
            "force_download",
        ),
        "a model is read from a path on this machine: leave it out",
    ),
}


def opening(dtype: Any, reading: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """``dtype`` and further arguments of from_pretrained. Raises ConfigError for one that is answered."""
    for name in reading:
        if name in OPENING:
            raise ConfigError(f"{name}: {OPENING[name]}")
    return reading.get("torch_dtype", dtype), {name: reading[name] for name in reading if name != "torch_dtype"}


# ---------------------------------------------------------------- attributes and methods of a pipeline

PARTS: Mapping[str, Callable[[Any], Any]] = {
    "vae": lambda pipe: pipe.codec and pipe.codec.autoencoder,
    "text_encoder": lambda pipe: pipe.text and pipe.text.model,
    "tokenizer": lambda pipe: pipe.text and pipe.text.tokenizer,
}
_SAMPLER = 'name a sampler in the call, sampler="dpmpp_2m" (docs/samplers.md); pipe.schedule is the noise schedule'
_ATTENTION = "not needed: attention is torch's scaled_dot_product_attention, which is never held whole"
_OFFLOAD = 'parts stay on one device: to need less memory, pipe.to("cuda", torch.float16) and batch_size=1'
_LORA = 'LoRAs of one call are lora=("PATH:SCALE",); pipe.load_lora(path, scale) adds one for all calls'
_FROZEN = "the networks are frozen and evaluate: leave it out; ldm.train trains"
ATTRIBUTES = {
    "scheduler": _SAMPLER,
    **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), "there is none: leave it out"),
    **dict.fromkeys(
        (
            "enable_attention_slicing", "disable_attention_slicing", "set_attention_slice",
            "enable_xformers_memory_efficient_attention", "disable_xformers_memory_efficient_attention",
            "set_use_memory_efficient_attention_xformers",
        ),
        _ATTENTION,
    ),
    **dict.fromkeys(("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"), _OFFLOAD),
    "enable_vae_slicing": "give the call batch_size=1 to need less memory",
    "enable_vae_tiling": "give the call strips=16, which is exact, to need less memory",
    **dict.fromkeys(("enable_freeu", "disable_freeu"), "FreeU is not supported"),
    "fuse_qkv_projections": "not needed: torch.compile(pipe.unet) is faster",
    "load_lora_weights": "pipe.load_lora(path, scale)",
    "fuse_lora": "pipe.merge_lora()",
    **dict.fromkeys(
        (
            "set_adapters", "get_active_adapters", "delete_adapters", "enable_lora", "disable_lora",
            "unload_lora_weights", "unfuse_lora", "save_lora_weights",
        ),
        _LORA,
    ),
    **dict.fromkeys(("load_textual_inversion", "load_ip_adapter", "set_ip_adapter_scale"), "not supported"),
    "encode_prompt": "pipe.condition(prompts).context",
    "decode_latents": "pipe.codec.decode(latents), images in [−1, 1]",
    "prepare_latents": "ldm.pipeline.draw.draw_noise; or give seed, and callback_on_step_end to change latents",
    "progress_bar": "progress=False in the call, or pipe.set_progress_bar_config(disable=True)",
    "components": "pipe.unet, pipe.codec, pipe.text and pipe.schedule",
    "config": "pipe.unet.config, pipe.schedule_config and pipe.defaults",
    **dict.fromkeys(("guidance_scale", "_guidance_scale"), "guidance is the call's: guidance_scale, guidance_interval"),
    "num_timesteps": "pipe.schedule.num_steps of training; the steps of a call are its own",
    **dict.fromkeys(("interrupt", "_interrupt"), "raise an error in a callback to end a call"),
    **dict.fromkeys(("half", "bfloat16", "float", "double"), "pipe.to(torch.float16), or another type of torch"),
    **dict.fromkeys(("cuda", "cpu"), 'pipe.to("cuda") or pipe.to("cpu")'),
    **dict.fromkeys(("eval", "train", "requires_grad_"), _FROZEN),
}  # fmt: skip
SET = {**ATTRIBUTES, "vae": "pipe.codec = ldm.load_autoencoder(path), or vae=path of from_pretrained"}
SET |= dict.fromkeys(("text_encoder", "tokenizer"), "give text=path to from_pretrained")
