"""Randomness as a function: every draw depends on (seed, stream name, position) and nothing else.

A position counts samples along the endless training stream: update × global batch + index in the
batch. So a resumed run needs only its step, no process repeats another's draws, and the split into
processes and micro-batches does not matter.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, stream: str, position: int) -> np.random.Generator:
    """Philox generator of one draw: key from seed and stream, counter from position."""
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    key = np.array([seed, name], dtype=np.uint64)
    counter = np.array([0, 0, position, 0], dtype=np.uint64)  # 2^128 numbers for each position
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, stream: str, position: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 array of ``shape``."""
    return generator(seed, stream, position).standard_normal(shape, dtype=np.float32)


def uniform(seed: int, stream: str, position: int) -> float:
    """One number in [0, 1)."""
    return float(generator(seed, stream, position).random())


class ShuffledOrder:
    """The sample index at each position of the stream: a new permutation of 0…length−1 per epoch.

    An endless source (``length`` None) is read in order.
    """

    def __init__(self, seed: int, length: int | None) -> None:
        self.seed, self.length = seed, length
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        if self.length is None:
            return position
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._permutation = generator(self.seed, "order", epoch).permutation(self.length)
            self._epoch = epoch
        return int(self._permutation[place])
