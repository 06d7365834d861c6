"""The text stage: a small CLIP trained by contrast on the run's own images and captions (Radford et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ldm.config import ClipTrainingConfig, ConfigError
from ldm.data.dataset import Batch, RandomFields, Stream, validation_batches
from ldm.data.sources import open_source
from ldm.data.transforms import grid, to_uint8
from ldm.interop.bundle import TEXT
from ldm.interop.diffusers.folder import FILES
from ldm.interop.intact import write_hashes
from ldm.models.clip import build_clip, from_clip, save_clip, train_tokenizer, vocabulary_hash
from ldm.models.contrastive import contrastive_loss, left_right_accuracy, retrieval_top1, same_captions, swap_relation
from ldm.models.text import tokenize
from ldm.training.task import Networks, seeded

TOKENIZER_CAPTIONS = 20_000  # captions at most from which the merges are learned
PICTURES = 8


class ClipTask:
    """Trains ``clip``: a text tower and a vision tower."""

    averaged = "clip"

    def __init__(self, config: ClipTrainingConfig) -> None:
        self.config, data, seed = config, config.data, config.train.seed
        source = open_source(data, "train")
        captions = _captions(source)
        self.tokenizer = train_tokenizer(captions, config.model.merges, config.model.max_length)
        self._cut = tokenize(self.tokenizer, captions, config.model.max_length)[1], len(captions)
        self.clip = seeded(seed, lambda: build_clip(config.model, self.tokenizer, data.image_size, data.image_channels))
        self.networks: dict[str, nn.Module] = {"clip": self.clip}
        self.stream = Stream(source, data, seed, RandomFields({}))
        # held-out combinations where the source has them: captions never seen
        split = "held_out" if data.source.startswith("shapes") else "validation"
        self.validation = Stream(open_source(data, split), data, seed, RandomFields({}), validation=True)
        self.device = torch.device("cpu")

    @property
    def summary(self) -> list[str]:
        """Lines to print once, before training."""
        parameters = sum(p.numel() for p in self.clip.parameters())
        cut, counted = self._cut
        said = (
            [f"{cut} of {counted} captions are longer than {self.config.model.max_length} tokens and are cut"]
            if cut
            else []
        )
        return [f"CLIP of {parameters / 1e6:.2f} M parameters, {len(self.tokenizer)} tokens", *said]

    def lr_scale(self, network: str) -> float:
        return 1.0

    def to(self, device: torch.device) -> None:
        self.device = device

    def _ids(self, captions: list[str]) -> Tensor:
        return tokenize(self.tokenizer, captions, self.config.model.max_length)[0].to(self.device)

    def _swapped(self, captions: list[str]) -> list[str]:
        """Each caption with its relation swapped, or as it is without one; none at all where that is not asked for."""
        return [swap_relation(caption) or caption for caption in captions] if self.config.swap_relations else []

    def micro_step(
        self, networks: Networks, batch: Batch, update: int, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        captions, swapped = batch["text"], self._swapped(batch["text"])
        output = networks["clip"](input_ids=self._ids(captions + swapped), pixel_values=batch["image"])
        text, wrong = output.text_embeds.split([len(captions), len(swapped)])
        everyones, scale = _all_captions(captions), self.clip.logit_scale
        negatives = None
        if swapped:
            true = set(everyones)  # also those that had no relation to swap
            false = [i for i, caption in enumerate(self._swapped(everyones)) if caption not in true]
            negatives = _all_rows(wrong)[false]
        same = same_captions(everyones).to(self.device)
        loss = contrastive_loss(_all_rows(output.image_embeds), _all_rows(text), scale, same, negatives)
        backward(loss)
        return {"loss": loss.detach(), "temperature": (-scale).exp().detach()}

    def initialize(self) -> None:
        """The initial weights take nothing from the data."""

    def after_update(self, update: int, reduce: Callable[[Tensor], Tensor], finite: Tensor) -> None:
        """Nothing depends on more than the batch."""

    def state(self) -> dict[str, Any]:
        return {"vocabulary": vocabulary_hash(self.tokenizer)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError if the vocabulary has changed: the tokens would mean something else."""
        if state != self.state():
            raise ConfigError(
                "the captions have changed, and with them the vocabulary that this run learned: use another run:"
                " directory"
            )

    def validate(self, update: int, gather: Callable[[Tensor], Tensor], rank: int, processes: int) -> dict[str, Any]:
        """Retrieval top-1 among held-out captions, and its standard error.

        Also the share of images closer to their caption than to its swapped one.
        """
        network, train = self.clip, self.config.train
        images, texts = [], []
        # the set is small, so every process computes all of it
        for _, batch in validation_batches(self.validation, train.validation_size, train.batch_size, 0, 1):
            features = network.get_image_features(batch["image"].to(self.device))
            images.append(features.pooler_output)  # type: ignore[union-attr]
            texts += batch["text"]
        image = torch.cat(images)
        distinct = sorted(set(texts))
        embedded = self._embed(distinct)
        own_caption = torch.tensor([distinct.index(t) for t in texts], device=self.device)
        top1 = retrieval_top1(image, embedded, own_caption)
        figures: dict[str, Any] = {
            "retrieval_top1": top1,
            "retrieval_top1_error": math.sqrt(top1 * (1 - top1) / len(texts)),
            "retrieval_captions": len(distinct),
        }
        related = [i for i, t in enumerate(texts) if swap_relation(t) is not None]
        if related:
            own, swapped = [texts[i] for i in related], [str(swap_relation(texts[i])) for i in related]
            figures["left_right"] = left_right_accuracy(image[related], self._embed(own), self._embed(swapped))
        else:
            figures["left_right"] = None
        return figures

    def _embed(self, captions: list[str]) -> Tensor:
        chunks = [self._ids(captions[i : i + 256]) for i in range(0, len(captions), 256)]
        features = [self.clip.get_text_features(ids).pooler_output for ids in chunks]  # type: ignore[union-attr]
        return torch.cat([cast(Tensor, one) for one in features])

    def previews(self) -> dict[str, np.ndarray]:
        """The first validation images."""
        count = min(PICTURES, self.validation.source.length or PICTURES)
        return {"images": grid(to_uint8(torch.stack([self.validation[i]["image"] for i in range(count)])), count)}

    def export(self, folder: Path) -> None:
        """Write ``text_encoder`` and ``tokenizer`` for stage 2, and the whole CLIP in ``clip``."""
        from_clip(self.clip, self.tokenizer).save(folder)
        write_hashes(folder, [folder / TEXT / FILES[TEXT]])
        save_clip(self.clip, folder / "clip")


def _alone() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def _all_captions(own: list[str]) -> list[str]:
    """The captions of all processes: the loss compares the whole global batch, and every process computes it."""
    if _alone():
        return own
    everyone: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, own)
    return [caption for part in everyone for caption in part]


def _all_rows(own: Tensor) -> Tensor:
    """The rows of all processes; only this one's carry a gradient.

    DistributedDataParallel averages gradients that must be summed here, so they are multiplied by the number of
    processes.
    """
    if _alone():
        return own
    processes = torch.distributed.get_world_size()
    parts = [torch.empty_like(own) for _ in range(processes)]
    torch.distributed.all_gather(parts, own.detach().contiguous())
    mine = own.view_as(own)
    mine.register_hook(lambda gradient: gradient * processes)
    parts[torch.distributed.get_rank()] = mine
    return torch.cat(parts)


def _captions(source: Any) -> list[str]:
    """Captions to learn the tokenizer's merges from: all distinct ones, or the first samples' of a large set."""
    distinct = source.captions(TOKENIZER_CAPTIONS)
    if distinct is not None:
        return distinct
    return [source.text(i) for i in range(min(source.length or TOKENIZER_CAPTIONS, TOKENIZER_CAPTIONS))]
