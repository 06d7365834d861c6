"""A model's description, and its U-Net; weights stay memory-mapped until they are used."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from autoencoder.layout import from_diffusers as autoencoder_from_diffusers
from ldm.config import ConfigError, SampleConfig, ScheduleConfig, build
from ldm.diffusion.conditioner import Conditioner
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle
from ldm.interop.complete import check_complete
from ldm.interop.diffusers import schedulers
from ldm.interop.diffusers.folder import find_model
from ldm.interop.diffusers.lora_folder import REFERENCE, Reference
from ldm.interop.diffusers.unet import sample_side, unet_from_diffusers
from ldm.interop.intact import EXTRA
from ldm.interop.open import read_model
from ldm.interop.weights import fill
from ldm.models.unet import NetworkSpec, UNet
from ldm.pipeline.codec import joined_hash


@dataclass(frozen=True)
class ModelInfo:
    """A model's description: configurations of its parts, no weights.

    Attributes:
        path: the folder or file.
        unet: the shape of its U-Net.
        schedule, target: the process, and what the U-Net predicts.
        sampling: fields of SampleConfig that its scheduler states; those of our own file take precedence.
        lora: the LoRA folder that was opened, where ``path`` is the model that it changes.
    """

    path: Path
    bundle: Bundle
    unet: NetworkSpec
    schedule: ScheduleConfig
    target: str
    sampling: dict[str, Any]
    lora: Reference | None = None

    @classmethod
    def read(
        cls,
        path: str | Path,
        variant: str | None = None,
        vae: str | None = None,
        text: str | None = None,
        whole: bool = True,
        **reading: Any,
    ) -> ModelInfo:
        """Read a run, a model folder or a single file.

        ``vae``, ``text``, ``reading``: as in ``ldm.interop.open.read_model``. ``whole``: every part
        that drawing needs must be there. Raises FolderError, or ConfigError for what cannot be
        expressed here.
        """
        path = Path(path) if Path(path).is_file() else find_model(path)
        if (reference := Reference.read(path)) is not None:
            if vae is not None or text is not None:
                raise ConfigError(
                    f"{path} is a LoRA's, trained with the parts of {reference.base}:"
                    " name that as the model and this as --lora"
                )
            # a base that is a LoRA itself may even be this very folder
            if reference.base.is_dir() and (find_model(reference.base) / REFERENCE).is_file():
                raise FolderError(f"{path} is the LoRA of {reference.base}, itself a LoRA: merge that first")
            base = cls.read(reference.base)
            bundle = dataclasses.replace(base.bundle, extra={**base.extra, **reference.extra})
            return dataclasses.replace(base, bundle=bundle, lora=reference)
        bundle = read_model(path, variant, vae, text, **reading)
        if UNET not in bundle.parts or bundle.scheduler is None:
            raise ConfigError(f"{path} is an autoencoder alone, which draws nothing: name a model with a U-Net")
        if whole:
            check_complete(bundle, path)
        schedule, target = schedulers.scheduler_from_diffusers(bundle.scheduler)
        sampling, missing = schedulers.sampler_from_diffusers(bundle.scheduler)
        if missing and "defaults" not in bundle.extra:
            warnings.warn(
                f"{path}: scheduler: {missing}: images are drawn with ddim instead, unless you name a sampler",
                stacklevel=1,
            )
        return cls(path, bundle, unet_from_diffusers(bundle.parts[UNET].config), schedule, target, sampling)

    @property
    def extra(self) -> Mapping[str, Any]:
        """The contents of `ldm.json`."""
        return self.bundle.extra

    @property
    def autoencoder(self) -> Mapping[str, Any] | None:
        """Its configuration, in diffusers' words; None: a pixel model."""
        return self.bundle.parts[VAE].config if VAE in self.bundle.parts else None

    @property
    def has_text(self) -> bool:
        """True if the model has a text encoder."""
        return TEXT in self.bundle.parts

    @property
    def conditioner(self) -> Conditioner | None:
        """Encodes values of its conditions beside the caption; None: it has none. Raises FolderError."""
        if "conditions" not in self.extra:
            return None
        try:
            conditioner = Conditioner.from_dict(self.extra["conditions"])
        except ConfigError as error:
            raise FolderError(f"{self.path}: {EXTRA}: {error}") from None
        if conditioner.width != self.unet.config.vector_dim:
            raise FolderError(
                f"{self.path}: {EXTRA}: its conditions are a vector of {conditioner.width}, and the U-Net takes"
                f" {self.unet.config.vector_dim or 'none'}"
            )
        return conditioner

    @property
    def hash(self) -> str:
        """sha256 over the files of the weights, a LoRA's not included; reads them."""
        return joined_hash(self.bundle.files)

    @property
    def factor(self) -> int:
        """Image side divided by the side of what is diffused."""
        return autoencoder_from_diffusers(self.autoencoder).factor if self.autoencoder else 1

    @property
    def sample_size(self) -> int:
        """Side of the training images in pixels."""
        return self.extra.get("sample_size") or sample_side(self.bundle.parts[UNET].config) * self.factor

    @property
    def defaults(self) -> SampleConfig:
        """Sampling settings for what a caller leaves out."""
        return build(SampleConfig, self.extra.get("defaults", self.sampling), "defaults.")


def load_unet(info: ModelInfo) -> UNet:
    """The U-Net of a model, frozen, in the precision of the file, without a LoRA. Raises FolderError."""
    return fill(info.unet.make, info.bundle.parts[UNET], "U-Net")


def schedule_hash(schedule: ScheduleConfig) -> str:
    """sha256 of a schedule's settings."""
    return sha256(json.dumps(dataclasses.asdict(schedule), sort_keys=True).encode()).hexdigest()
