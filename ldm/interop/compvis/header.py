"""The header of a single file written here: configurations, scheduler, tokenizer and `ldm.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.config import ConfigError
from ldm.errors import FolderError
from ldm.files.json import parse_json
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle
from ldm.interop.compvis.shapes import one_line
from ldm.interop.intact import check_extra

KEY = "ldm"  # our entry of the safetensors metadata, whose values are strings
FORMAT = 1


@dataclass(frozen=True)
class Header:
    """A model without its tensors.

    Attributes:
        configs: config.json of each part.
        scheduler, tokenizer, extra: as in Bundle.
    """

    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_header(metadata: Mapping[str, str]) -> Header | None:
    """Our entry of a file's metadata, or None if it has none.

    Raises FolderError if it cannot be read.
    """
    if KEY not in metadata:
        return None
    try:
        content = parse_json(metadata[KEY], f"the file's header ({KEY}) cannot be read: it")
        if content["format"] != FORMAT:
            raise FolderError(f"the file's header is of format {content['format']!r}, this version reads {FORMAT}")
        configs = {str(part): dict(config) for part, config in content["parts"].items()}
        scheduler = None if content["scheduler"] is None else dict(content["scheduler"])
        tokenizer = {name: text.encode() for name, text in content["tokenizer"].items()}
        header = Header(configs, scheduler, tokenizer, dict(content["extra"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FolderError(f"the file's header ({KEY}) cannot be read: {one_line(error)}") from None
    check_extra(header.extra, f"the file's header ({KEY})")
    if not configs or not configs.keys() <= {UNET, VAE, TEXT}:
        raise FolderError(
            f"the file's header names the parts {', '.join(configs) or '(none)'}: expected {UNET}, {VAE} and {TEXT}"
        )
    if UNET in configs and scheduler is None:
        raise FolderError("the file's header describes a U-Net without its scheduler")
    return header


def write_header(bundle: Bundle) -> dict[str, str]:
    """The metadata that ``read_header`` reads.

    Raises ConfigError for a tokenizer file that is not text.
    """
    tokenizer = {}
    for name, content in bundle.tokenizer.items():
        try:
            tokenizer[name] = content.decode()
        except UnicodeDecodeError:
            raise ConfigError(f"tokenizer/{name} is not UTF-8 text: a single file's header cannot hold it") from None
    content = {
        "format": FORMAT,
        "parts": {name: dict(part.config) for name, part in bundle.parts.items()},
        "scheduler": None if bundle.scheduler is None else dict(bundle.scheduler),
        "tokenizer": tokenizer,
        "extra": dict(bundle.extra),
    }
    return {"format": "pt", KEY: json.dumps(content, ensure_ascii=False)}
