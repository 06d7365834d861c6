"""Description of a model from its files, for `ldm inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from torch import Tensor

from autoencoder.layout import from_diffusers as autoencoder_from_diffusers
from autoencoder.layout import latent_scale
from ldm.files.tensors.archive import tensor_hash
from ldm.files.tensors.finite import counted, nonfinite
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
from ldm.interop.diffusers.scheduler_keys import unread
from ldm.interop.diffusers.schedulers import blind_end, sampler_from_diffusers, scheduler_from_diffusers
from ldm.interop.diffusers.unet import unet_from_diffusers


def describe(bundle: Bundle, weights: bool = True) -> dict[str, Any]:
    """Facts about a model, JSON-ready: sizes, dtypes, process, latent scale.

    ``weights``: read them too, for the hash of each part and the names of tensors that hold NaN or
    infinity. Raises ConfigError where a configuration cannot be expressed here.
    """
    describers = {UNET: _unet, VAE: _autoencoder, TEXT: _text}
    about: dict[str, Any] = {
        name: {**_size(part.tensors), **describers[name](part), **(_weights(part) if weights else {})}
        for name, part in bundle.parts.items()
    }
    if bundle.scheduler is not None:
        about["process"] = _process(bundle.scheduler)
    if bundle.tokenizer:
        about["tokenizer"] = sorted(bundle.tokenizer)
    if bundle.extra:
        about["ldm.json"] = {key: value for key, value in bundle.extra.items() if key not in ("sha256", "conditions")}
    if conditions := bundle.extra.get("conditions"):
        parts = {part["name"]: _condition(part) for part in conditions["parts"]}
        about["conditions"] = {"joint_dropout": conditions.get("joint_dropout"), **parts}
    if bundle.unused:
        about["unused"] = dict(Counter(bundle.unused.values()))
    return about


def _condition(part: Mapping[str, Any]) -> dict[str, Any]:
    """A condition's kind, and what it was measured to be."""
    settings = ("name", "column")
    return {key: value for key, value in part.items() if key not in settings}


def part_hash(part: Part) -> str:
    """sha256 over names, dtypes, shapes and values; the same in every layout."""
    digest = sha256()
    for name in sorted(part.tensors):
        digest.update(f"{name} {tensor_hash(part.tensors[name])}\n".encode())
    return digest.hexdigest()


def _weights(part: Part) -> dict[str, Any]:
    """Facts that need the weights: their hash, and tensors that are not finite."""
    bad = nonfinite(part.tensors)
    return {"sha256": part_hash(part)} | (
        {"not_finite": {name: counted(part.tensors[name]) for name in bad}} if bad else {}
    )


def _size(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "tensors": len(tensors),
        "dtypes": dict(dtypes),
    }


def _unet(part: Part) -> dict[str, Any]:
    spec = unet_from_diffusers(part.config)
    config = spec.config
    return {
        "channels": list(config.channels),
        "layers_per_level": config.layers_per_level,
        "attention_levels": list(config.attending),
        "heads": list(config.heads),
        "transformer_layers": config.transformer_layers,
        "linear_projection": config.linear_projection,
        "context": spec.context_dim,
        "takes": spec.in_channels + config.concat_channels,
        "predicts": spec.out_channels,
        "learned_variance": spec.learned_variance,
    }


def _autoencoder(part: Part) -> dict[str, Any]:
    config = autoencoder_from_diffusers(part.config)
    scale, shift = latent_scale(part.config)
    return {
        "factor": config.factor,
        "latent_channels": config.latent_channels,
        "channels": list(config.channels),
        "layers_per_level": config.layers_per_level,
        "latent_scale": scale,
        "latent_shift": shift,
    }


def _text(part: Part) -> dict[str, Any]:
    inner = part.config.get("text_config")
    tower = inner if isinstance(inner, Mapping) else part.config
    names = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "tokens": "max_position_embeddings",
        "vocabulary": "vocab_size",
        "activation": "hidden_act",
    }
    return {fact: tower.get(key) for fact, key in names.items()}


def _process(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    schedule, target = scheduler_from_diffusers(scheduler)
    sampling, missing = sampler_from_diffusers(scheduler)
    ends = None if schedule.beta_start is None else [schedule.beta_start, schedule.beta_end]
    return {
        "target": target,
        "schedule": schedule.name,
        "steps": schedule.num_steps,
        "betas": ends,
        "zero_terminal_snr": schedule.zero_terminal_snr,
        "scheduler": scheduler.get("_class_name"),
        **({"sampling": sampling} if sampling else {}),
        **({"not_offered": missing} if missing else {}),
        **({"not_read_by_it": ignored} if (ignored := unread(scheduler)) else {}),
        **({"warning": blind} if (blind := blind_end(scheduler)) else {}),
    }
