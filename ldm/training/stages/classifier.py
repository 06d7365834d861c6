"""The classifier of noisy samples.

Cross-entropy on x_t, with t uniform and an input of the network (docs/equations.md L11).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.config import NONE, ClassifierTrainingConfig, ConfigError, DataConfig, DiffusionTrainingConfig
from ldm.data.dataset import Batch, RandomFields, Stream, scattered, validation_batches
from ldm.data.folder import FolderSource
from ldm.data.latent_cache import LatentCache
from ldm.data.sample import Source
from ldm.data.sources import open_source
from ldm.data.transforms import grid, to_uint8
from ldm.diffusion.objective import classifier_loss
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.timesteps import uniform_timesteps
from ldm.distributed.launch import launched
from ldm.interop.bundle import VAE
from ldm.interop.classifier import ClassifierInfo
from ldm.pipeline.codec import LatentCodec, codec_of
from ldm.pipeline.info import ModelInfo, schedule_hash
from ldm.training.stages.diffusion import BINS, PICTURES
from ldm.training.stages.latents import diffused, ensure_cache
from ldm.training.task import Networks, seeded

MOST_CLASSES = 10_000


class ClassifierTask:
    """Trains ``classifier`` on the noisy latents (or pixels) of a diffusion model."""

    averaged = "classifier"

    def __init__(
        self,
        config: ClassifierTrainingConfig,
        info: ClassifierInfo,
        codec: LatentCodec | None,
        source: Source,
        validation: Source,
        cache: LatentCache | None,
    ) -> None:
        self.config, self.info, self.codec, data, seed = config, info, codec, config.data, config.train.seed
        self.classifier = seeded(seed, info.make)
        self.networks: dict[str, nn.Module] = {"classifier": self.classifier}
        self.schedule = Schedule.from_config(info.schedule)
        side = data.image_size // (codec.autoencoder.config.factor if codec else 1)
        shape = info.in_channels, side, side
        normals = {"eps": shape} | ({"posterior": shape} if codec else {})
        self.stream = Stream(source, data, seed, RandomFields(normals, ("t",)), cache)
        self.validation = Stream(validation, data, seed, RandomFields(normals), validation=True)
        self.device = torch.device("cpu")

    @classmethod
    def from_config(cls, config: ClassifierTrainingConfig, say: Callable[[str], None]) -> ClassifierTask:
        """Open the diffusion model and the data, and encode the data set where a latent cache is missing."""
        data, diffusion = config.data, ModelInfo.read(config.diffusion)
        codec = codec_of(diffusion.bundle.parts[VAE]) if diffusion.autoencoder else None
        in_channels = diffusion.unet.in_channels
        _check_data(data, diffusion, codec.autoencoder.config.image_channels if codec else in_channels)
        source, validation = open_source(data, "train"), open_source(data, "validation")
        classes, captions = find_classes(source, data)
        for text in validation.captions(MOST_CLASSES) or ():
            if text not in captions:
                raise ConfigError(
                    f"data: {text!r} is in the validation split alone: a classifier needs images of each class to"
                    " train on"
                )
        latents = codec.hash if codec else None
        info = ClassifierInfo(config.model, classes, captions, in_channels, diffusion.schedule, latents)
        cache = None
        if codec is not None and data.crop == "center":
            stage2 = DiffusionTrainingConfig(config.run, data, str(diffusion.path), NONE)  # whose latents these are
            cache = ensure_cache(stage2, codec.autoencoder, source, say, *launched())
        return cls(config, info, codec, source, validation, cache)

    @property
    def summary(self) -> list[str]:
        """Lines to print once, before training."""
        parameters = sum(p.numel() for p in self.classifier.parameters())
        what = "pixels" if self.codec is None else "latents"
        size = "×".join(map(str, self.stream.draws.normals["eps"]))
        return [
            f"classifier of {parameters / 1e6:.2f} M parameters on {what} of {size}, {len(self.info.classes)} classes"
        ]

    def lr_scale(self, network: str) -> float:
        return 1.0

    def to(self, device: torch.device) -> None:
        self.device = device
        self.schedule = self.schedule.to(device)
        if self.codec is not None:
            self.codec.autoencoder.to(device)

    def micro_step(
        self, networks: Networks, batch: Batch, update: int, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        loss, right = self._judged(
            networks["classifier"], batch, uniform_timesteps(batch["t"], self.schedule.num_steps)
        )
        backward(loss.mean())
        return {"loss": loss.detach().mean(), "accuracy": right.float().mean()}

    def _judged(self, classifier: Callable[[Tensor, Tensor], Tensor], batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy on x_t of each sample, and True where its likeliest class is right."""
        label = torch.tensor([self.info.label(text) for text in batch["text"]], device=self.device)
        loss, logits = classifier_loss(self.schedule, classifier, diffused(self.codec, batch), batch["eps"], t, label)
        return loss, logits.argmax(1) == label

    def initialize(self) -> None:
        """The initial weights take nothing from the data."""

    def after_update(self, update: int, reduce: Callable[[Tensor], Tensor], finite: Tensor) -> None:
        """Nothing depends on the whole global batch."""

    def state(self) -> dict[str, Any]:
        return {
            "classes": list(self.info.classes),
            "autoencoder": self.info.autoencoder,
            "schedule": schedule_hash(self.info.schedule),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError if classes or latents have changed: the logits would mean something else."""
        for name, value in self.state().items():
            if state.get(name, value) != value:  # older checkpoints lack the schedule
                raise ConfigError(f"the {name} of this run have changed since it began: use another run: directory")

    def validate(self, update: int, gather: Callable[[Tensor], Tensor], rank: int, processes: int) -> dict[str, Any]:
        """Cross-entropy, its standard error, and accuracy on fixed noise and stratified timesteps.

        Accuracy by tenths of 1…T too.
        """
        train, length = self.config.train, self.validation.source.length
        total = train.validation_size if length is None else min(train.validation_size, length)
        sums = torch.zeros(4, BINS, dtype=torch.float64, device=self.device)  # count, right, Σ loss, Σ loss²
        for positions, batch in validation_batches(self.validation, total, train.batch_size, rank, processes):
            moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            t = uniform_timesteps(scattered(positions, total), self.schedule.num_steps).to(self.device)
            loss, right = self._judged(self.classifier, moved, t)
            rows = torch.stack([torch.ones_like(loss), right, loss, loss.double().square()]).double()
            sums.index_add_(1, t * BINS // self.schedule.num_steps, rows)
        count, right, loss, square = gather(sums[None]).sum(0).cpu()
        n, mean = count.sum(), loss.sum() / count.sum()
        error = ((square.sum() / n - mean.square()).clamp(min=0) / n).sqrt()
        whole = {"loss": float(mean), "loss_error": float(error), "accuracy": float(right.sum() / n)}
        return {**whole, "accuracy_by_t": (right / count).tolist()}

    def previews(self) -> dict[str, np.ndarray]:
        """The first validation images."""
        count = min(PICTURES, self.validation.source.length or PICTURES)
        return {"images": grid(to_uint8(torch.stack([self.validation[i]["image"] for i in range(count)])), count)}

    def export(self, folder: Path) -> None:
        """Write ``classifier``."""
        self.info.save(self.classifier, folder / "classifier")


def _check_data(data: DataConfig, diffusion: ModelInfo, image_channels: int) -> None:
    wanted = {"image_channels": image_channels, "image_size": diffusion.sample_size}
    for name, value in wanted.items():
        if (given := getattr(data, name)) != value:
            raise ConfigError(
                f"data.{name} is {given} but the diffusion model's is {value}: the classifier sees what it draws"
            )


def find_classes(source: Source, data: DataConfig) -> tuple[tuple[str, ...], dict[str, int]]:
    """The names of the classes of a training split, sorted, and the class of each caption. Raises ConfigError.

    A folder's classes have one caption for each template; elsewhere each caption is a class.
    """
    if isinstance(source, FolderSource):
        names = sorted({row.columns["class"] for row in source.rows})
        captions = [
            (template.replace("{}", name), i)
            for i, name in enumerate(names)
            for template in dict.fromkeys(data.caption_templates)
        ]
    else:
        names = source.captions(MOST_CLASSES) or []
        captions = [(name, i) for i, name in enumerate(names)]
    if not 2 <= len(names) <= MOST_CLASSES:
        raise ConfigError(
            f"data: a classifier needs 2 to {MOST_CLASSES} classes, the training split has {len(names) or 'more'}"
        )
    if len(dict(captions)) < len(captions):
        raise ConfigError("data.caption_templates give two classes the same caption: choose other templates")
    return tuple(names), dict(captions)
