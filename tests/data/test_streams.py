"""Randomness as a function of (seed, name, position), the training stream made of it, and the latent cache below it."""

import itertools
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.caches import FLIPPING, autoencoder, write

from autoencoder.posterior import DiagonalGaussian
from ldm.config import ConfigError, DataConfig
from ldm.data import latent_cache as cache
from ldm.data import rng as streams
from ldm.data.dataset import (
    BatchPlan,
    RandomFields,
    Stream,
    batches,
    collate,
    plan_batch,
    scattered,
    validation_batches,
)
from ldm.data.sample import BadSample, Sample, Skipped, readable
from ldm.data.sources import open_source
from ldm.data.transforms import prepare
from ldm.errors import DataError

SHAPES = DataConfig(source="shapes", image_size=24, size=12)
DRAWS = RandomFields({"eps": (2, 3, 3), "posterior": (1, 4, 4)}, ("t", "drop"))


class Ramp:
    """Images whose first channel is the column, the second the row, the third the index of the sample."""

    def __init__(self, length: int | None = 5, side: tuple[int, int] = (8, 8), broken: int = -1) -> None:
        self.length, self.side, self.broken, self.fingerprint = length, side, broken, f"ramp {length} {side}"
        self.skipped: tuple[Skipped, ...] = ()

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise DataError("picture-7.png: cannot be decoded")
        h, w = self.side
        rows, columns = np.mgrid[:h, :w]
        return Sample(np.stack([columns, rows, np.full((h, w), index)], axis=-1).astype(np.uint8), f"number {index}")

    def text(self, index: int) -> str:
        return f"number {index}"

    def columns(self, index: int) -> dict[str, int]:
        return {}

    def captions(self, limit: int) -> list[str] | None:
        return None


def values(image: torch.Tensor) -> np.ndarray:
    """The uint8 picture again, [c, h, w]."""
    return ((image + 1) * 127.5).round().numpy().astype(int)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


# draws


def kolmogorov(sample: np.ndarray, cdf: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """√n · sup|F_n − F|; above 1.95 with probability 0.001 where the law is the right one."""
    x = np.sort(sample.ravel().astype(np.float64))
    f, n = cdf(torch.from_numpy(x)).numpy(), len(x)
    return math.sqrt(n) * max((np.arange(1, n + 1) / n - f).max(), (f - np.arange(n) / n).max())


def test_normals_are_normal_within_and_across_positions() -> None:
    within = streams.normal(3, "eps", 17, (50, 400))
    across = np.array([streams.normal(3, "eps", p, (2,)) for p in range(20_000)])
    for sample in (within, across[:, 0], across[:, 1]):
        n = sample.size
        assert kolmogorov(sample, torch.special.ndtr) < 1.95
        for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
            spread = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0}[power]  # variance of x^power
            assert abs((sample.astype(np.float64) ** power).mean() - moment) < 4 * math.sqrt(spread / n)
    assert abs(np.corrcoef(across[:-1, 0], across[1:, 0])[0, 1]) < 4 / math.sqrt(20_000)  # neighbours in position
    assert within.dtype == np.float32


def test_uniforms_are_uniform_across_positions() -> None:
    sample = np.array([streams.uniform(5, "t", p) for p in range(20_000)])
    assert kolmogorov(sample, lambda x: x) < 1.95 and sample.min() >= 0 and sample.max() < 1
    assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 4 / math.sqrt(20_000)


def test_a_draw_is_a_function_of_seed_name_and_position_alone() -> None:
    keys = [
        (s, n, p) for s in (0, 1, 2**63 - 1) for n in ("eps", "posterior", "validation/eps") for p in (0, 1, 2, 10**12)
    ]
    first = {key: streams.normal(*key, (64,)) for key in keys}
    np.random.seed(1)  # the global generators have no part in it
    torch.manual_seed(1)
    for key in reversed(keys):
        assert np.array_equal(first[key], streams.normal(*key, (64,)))
    drawn = np.stack(list(first.values()))
    assert len(np.unique(drawn)) > 0.999 * drawn.size  # no two keys share numbers, shifted or not
    shape = streams.normal(0, "eps", 1, (4, 4, 4))
    assert np.array_equal(shape.ravel(), first[0, "eps", 1])  # a smaller or reshaped draw begins alike


def test_positions_do_not_overlap_however_much_is_drawn() -> None:
    raw = [
        streams.generator(0, name, p).bit_generator.random_raw(100_000)
        for name, p in (("eps", 0), ("eps", 1), ("t", 0))
    ]
    assert len(np.unique(np.concatenate(raw))) == 300_000  # 64 bits each: no chance of a coincidence


def test_order_is_a_permutation_in_each_epoch_and_another_in_the_next() -> None:
    order, n = streams.ShuffledOrder(7, 50), 50
    epochs = [[order[e * n + i] for i in range(n)] for e in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [order[i] for i in (120, 3, 77, 3)] == [
        epochs[2][20],
        epochs[0][3],
        epochs[1][27],
        epochs[0][3],
    ]  # any order of asking
    assert [streams.ShuffledOrder(8, 50)[i] for i in range(n)] != epochs[0]
    first = np.array([streams.ShuffledOrder(seed, 10)[0] for seed in range(2000)])  # each sample is first equally often
    assert ((np.bincount(first, minlength=10) - 200) ** 2 / 200).sum() < 27.9  # χ² with 9 degrees of freedom, 0.001


def test_an_endless_source_is_read_straight_through() -> None:
    assert [streams.ShuffledOrder(0, None)[i] for i in (0, 5, 10**9)] == [0, 5, 10**9]


# the split of a batch


SPLITS = [(8, None, 1), (8, 4, 2), (8, 2, 1), (8, 2, 4), (8, 1, 2), (8, 2, 2)]


@pytest.mark.parametrize(("batch", "micro", "processes"), SPLITS)
def test_every_split_covers_the_same_positions_once(batch: int, micro: int | None, processes: int) -> None:
    for update in (0, 5):
        parts = [plan_batch(batch, micro, processes, rank) for rank in range(processes)]
        covered = [p for part in parts for micro_batch in part.positions(update) for p in micro_batch]
        assert sorted(covered) == list(range(update * batch, (update + 1) * batch))
        assert all(len(list(part.positions(update))) == part.accumulation for part in parts)
        assert all(part.accumulation * part.micro_batch * processes == batch for part in parts)


@pytest.mark.parametrize(("batch", "micro", "processes"), [(8, None, 3), (8, 3, 1), (8, 4, 4)])
def test_an_uneven_split_is_one_line(batch: int, micro: int | None, processes: int) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size 8 is not a multiple of"):
        plan_batch(batch, micro, processes, 0)


def stream(**changes: Any) -> Stream:
    data = DataConfig(**{"source": "shapes", "image_size": 24, "size": 12, "flip": True, "crop": "random", **changes})
    return Stream(open_source(data, "train"), data, 4, DRAWS)


def test_batches_do_not_depend_on_workers_split_or_start() -> None:
    whole = list(batches(stream(), BatchPlan(8, 8, 1, 0), 0, 3, workers=0))
    assert (
        len(whole) == 3
        and whole[0]["eps"].shape == (8, 2, 3, 3)
        and whole[0]["t"].dtype == torch.float64
        and len(whole[0]["text"]) == 8
    )
    for other, wanted in zip(batches(stream(), BatchPlan(8, 8, 1, 0), 0, 3, workers=2), whole, strict=True):
        assert same(other, wanted)
    assert same(next(iter(batches(stream(), BatchPlan(8, 8, 1, 0), 2, 3, workers=0))), whole[2])  # resumed at update 2
    parts = [list(batches(stream(), BatchPlan(8, 2, 2, rank), 1, 2, workers=0)) for rank in (0, 1)]
    pieces = [parts[rank][i] for i in (0, 1) for rank in (0, 1)]  # position runs over ranks, then over accumulation
    joined = {
        k: torch.cat([p[k] for p in pieces]) if isinstance(v, torch.Tensor) else [x for p in pieces for x in p[k]]
        for k, v in whole[1].items()
    }
    assert same(joined, whole[1])


def test_each_name_position_and_seed_has_numbers_of_its_own() -> None:
    one = collate([stream()[p] for p in range(24)])
    assert len(torch.unique(one["eps"])) > 0.99 * one["eps"].numel()
    assert not torch.equal(one["t"], one["drop"])
    assert not same(one, collate([Stream(open_source(SHAPES, "train"), SHAPES, 5, DRAWS)[p] for p in range(24)]))
    validation = Stream(open_source(SHAPES, "validation"), SHAPES, 4, DRAWS, validation=True)
    assert not torch.equal(validation[0]["eps"], one["eps"][0])


def test_one_epoch_shows_every_sample_once() -> None:
    data = DataConfig(source="shapes", image_size=8, size=5)
    reading = Stream(Ramp(), data, 0, RandomFields({}))
    for epoch in range(3):
        assert sorted(reading[epoch * 5 + i]["text"] for i in range(5)) == [f"number {i}" for i in range(5)]


def test_flips_are_half_and_crops_even() -> None:
    data = DataConfig(source="shapes", image_size=8, flip=True, crop="random")
    reading = Stream(Ramp(None, (8, 11)), data, 0, RandomFields({}))
    pictures = [values(reading[p]["image"])[0] for p in range(4000)]
    flipped = np.array([row[0, 0] > row[0, 1] for row in pictures])
    left = np.array([row[0].min() for row in pictures])
    assert all(
        np.array_equal(np.sort(row[0]), np.arange(low, low + 8)) for row, low in zip(pictures, left, strict=True)
    )
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    counts = np.bincount(left)
    assert len(counts) == 4 and ((counts - 1000) ** 2 / 1000).sum() < 16.3  # χ², 3 degrees of freedom, 0.001
    table = np.bincount(2 * left + flipped, minlength=8)
    assert ((table - 500) ** 2 / 500).sum() < 24.3  # 7 degrees: crop and flip are independent of each other


def test_each_choice_has_draws_of_its_own() -> None:
    """Mirror and crop follow the streams `flip` and `crop`, vertical first, independent of `t` and `drop`."""
    data = DataConfig(source="shapes", image_size=8, flip=True, crop="random")
    reading, positions = Stream(Ramp(None, (8, 11)), data, 6, RandomFields({}, ("t", "drop"))), range(2000)
    samples = [reading[p] for p in positions]
    rows = [values(sample["image"])[0, 0] for sample in samples]
    flipped, left = np.array([row[0] > row[1] for row in rows]), np.array([row.min() for row in rows])
    assert flipped.tolist() == [streams.uniform(6, "flip", p) < 0.5 for p in positions]
    assert left.tolist() == [int(4 * streams.generator(6, "crop", p).random(2)[1]) for p in positions]
    drawn = [flipped, left, *([float(sample[name]) for sample in samples] for name in ("t", "drop"))]
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 4 / math.sqrt(2000)


def test_an_image_comes_mirrored_and_not_and_in_another_crop_each_epoch() -> None:
    data = DataConfig(source="shapes", image_size=8, crop="random", flip=True)
    reading = Stream(Ramp(3, side=(8, 40)), data, 0, RandomFields({}))
    seen: dict[str, list[tuple[bool, int]]] = {}
    for position in range(60):  # twenty epochs
        sample = reading[position]
        columns = values(sample["image"])[0, 0]
        seen.setdefault(sample["text"], []).append((bool(columns[0] > columns[-1]), int(columns.min())))
    assert len(seen) == 3
    for views in seen.values():
        assert len({mirrored for mirrored, _ in views}) == 2 and len({column for _, column in views}) > 10


def test_a_caption_that_says_left_or_right_is_never_mirrored() -> None:
    class Sided(Ramp):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return Sample(sample.image, ("a cat Left of a dog", "the leftover", "on the right", "bright")[index % 4])

    reading = Stream(Sided(None, (8, 8)), DataConfig(source="shapes", image_size=8, flip=True), 0, RandomFields({}))
    mirrored: dict[str, list[bool]] = {}
    for p in range(200):
        row = values(reading[p]["image"])[0, 0]
        mirrored.setdefault(reading[p]["text"], []).append(bool(row[0] > row[1]))
    assert not any(mirrored["a cat Left of a dog"] + mirrored["on the right"])
    assert any(mirrored["the leftover"]) and any(mirrored["bright"])


def test_tall_images_are_cropped_along_their_height() -> None:
    reading = Stream(Ramp(None, (11, 8)), DataConfig(source="shapes", image_size=8, crop="random"), 0, RandomFields({}))
    assert {int(values(reading[p]["image"])[1].min()) for p in range(100)} == {0, 1, 2, 3}


def test_validation_is_in_order_in_the_middle_and_unmirrored() -> None:
    data = DataConfig(source="shapes", image_size=8, flip=True, crop="random")
    reading = Stream(Ramp(5, (8, 10)), data, 0, RandomFields({"noise": (2,)}), validation=True)
    samples = [reading[p] for p in range(5)]
    assert [s["text"] for s in samples] == [f"number {i}" for i in range(5)]
    assert all(np.array_equal(values(s["image"])[0, 0], np.arange(1, 9)) for s in samples)


def test_validation_is_shared_out_once_and_stops_at_the_source() -> None:
    reading = Stream(Ramp(5), DataConfig(source="shapes", image_size=8), 0, RandomFields({}), validation=True)
    shares = [
        [p for positions, _ in validation_batches(reading, 100, 2, rank, 2) for p in positions] for rank in (0, 1)
    ]
    assert shares == [[0, 2, 4], [1, 3]]
    assert [positions for positions, _ in validation_batches(reading, 3, 2, 0, 1)] == [[0, 1], [2]]


@pytest.mark.parametrize("total", [1, 4, 89, 256])
def test_validation_draws_every_part_once_and_not_in_order(total: int) -> None:
    middles = scattered(list(range(total)), total)
    assert torch.equal(middles.sort().values, (torch.arange(total, dtype=torch.float64) + 0.5) / total)
    assert total < 5 or (middles.diff().abs() > 0.3).all()  # neighbours in the data: often of one class
    assert torch.equal(scattered([total - 1], total), middles[-1:])  # whichever process reads it


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_error_arrives_as_one_line(workers: int) -> None:
    reading = Stream(Ramp(5, broken=3), DataConfig(source="shapes", image_size=8), 0, RandomFields({}))
    with pytest.raises(DataError) as caught:
        list(batches(reading, BatchPlan(5, 5, 1, 0), 0, 1, workers))
    assert str(caught.value) == "picture-7.png: cannot be decoded"


def test_workers_leave_signals_to_the_trainer() -> None:
    """Ctrl-C and a scheduler's signals reach the whole process group; the trainer still needs its batches."""
    reading = Stream(Ramp(5), DataConfig(source="shapes", image_size=8), 0, RandomFields({}))
    feed = batches(reading, BatchPlan(5, 5, 1, 0), 0, 30, workers=2)
    for _ in range(2):  # one from each, so that both are at work
        next(feed)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(worker.pid or 0, number)
    assert len(list(feed)) == 28
    for worker in workers:
        worker.join(20)
    assert all(worker.exitcode == 0 for worker in workers)


def test_closing_the_feed_ends_its_workers_in_spite_of_a_signal() -> None:
    reading = Stream(Ramp(5), DataConfig(source="shapes", image_size=8), 0, RandomFields({}))
    feed = batches(reading, BatchPlan(5, 5, 1, 0), 0, 1000, workers=1)
    next(feed)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGTERM)
    feed.close()
    worker.join(20)
    assert worker.exitcode == 0


class Holes(Ramp):
    """Some of its files are damaged."""

    damaged = frozenset({1, 4, 5})

    def __getitem__(self, index: int) -> Sample:
        if index in self.damaged:
            raise BadSample(f"{index}.png", "cannot be decoded")
        return super().__getitem__(index)


HOLES = DataConfig(source="shapes", image_size=8)


def test_what_replaces_a_damaged_sample_is_a_function_of_its_position() -> None:
    order = streams.ShuffledOrder(7, 10)
    whole, holes = (Stream(source(10), HOLES, 7, RandomFields({"eps": (2,)}, ("t",))) for source in (Ramp, Holes))
    taken = {}
    for position in range(40):
        a, b = holes[position], whole[position]
        taken[position] = a["text"]
        assert a["text"] not in {f"number {i}" for i in Holes.damaged}
        assert order[position] in Holes.damaged or same(a, b)
        assert all(torch.equal(a[name], b[name]) for name in ("eps", "t", "position"))  # the draws are the position's
    assert set(holes.skipped) == {Skipped(f"{i}.png", "cannot be decoded") for i in Holes.damaged}
    substitutes = [taken[p] for p in range(40) if order[p] in Holes.damaged]
    assert len(substitutes) == 12 and len(set(substitutes)) > 3  # not the same neighbour each time
    for workers, split in ((0, (0, 1)), (2, (0, 1)), (0, (1, 2)), (0, (0, 2))):
        fresh = Stream(Holes(10), HOLES, 7, RandomFields({}))
        rank, processes = split
        rows = BatchPlan(20, 20 // processes, processes, rank)
        read = [
            (p, text)
            for batch in batches(fresh, rows, 1, 2, workers)
            for p, text in zip(batch["position"].tolist(), batch["text"], strict=True)
        ]
        assert read == [(p, taken[p]) for positions in rows.positions(1) for p in positions]
        assert processes == 2 or set(fresh.skipped) == set(holes.skipped)  # what workers met is known here too


def test_validation_has_substitutes_too_and_a_set_of_ruins_stops_the_run() -> None:
    stream = Stream(Holes(10), HOLES, 7, RandomFields({}), validation=True)
    texts = [stream[i]["text"] for i in range(10)]
    assert [t for i, t in enumerate(texts) if i not in Holes.damaged] == [
        f"number {i}" for i in range(10) if i not in Holes.damaged
    ]
    assert len(texts) == 10 and [stream[i]["text"] for i in range(10)] == texts and len(stream.skipped) == 3
    ruins = Holes(2)
    ruins.damaged = frozenset({0, 1})  # type: ignore[misc]
    with pytest.raises(DataError, match=r"100 samples in a row cannot be read, the last: [01]\.png"):
        list(batches(Stream(ruins, HOLES, 0, RandomFields({})), BatchPlan(5, 5, 1, 0), 0, 1, 1))
    assert [(i, s.text) for i, s in readable(Holes(7))] == [(i, f"number {i}") for i in (0, 2, 3, 6)]
    assert [i for i, _ in readable(Holes(7), [5, 3, 0])] == [3, 0]


# the latent cache


def test_cached_moments_are_those_of_a_direct_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD", 4)  # three files
    seen: list[tuple[int, int]] = []
    network, source, key = write(tmp_path / "latents", progress=lambda done, total: seen.append((done, total)))
    held = cache.LatentCache(tmp_path / "latents", key)
    assert held.length == 10 and seen[-1] == (10, 10) and len(list((tmp_path / "latents").glob("*.safetensors"))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]
    for i in range(10):
        image = prepare(source[i].image, 24)[None]
        with torch.no_grad():
            plain, mirrored = network.encode(image).moments[0], network.encode(image.flip(3)).moments[0]
        torch.testing.assert_close(held.moments(i), plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(held.moments(i, mirror=True), mirrored, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain, mirrored, atol=1e-3) and held.text(i) == source[i].text


def test_a_cached_stream_gives_what_the_image_stream_gives_and_never_the_same_noise(tmp_path: Path) -> None:
    network, source, key = write(tmp_path / "latents")
    draws = RandomFields({"posterior": (2, 12, 12)})
    cached = Stream(source, FLIPPING, 3, draws, cache.LatentCache(tmp_path / "latents", key))
    direct = Stream(source, FLIPPING, 3, draws)
    latents: dict[str, list[torch.Tensor]] = {}
    for position in range(30):  # three epochs
        a, b = cached[position], direct[position]
        with torch.no_grad():
            moments = network.encode(b["image"][None]).moments[0]
        torch.testing.assert_close(
            a["moments"], moments, rtol=1e-4, atol=1e-5
        )  # mirrored at the same positions as well
        assert a["text"] == b["text"] and torch.equal(a["posterior"], b["posterior"])
        latents.setdefault(a["text"], []).append(
            DiagonalGaussian.from_moments(a["moments"][None]).sample(a["posterior"][None])
        )
    several = [drawn for drawn in latents.values() if len(drawn) >= 3]
    assert several and all(not torch.equal(x, y) for drawn in several for x, y in itertools.pairwise(drawn))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"autoencoder": "another"}, "autoencoder"),
        ({"data": "another"}, "data"),
        ({"transform": {"image_size": 32, "crop": "center", "flip": True}}, "transform"),
        ({"format": 1}, "format"),
    ],
)
def test_a_cache_made_for_something_else_is_refused_by_name(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    _, _, key = write(tmp_path / "latents")
    with pytest.raises(DataError, match=f"another {name}"):
        cache.LatentCache(tmp_path / "latents", {**key, **change})


def test_what_cannot_be_encoded_is_named_and_replaced_as_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD", 4)
    data, holes = DataConfig(source="shapes", image_size=24, size=10, flip=True), Holes(10, (24, 24))
    key = cache.cache_key("abc", holes, data)
    network = autoencoder()
    cache.write(tmp_path / "latents", key, network, holes, data, torch.device("cpu"), batch=3)
    held = cache.LatentCache(tmp_path / "latents", key)
    assert held.skipped == {i: Skipped(f"{i}.png", "cannot be decoded") for i in Holes.damaged}
    with pytest.raises(BadSample, match=r"4\.png: cannot be decoded"):
        held.moments(4)
    cached, direct = Stream(holes, data, 3, RandomFields({}), held), Stream(holes, data, 3, RandomFields({}))
    assert set(cached.skipped) == set(held.skipped.values())  # known before the first sample
    for position in range(20):
        a, b = cached[position], direct[position]
        assert a["text"] == b["text"]
        with torch.no_grad():
            torch.testing.assert_close(a["moments"], network.encode(b["image"][None]).moments[0], rtol=1e-4, atol=1e-5)


def test_the_binding_sees_what_matters() -> None:
    source = open_source(FLIPPING, "train")
    key = cache.cache_key("abc", source, FLIPPING)
    other_size = DataConfig(source="shapes", image_size=24, size=11, flip=True)
    unflipped = DataConfig(source="shapes", image_size=24, size=10)
    assert cache.cache_key("abd", source, FLIPPING)["autoencoder"] != key["autoencoder"]
    assert cache.cache_key("abc", open_source(other_size, "train"), other_size)["data"] != key["data"]
    assert cache.cache_key("abc", open_source(unflipped, "train"), unflipped)["transform"] != key["transform"]


def test_no_cache_and_an_endless_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no latent cache"):
        cache.LatentCache(tmp_path / "latents", {})
    with pytest.raises(DataError, match=r"set data\.size"):
        write(tmp_path / "latents", DataConfig(source="shapes", image_size=24))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError("row 3"), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing_and_keeps_the_old(
    tmp_path: Path, error: BaseException | type[BaseException]
) -> None:
    _, _, key = write(tmp_path / "latents")
    before = (tmp_path / "latents/cache.json").read_text()

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise error

    for folder in ("latents", "fresh"):
        with pytest.raises(error if isinstance(error, type) else type(error)):
            write(tmp_path / folder, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]
    assert (tmp_path / "latents/cache.json").read_text() == before and json.loads(before)["length"] == 10
    cache.LatentCache(tmp_path / "latents", key).moments(9)
