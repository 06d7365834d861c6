"""The names of LoRA tensors in the layouts of diffusers, peft and kohya-ss.

All names that a layer may have are derived from its name in the network; any other key is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping

from ldm.config import UNetConfig
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET
from ldm.interop.compvis.names import unet_name
from ldm.interop.lora_settings import TOWER

DOWN, UP, ALPHA = "lora_A", "lora_B", "alpha"
ENDINGS = {
    ".lora_A.weight": DOWN, ".lora_B.weight": UP, ".lora_A.default.weight": DOWN, ".lora_B.default.weight": UP,  # peft
    ".lora.down.weight": DOWN, ".lora.up.weight": UP,  # diffusers before peft
    ".lora_linear_layer.down.weight": DOWN, ".lora_linear_layer.up.weight": UP,
    ".lora_down.weight": DOWN, ".lora_up.weight": UP,  # kohya-ss
    ".down.weight": DOWN, ".up.weight": UP,  # after `processor.to_q_lora`
    ".alpha": ALPHA,
}  # fmt: skip
PEFT_PREFIX = "base_model.model."
OTHERS = {  # a pattern in a key → the kind of adapter that it belongs to
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_|\.boft_": "OFT",
    r"\.lora_mid\.": "a LoRA with a middle tensor",
    r"\.lora_(B(\.\w+)?|up)\.bias$": "a LoRA with biases",
    r"\.lora_embedding_": "a LoRA of an embedding",
    r"\.diff(_b)?$": "a whole difference",
    r"\.[wb]_norm$": "a trained norm",
    r"\.reshape_weight$": "a layer of another shape",
    r"^lora_te[23]_|^text_encoder_[23]\.": "a second text encoder (SDXL)",
    r"^bundle_emb\.|\.trainable_tokens_": "the embedding of a token",
}
_WHOLE = re.compile(r"(\.modules_to_save(\.\w+)?|\.base_layer)?\.(weight|bias)$")  # a layer saved whole
Place = tuple[str, str]  # UNET or TEXT, and the name of a layer in it


def stems(part: str, name: str) -> Iterator[str]:
    """All names of a layer in files, without the endings of its tensors."""
    for whole in (name,) if part == UNET else (name, TOWER + name):
        for plain in (whole, _old(whole)):
            if plain is not None:
                yield from (plain, f"{part}.{plain}", f"{PEFT_PREFIX}{plain}")
        if part == TEXT:
            yield from (f"text_encoders.{clip}.transformer.{whole}" for clip in ("clip_l", "clip_h"))  # ComfyUI
        flat = whole.replace(".", "_")
        yield from (f"{kohya}_{flat}" for kohya in (("lora_unet",) if part == UNET else ("lora_te", "lora_te1")))


def compvis_stems(name: str, config: UNetConfig) -> tuple[str, str]:
    """The names of a U-Net layer in CompVis' layout: ComfyUI's and kohya-ss'."""
    attends = [level in config.attending for level in reversed(range(len(config.channels)))]
    there = unet_name(f"{name}.weight", config.layers_per_level, attends).removesuffix(".weight")
    return f"diffusion_model.{there}", f"lora_unet_{there.replace('.', '_')}"


_OLD = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _old(name: str) -> str | None:
    """The name that diffusers gave a layer of an attention before peft; None for other layers."""
    for names, between in ((_OLD, ".processor."), (_OLD_TEXT, ".")):
        for new, old in names.items():
            if name.endswith("." + new):
                return f"{name.removesuffix('.' + new)}{between}{old}_lora"
    return None


def place_of(key: str, table: Mapping[str, Place], where: str) -> tuple[Place, str]:
    """The layer that a key changes, looked up in ``table`` (stem → layer), and DOWN, UP or ALPHA.

    Raises FolderError naming the nearest stem.
    """
    for ending, role in ENDINGS.items():
        if key.endswith(ending) and (place := table.get(key.removesuffix(ending))) is not None:
            return place, role
    if _WHOLE.search(key) and not any(key.endswith(ending) for ending in ENDINGS):
        raise FolderError(f"{where}: {key}: a layer saved whole (modules_to_save, bias) is not offered, only LoRA")
    stem = next((key.removesuffix(ending) for ending in ENDINGS if key.endswith(ending)), key)
    near = difflib.get_close_matches(stem, table, n=1)
    raise FolderError(
        f"{where}: {key} changes no layer of this model" + (f" (the nearest is called {near[0]})" if near else "")
    )


def check_kind(keys: Iterable[str], where: str) -> None:
    """Raise FolderError if the keys belong to another kind of adapter, or to none."""
    keys = list(keys)
    for key in keys:
        for pattern, kind in OTHERS.items():
            if re.search(pattern, key):
                raise FolderError(f"{where}: {key}: {kind} is not offered, only LoRA")
    if keys and not any(key.endswith(tuple(ENDINGS)) for key in keys):
        raise FolderError(f"{where} is not a LoRA: none of its tensors has the name of one; the first is {keys[0]}")


def diffusers_keys(part: str, name: str) -> dict[str, str]:
    """The keys of a layer's tensors in the layout of diffusers and peft, which has none for α."""
    stem = f"{part}.{TOWER if part == TEXT else ''}{name}"
    return {DOWN: f"{stem}.lora_A.weight", UP: f"{stem}.lora_B.weight"}


def kohya_keys(part: str, name: str) -> dict[str, str]:
    """The keys of a layer's tensors in the layout of kohya-ss, which most other tools read."""
    flat = (f"lora_te_{TOWER}" if part == TEXT else "lora_unet_") + name
    stem = flat.replace(".", "_")
    return {DOWN: f"{stem}.lora_down.weight", UP: f"{stem}.lora_up.weight", ALPHA: f"{stem}.alpha"}


def needs_settings(keys: Iterable[str]) -> bool:
    """True if the keys are peft's own without α, which is then in adapter_config.json."""
    keys = list(keys)
    return any(key.startswith(PEFT_PREFIX) for key in keys) and not any(key.endswith(".alpha") for key in keys)
