"""The settings beside the tensors of a LoRA file (peft's LoraConfig): rank and α of each layer, and what is not offered.

A setting may change what the tensors mean, so each is on a list with the values under which A and B mean W + (α/r) B A.
Any other value, of any other setting, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET

TOWER = "text_model."  # before a layer of the text encoder
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")  # initial A and B beside a base that stays as it is
READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
IGNORED = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",  # which layers: the tensors say it
    "lora_dropout", "inference_mode", "runtime_config",  # how it was trained, where it was computed
    "eva_config", "corda_config", "lora_ga_config", "loftq_config",  # peft looks at them where init_lora_weights names them
    "megatron_core", "qalora_group_size",  # … where megatron_config and use_qalora are set
    "fan_in_fan_out",  # of transformers' Conv1D; peft unsets it for linear layers
    "ensure_weight_tying",  # of embeddings
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",  # descriptions
)  # fmt: skip
KINDS = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "arrow_config": "Arrow",
    "velora_config": "VeLoRA", "alora_invocation_tokens": "aLoRA", "monteclora_config": "MonteCLoRA", "lora_bias": "a LoRA with biases",
    "modules_to_save": "a layer trained and saved whole", "trainable_token_indices": "the embedding of a token",
    "target_parameters": "a change of a bare parameter", "layer_replication": "a repeated layer",
    "megatron_config": "a layer of Megatron",
}  # fmt: skip
_CONVERT = "save it by peft's save_pretrained(…, path_initial_model_for_weight_conversion=…), as a plain LoRA"


def settings_of(part: str, header: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The LoraConfig of one network in a file's header; empty where it has none. Raises FolderError for what is not offered."""
    for key in header:
        if key.partition(".")[0] not in (UNET, TEXT):
            raise FolderError(
                f"{where}: {key} in its settings is of neither {UNET} nor {TEXT}: not a LoRA of this kind of model"
            )
    mine = {key.removeprefix(f"{part}."): value for key, value in header.items() if key.startswith(f"{part}.")}
    for key, value in mine.items():
        if key not in READ and key not in IGNORED:
            _check(key, value, where)
    if not isinstance(rs := mine.get("use_rslora") or False, bool):
        raise FolderError(f"{where}: use_rslora in its settings should be true or false, not {_short(rs)}")
    return mine


def _check(key: str, value: Any, where: str) -> None:
    """Raise FolderError unless a LoRA with this setting is a plain one."""
    says = f"{where}: {key} in its settings"
    if key == "init_lora_weights":
        if not (value is None or isinstance(value, bool) or str(value).lower() in PLAIN_STARTS):
            raise FolderError(
                f"{says} is {_short(value)}: its start was taken out of the base, which here is whole: {_CONVERT}"
            )
    elif key == "peft_type":
        if value not in (None, "LORA"):
            raise FolderError(f"{says} is {_short(value)}, which is not offered, only LORA")
    elif key == "bias":
        if value not in (None, "none"):
            raise FolderError(f"{says} is {_short(value)}: trained biases of the base are not offered, only none")
    elif value:
        kind = KINDS.get(key, "an unknown setting that may change what the tensors mean")
        raise FolderError(f"{says} is {_short(value)}: {kind} is not offered, only LoRA")


def alpha_of(name: str, rank: int, settings: Mapping[str, Any], where: str) -> float | None:
    """α of a layer by the settings, None where there are none. rsLoRA divides by √rank: expressed by the α."""
    if not settings:
        return None
    wanted = _of_layer(name, "rank_pattern", settings, settings.get("r", rank), where)
    if wanted != rank:
        raise FolderError(f"{where}: {name} has rank {rank}, its settings say {wanted:g}")
    alpha = _of_layer(name, "alpha_pattern", settings, settings.get("lora_alpha", rank), where)
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha


def _of_layer(name: str, which: str, settings: Mapping[str, Any], otherwise: Any, where: str) -> float:
    """The value of a layer in one of peft's patterns: of the first that matches the end of the name, or with ^ the whole."""
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
    """True if a name of a layer matches a key of peft's patterns. Of regular expressions only ^ and $ at the ends are known."""
    end = key.removeprefix("^").removesuffix("$").removeprefix(TOWER)
    if set(end) & set("\\[](){}*+?|^$"):
        raise FolderError(f"{where}: the pattern {key!r} in its settings is not offered, only names of layers")
    return lambda name: name == end or (not key.startswith("^") and name.endswith("." + end))


def _short(value: Any) -> str:
    """A value in an error, cut to what a line takes."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 1e18 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}…"
