"""Normalise the names in a single file to the spelling of CompVis' code.

Other programs write wrappers of parallel and compiled modules anywhere in a name, their own prefix
before all names, or a U-Net or autoencoder alone without its prefix. Text towers lack the prefix
`text_model.` in files of transformers 5 and in older merges, and an autoencoder alone is often in
diffusers' names.
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
_TEXT = (  # pattern of a text tower's name, and its replacement
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
    """The tensors, or views of them, by their names in CompVis' code.

    Raises FolderError if two get the same name.
    """
    # Without wrappers and without a prefix common to all names.
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in tensors}
    outer = _outer(names.values())
    names = {name: short.removeprefix(outer) for name, short in names.items()}

    # A U-Net alone gets its prefix.
    if not any(_PARTS.match(short) for short in names.values()):
        if any(short.startswith("diffusion_model.") for short in names.values()):
            names = {n: f"model.{s}" if s.startswith("diffusion_model.") else s for n, s in names.items()}
        elif any(short.startswith("input_blocks.") for short in names.values()):
            names = {n: f"model.diffusion_model.{s}" if _UNET.match(s) else s for n, s in names.items()}

    # Text towers, and autoencoders in diffusers' names.
    levels = 1 + max((int(m[1]) for short in names.values() if (m := _DOWN.match(short))), default=-1)
    found: dict[str, Tensor] = {}
    for name, short in names.items():
        for pattern, replacement in _TEXT:
            short = pattern.sub(replacement, short, count=1) if pattern.match(short) else short
        tensor = tensors[name]
        if levels and not short.startswith("loss."):
            short, tensor = _autoencoder(short, tensor, levels)
        if short in found:
            raise FolderError(
                f"tensor {name} stands for {short}, which is in the file a second time under another name"
            )
        found[short] = tensor
    return found


_DOWN = re.compile(r"(?:first_stage_model\.)?encoder\.down_blocks\.(\d+)\.")


def _outer(names: Iterable[str]) -> str:
    """A prefix that a trainer wrote before all names, of the whole model or of a network alone;

    "" if there is none.
    """
    names = list(names)
    first = names[0] if names else ""

    # Everything before the name of a part of a whole model.
    matches = (match for name in names if (match := _PARTS.search(name)))
    part = next((m for m in matches if m.start() == 0 or m.string[m.start() - 1] == "."), None)
    if part is not None:
        outer = part.string[: part.start()]
        return outer if all(name.startswith(outer) for name in names) else ""

    # Without parts: the first word, if a network alone follows it.
    head = first.partition(".")[0] + "."
    inner = [name.removeprefix(head) for name in names if name.startswith(head)]
    alone = len(inner) == len(names) and any(_UNET.match(name) or _VAE.match(name) for name in inner)
    return head if alone and not any(_UNET.match(name) or _VAE.match(name) for name in names) else ""


def _autoencoder(name: str, tensor: Tensor, levels: int) -> tuple[str, Tensor]:
    """An autoencoder's name and tensor in CompVis' code; others unchanged.

    Attention is a 1×1 convolution there.
    """
    prefix = "first_stage_model." if name.startswith("first_stage_model.") else ""
    inner = current_name("vae", name.removeprefix(prefix))
    if not inner.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
        return name, tensor
    if ".attentions." in inner and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]
    return prefix + vae_name(inner, levels), tensor
