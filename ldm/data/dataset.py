"""The endless training stream: from positions to samples with all their random draws."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.config import ConfigError, DataConfig, InpaintConfig
from ldm.data import rng as streams
from ldm.data.folder import FolderSource
from ldm.data.latent_cache import LatentCache
from ldm.data.masks import draw_mask
from ldm.data.sample import BadSample, Skipped, Source
from ldm.data.transforms import prepare
from ldm.data.workers import Workers
from ldm.errors import DataError

SUBSTITUTES = 100  # samples tried in place of an unreadable one before the run stops

DIRECTION = re.compile(r"\b(left|right)\b", re.IGNORECASE)

Batch = dict[str, Any]  # tensors by name, and `text`: the captions
Encode = Callable[[Mapping[str, Any]], Tensor]  # a sample's columns to a vector


@dataclass(frozen=True)
class RandomFields:
    """Random draws of each sample: standard normal arrays, by shape, and numbers in [0, 1)."""

    normals: Mapping[str, tuple[int, ...]]
    uniforms: tuple[str, ...] = ()


class Stream(Dataset[Batch]):
    """Samples by position.

    Everything random about one is a function of (seed, stream name, position). A sample holds
    ``image`` [c, s, s] in [−1, 1] (or ``moments`` [2c, h, w] from the cache), ``text``,
    ``position`` and the draws; with ``encode`` what that makes of the sample's columns, as
    ``vector``; with ``masks`` a ``mask`` [1, s, s], 1 where the image is to be filled, and always
    the image. ``validation`` reads the source in order, centre-cropped and
    unmirrored, with random streams of its own. The substitute for an unreadable sample is a
    function of the position too; ``skipped`` lists the unreadable ones so far, in order of
    appearance.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        seed: int,
        draws: RandomFields,
        cache: LatentCache | None = None,
        validation: bool = False,
        encode: Encode | None = None,
        masks: InpaintConfig | None = None,
    ) -> None:
        self.source, self.data, self.seed, self.draws, self.cache = source, data, seed, draws, cache
        self.encode, self.masks = encode, masks
        self.prefix = "validation/" if validation else ""
        self.validation = validation
        self.order = streams.ShuffledOrder(seed, source.length)
        self.skipped: dict[Skipped, None] = dict.fromkeys(cache.skipped.values() if cache else ())

    def __getitem__(self, position: int) -> Batch:
        sample, skipped = self.read(position)
        self.skipped |= dict.fromkeys(skipped)
        return sample

    def read(self, position: int) -> tuple[Batch, list[Skipped]]:
        """The sample at ``position``, and the unreadable ones tried before it. Raises DataError."""
        skipped: list[Skipped] = []
        for index in self._candidates(position):
            try:
                found = self._cached(index, position) if self.cache is not None else self._prepared(index, position)
                return found | self._encoded(index) | self._masked(index, position) | self._drawn(position), skipped
            except BadSample as bad:
                skipped.append(bad.skipped)
        last = skipped[-1].file
        raise DataError(f"{SUBSTITUTES} samples in a row cannot be read, the last: {last}: check the files")

    def named(self, position: int) -> str:
        """A position as text, with its image file if it has one."""
        source = self.source
        if not isinstance(source, FolderSource):
            return f"position {position}"
        return f"position {position} ({source.folder / source.rows[self.order[position]].file_name})"

    def _encoded(self, index: int) -> Batch:
        return {} if self.encode is None else {"vector": self.encode(self.source.columns(index))}

    def _masked(self, index: int, position: int) -> Batch:
        """The mask, and the image that a cache does not hold."""
        if self.masks is None:
            return {}
        rng = streams.generator(self.seed, self.prefix + "mask", position)
        mask = torch.from_numpy(draw_mask(rng, self.data.image_size, self.masks)).float()[None]
        return {"mask": mask} if self.cache is None else {"mask": mask, **self._prepared(index, position)}

    def _drawn(self, position: int) -> Batch:
        """Random numbers of a position, and the position itself."""
        drawn: Batch = {"position": torch.tensor(position)}
        for name, shape in self.draws.normals.items():
            drawn[name] = torch.from_numpy(streams.normal(self.seed, self.prefix + name, position, shape))
        for name in self.draws.uniforms:
            drawn[name] = torch.tensor(streams.uniform(self.seed, self.prefix + name, position), dtype=torch.float64)
        return drawn

    def _candidates(self, position: int) -> Iterator[int]:
        yield position if self.validation else self.order[position]
        if self.source.length is not None:
            drawn = streams.generator(self.seed, self.prefix + "substitute", position)
            yield from (int(drawn.integers(self.source.length)) for _ in range(SUBSTITUTES))

    def _cached(self, index: int, position: int) -> Batch:
        assert self.cache is not None
        text = self.cache.text(index)
        return {"text": text, "moments": self.cache.moments(index, self._mirror(text, position))}

    def _prepared(self, index: int, position: int) -> Batch:
        drawn = self.source[index]
        crop = self.data.crop == "random" and not self.validation
        y, x = streams.generator(self.seed, self.prefix + "crop", position).random(2) if crop else (0.5, 0.5)
        mirror = self._mirror(drawn.text, position)
        return {"text": drawn.text, "image": prepare(drawn.image, self.data.image_size, (float(y), float(x)), mirror)}

    def _mirror(self, text: str, position: int) -> bool:
        """True if the sample is mirrored left–right: never if its caption says left or right."""
        if not self.data.flip or self.validation or DIRECTION.search(text):
            return False
        return streams.uniform(self.seed, "flip", position) < 0.5


def collate(samples: list[Batch]) -> Batch:
    """Stack the tensors of each name; other values, such as captions, become a list."""
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: torch.stack(c) if isinstance(c[0], Tensor) else c for name, c in columns.items()}


@dataclass(frozen=True)
class BatchPlan:
    """Split of a global batch: batch_size = processes × micro-batch × accumulation."""

    batch_size: int
    micro_batch: int
    processes: int
    rank: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of one process in one update."""
        return self.batch_size // (self.micro_batch * self.processes)

    def positions(self, update: int) -> Iterator[list[int]]:
        """Positions of this process's micro-batches in ``update`` (counted from 0)."""
        share = self.micro_batch * self.processes
        for i in range(self.accumulation):
            start = update * self.batch_size + i * share + self.rank * self.micro_batch
            yield list(range(start, start + self.micro_batch))


def plan_batch(batch_size: int, micro_batch: int | None, processes: int, rank: int) -> BatchPlan:
    """Split the global batch evenly. Raises ConfigError if it does not divide."""
    if micro_batch is None:
        if batch_size % processes:
            raise ConfigError(f"train.batch_size {batch_size} is not a multiple of {processes} processes")
        micro_batch = batch_size // processes
    if batch_size % (micro_batch * processes):
        raise ConfigError(
            f"train.batch_size {batch_size} is not a multiple of {processes} processes"
            f" × train.micro_batch {micro_batch}"
        )
    return BatchPlan(batch_size, micro_batch, processes, rank)


def batches(stream: Stream, plan: BatchPlan, first: int, last: int, workers: int) -> Generator[Batch, None, None]:
    """Yield the micro-batches of updates ``first`` … ``last`` − 1, in order. Raises DataError."""
    crew = Workers(workers, stream.data.worker_timeout)
    loader = DataLoader(
        _Carried(stream, crew),
        batch_sampler=_Positions(plan, first, last),  # type: ignore[arg-type]
        collate_fn=_collate_carried,
        num_workers=workers,
        worker_init_fn=crew.enter,
        pin_memory=torch.cuda.is_available(),
    )
    with crew.watched(loader) as feed:
        try:
            for positions in _Positions(plan, first, last):
                batch, skipped = crew.take(feed, positions, stream.named)
                stream.skipped |= dict.fromkeys(skipped)
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        finally:
            del feed  # without a fault, this shuts the workers down cleanly


class _Carried(Dataset[Any]):
    """Samples of a stream, each with those that were skipped for it.

    A DataError is returned as a value, so that it arrives from a worker unchanged and not as the
    text of a traceback.
    """

    def __init__(self, stream: Stream, crew: Workers) -> None:
        self.stream, self.crew = stream, crew

    def __getitem__(self, position: int) -> tuple[Batch | DataError, list[Skipped]]:
        self.crew.at(position)
        try:
            return self.stream.read(position)
        except DataError as error:
            return error, []


def _collate_carried(carried: list[Any]) -> tuple[Batch | DataError, list[Skipped]]:
    samples = [sample for sample, _ in carried]
    error = next((s for s in samples if isinstance(s, DataError)), None)
    return error or collate(samples), [skipped for _, several in carried for skipped in several]


class _Positions:
    """Batches of positions of a range of updates, generated on demand."""

    def __init__(self, plan: BatchPlan, first: int, last: int) -> None:
        self.plan, self.first, self.last = plan, first, last

    def __iter__(self) -> Iterator[list[int]]:
        for update in range(self.first, self.last):
            yield from self.plan.positions(update)

    def __len__(self) -> int:
        return (self.last - self.first) * self.plan.accumulation


def validation_batches(
    stream: Stream, size: int, batch_size: int, rank: int, processes: int
) -> Iterator[tuple[list[int], Batch]]:
    """Yield this process's share of positions 0 … size−1 (at most the source), with batches."""
    total = size if stream.source.length is None else min(size, stream.source.length)
    share = list(range(rank, total, processes))
    for i in range(0, len(share), batch_size):
        positions = share[i : i + batch_size]
        yield positions, collate([stream[p] for p in positions])


def scattered(positions: list[int], total: int) -> Tensor:
    """Midpoints of ``total`` equal parts of [0, 1), float64; neighbours in order are far apart."""
    stride = max(1, round(total * 0.618))  # made coprime to ``total`` below; near its golden section
    while math.gcd(stride, total) != 1:
        stride += 1
    parts = np.asarray([p * stride % total for p in positions])
    return torch.from_numpy((parts + 0.5) / total)
