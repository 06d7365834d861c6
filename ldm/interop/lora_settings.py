"""The settings beside the tensors of a LoRA file (peft's LoraConfig): rank and α of each layer.

A setting may change the meaning of the tensors, so each one is listed with the values under which A
and B mean W + (α/r) B A. Other values and unknown settings are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET

TOWER = "text_model."  # prefix of the text encoder's layers
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")  # initialisations that leave the base unchanged
READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
IGNORED = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",  # which layers: the tensors show it
    "lora_dropout", "inference_mode", "runtime_config",  # how it was trained and run
    # read by peft only if init_lora_weights names them
    "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "megatron_core", "qalora_group_size",  # … only with megatron_config and use_qalora
    "fan_in_fan_out",  # for transformers' Conv1D; peft unsets it for linear layers
    "ensure_weight_tying",  # for embeddings
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",  # descriptions
)  # fmt: skip
KINDS = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "arrow_config": "Arrow",
    "velora_config": "VeLoRA", "alora_invocation_tokens": "aLoRA", "monteclora_config": "MonteCLoRA",
    "lora_bias": "a LoRA with biases",
    "modules_to_save": "a layer trained and saved whole", "trainable_token_indices": "the embedding of a token",
    "target_parameters": "a change of a bare parameter", "layer_replication": "a repeated layer",
    "megatron_config": "a layer of Megatron",
}  # fmt: skip
_CONVERT = "save it by peft's save_pretrained(…, path_initial_model_for_weight_conversion=…), as a plain LoRA"


def settings_of(part: str, header: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The LoraConfig of one network in a file's header, empty if there is none.

    Raises FolderError for a setting that is not offered.
    """
    for key in header:
        if key.partition(".")[0] not in (UNET, TEXT):
            raise FolderError(
                f"{where}: {key} in its settings is of neither {UNET} nor {TEXT}: not a LoRA of this kind of model"
            )
    config = {key.removeprefix(f"{part}."): value for key, value in header.items() if key.startswith(f"{part}.")}
    for key, value in config.items():
        if key not in READ and key not in IGNORED:
            _check(key, value, where)
    if not isinstance(rs := config.get("use_rslora") or False, bool):
        raise FolderError(f"{where}: use_rslora in its settings should be true or false, not {_short(rs)}")
    return config


def _check(key: str, value: Any, where: str) -> None:
    """Raise FolderError for a value under which the tensors do not mean W + (α/r) B A."""
    subject = f"{where}: {key} in its settings"
    if key == "init_lora_weights":
        if not (value is None or isinstance(value, bool) or str(value).lower() in PLAIN_STARTS):
            raise FolderError(
                f"{subject} is {_short(value)}: its start was taken out of the base, which here is whole: {_CONVERT}"
            )
    elif key == "peft_type":
        if value not in (None, "LORA"):
            raise FolderError(f"{subject} is {_short(value)}, which is not offered, only LORA")
    elif key == "bias":
        if value not in (None, "none"):
            raise FolderError(f"{subject} is {_short(value)}: trained biases of the base are not offered, only none")
    elif value:
        kind = KINDS.get(key, "an unknown setting that may change what the tensors mean")
        raise FolderError(f"{subject} is {_short(value)}: {kind} is not offered, only LoRA")


def alpha_of(name: str, rank: int, settings: Mapping[str, Any], where: str) -> float | None:
    """α of a layer by the settings, None if there are none.

    rsLoRA's scale α/√r is expressed as α√r over r. Raises FolderError for another rank.
    """
    if not settings:
        return None
    wanted = _of_layer(name, "rank_pattern", settings, settings.get("r", rank), where)
    if wanted != rank:
        raise FolderError(f"{where}: {name} has rank {rank}, its settings say {wanted:g}")
    alpha = _of_layer(name, "alpha_pattern", settings, settings.get("lora_alpha", rank), where)
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha


def _of_layer(name: str, which: str, settings: Mapping[str, Any], otherwise: Any, where: str) -> float:
    """A layer's value in one of peft's patterns, or ``otherwise``.

    The first key that equals the end of the layer's name counts, or, with a leading ^, the whole
    name.
    """
    patterns = settings.get(which) or {}
    if not isinstance(patterns, dict):
        raise FolderError(
            f"{where}: {which} in its settings should be an object of names and numbers, not {_short(patterns)}"
        )
    matches = {key: _pattern(key, where) for key in patterns}
    value = next((patterns[key] for key, match in matches.items() if match(name)), otherwise)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, (bool, str)) or not math.isfinite(number):
        raise FolderError(f"{where}: its settings give {name} {_short(value)}, which is not a finite number")
    return number


def _pattern(key: str, where: str) -> Callable[[str], bool]:
    """The test of a key of peft's patterns for a layer's name.

    The only regular expressions offered are ^ and $.
    """
    end = key.removeprefix("^").removesuffix("$").removeprefix(TOWER)
    if set(end) & set("\\[](){}*+?|^$"):
        raise FolderError(f"{where}: the pattern {key!r} in its settings is not offered, only names of layers")
    return lambda name: name == end or (not key.startswith("^") and name.endswith("." + end))


def _short(value: Any) -> str:
    """A value for an error message, cut to 60 characters."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 1e18 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}…"
