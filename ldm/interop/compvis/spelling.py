"""The names of a single file as CompVis' code spells them: what wraps a network, or was left out, by other writers.

Wrappers of parallel and compiled modules stand anywhere in a name, a trainer's own prefix stands before all names, and a U-Net or an
autoencoder alone is written without its prefix. Text towers lost the prefix `text_model.` in transformers 5 and in what was saved
with it, and in older merges; an autoencoder alone is often in diffusers' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm.errors import FolderError
from ldm.interop.compvis.names import vae_name
from ldm.interop.diffusers.folder import current_name

WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARTS = re.compile(r"(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders|model_ema)\.")
_UNET = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|out|label_emb)\.\d")
_VAE = re.compile(
    r"(?:encoder|decoder)\.(?:conv_in|conv_out|mid|mid_block|down|up|down_blocks|up_blocks)\.|(?:post_)?quant_conv\."
)
_TEXT = (  # what stands for what
    (
        re.compile(r"cond_stage_model\.transformer\.(embeddings|encoder|final_layer_norm)\."),
        r"cond_stage_model.transformer.text_model.\1.",
    ),
    (re.compile(r"cond_stage_model\.(transformer\.resblocks|ln_final)\."), r"cond_stage_model.model.\1."),
    (re.compile(r"cond_stage_model\.(token_embedding\.weight|positional_embedding)$"), r"cond_stage_model.model.\1"),
    (
        re.compile(r"cond_stage_model\.model\.encoder\.(?:layers|resblocks)\."),
        "cond_stage_model.model.transformer.resblocks.",
    ),
)


def spelled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in CompVis' code, views of those given. Raises FolderError where two have one name."""
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in tensors}
    outer = _outer(names.values())
    names = {name: short.removeprefix(outer) for name, short in names.items()}
    if not any(_PARTS.match(short) for short in names.values()):
        if any(short.startswith("diffusion_model.") for short in names.values()):
            names = {
                name: f"model.{short}" if short.startswith("diffusion_model.") else short
                for name, short in names.items()
            }
        elif any(short.startswith("input_blocks.") for short in names.values()):
            names = {
                name: f"model.diffusion_model.{short}" if _UNET.match(short) else short for name, short in names.items()
            }
    levels = 1 + max((int(m[1]) for short in names.values() if (m := _DOWN.match(short))), default=-1)
    found: dict[str, Tensor] = {}
    for name, short in names.items():
        for pattern, instead in _TEXT:
            short = pattern.sub(instead, short, count=1) if pattern.match(short) else short
        tensor = tensors[name]
        if levels and not short.startswith("loss."):
            short, tensor = _autoencoder(short, tensor, levels)
        if short in found:
            raise FolderError(f"tensor {name} is in the file a second time under another name of {short}")
        found[short] = tensor
    return found


_DOWN = re.compile(r"(?:first_stage_model\.)?encoder\.down_blocks\.(\d+)\.")


def _outer(names: Iterable[str]) -> str:
    """The prefix of all names that belongs to none of them: a trainer's name of the whole model, or of the network alone."""
    names = list(names)
    first = names[0] if names else ""
    part = next(
        (m for name in names if (m := _PARTS.search(name)) and (m.start() == 0 or name[m.start() - 1] == ".")), None
    )
    if part is not None:
        outer = part.string[: part.start()]
        return outer if all(name.startswith(outer) for name in names) else ""
    head = first.partition(".")[0] + "."
    inner = [name.removeprefix(head) for name in names if name.startswith(head)]
    alone = len(inner) == len(names) and any(_UNET.match(name) or _VAE.match(name) for name in inner)
    return head if alone and not any(_UNET.match(name) or _VAE.match(name) for name in names) else ""


def _autoencoder(name: str, tensor: Tensor, levels: int) -> tuple[str, Tensor]:
    """A tensor of an autoencoder in diffusers' names; its attention is a 1×1 convolution in CompVis' code."""
    prefix = "first_stage_model." if name.startswith("first_stage_model.") else ""
    inner = current_name("vae", name.removeprefix(prefix))
    if not inner.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
        return name, tensor
    if ".attentions." in inner and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]
    return prefix + vae_name(inner, levels), tensor
