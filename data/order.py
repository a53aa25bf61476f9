"""Which sample is where in the run: pure functions of (shard sample counts, seed, stage, lane).

A source's epoch is one permutation of its shards, laid end to end and cut at sample level into S intervals, one
per lane, that differ by at most one sample. A lane reads its interval front to back, permuted inside blocks of
`shuffle_block` samples, and begins its next epoch on its own. The order does not depend on ranks or workers.

The cut rotates by one interval each epoch (lane s has interval (s + epoch) mod S). So each lane gets every interval in
turn: none starves where a source has fewer samples than lanes, and none keeps the same samples where a source has a
single shard, whose permutation never changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data import randomness
from data.errors import DataError


def interval(total: int, lanes: int, lane: int, epoch: int) -> tuple[int, int]:
    """Cut out a lane's positions [start, stop) of an epoch of `total` samples; may be empty."""
    turn = (lane + epoch) % lanes
    return turn * total // lanes, (turn + 1) * total // lanes


class SourceOrder:
    """The order of one source's samples, for every lane and epoch.

    Threads may share it.

    Args:
        counts: (shards,), samples in each shard; at least one sample in all.
        lanes: number of lanes, S.
        shuffle_block: samples that are permuted together inside a lane.
        seed, stage: the run's seed and the stage's name; every stage has another order.

    Raises:
        DataError: there are no samples, or lanes or shuffle_block is below 1.
    """

    def __init__(self, name: str, counts: ArrayLike, lanes: int, shuffle_block: int, seed: int, stage: str) -> None:
        self.name, self.lanes, self.shuffle_block = name, lanes, shuffle_block
        self._counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self._counts.sum())
        if self.total < 1:
            raise DataError(f"source {name!r} has no samples")
        if lanes < 1 or shuffle_block < 1:
            raise DataError(f"data.lanes ({lanes}) and data.shuffle_block ({shuffle_block}) must be at least 1")
        self._seed, self._purpose = seed, (stage, "order", name)
        self._first = np.cumsum(self._counts) - self._counts
        self._epoch = lru_cache(maxsize=8)(self._permute_shards)  # lanes drift apart by a few epochs at most

    def _permute_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        key = randomness.key(self._seed, *self._purpose, "shards", epoch)
        shards = randomness.permutation(key, len(self._counts))
        return shards, np.cumsum(self._counts[shards])

    def lane_size(self, lane: int, epoch: int) -> int:
        """Count the samples a lane reads in an epoch: floor or ceil of total / lanes."""
        start, stop = interval(self.total, self.lanes, lane, epoch)
        return stop - start

    def settle(self, lane: int, epoch: int, position: int) -> tuple[int, int]:
        """Return (epoch, position) if it holds a sample, else the lane's next place that does."""
        # Any S epochs in a row give a lane every interval, and one of them is not empty: this ends.
        while position >= self.lane_size(lane, epoch):
            epoch, position = epoch + 1, 0
        return epoch, position

    def block(self, lane: int, epoch: int, number: int) -> NDArray[np.int64]:
        """List the samples at a lane's raw positions [number, number + 1) x shuffle_block of an epoch.

        Returns:
            (n, 2): shard, and sample in the shard; n is shuffle_block, less at the lane's end.
        """
        start, stop = interval(self.total, self.lanes, lane, epoch)
        base = start + number * self.shuffle_block
        size = min(self.shuffle_block, stop - base)
        assert number >= 0 and size > 0, (lane, epoch, number)
        key = randomness.key(self._seed, *self._purpose, "block", epoch, lane, number)
        at = base + randomness.permutation(key, size)
        shards, ends = self._epoch(epoch)
        rank = np.searchsorted(ends, at, side="right")
        return np.stack([shards[rank], at - (ends - self._counts[shards])[rank]], axis=1)

    def uniforms(self, purpose: str, epoch: int, shard: int, sample: int, n: int) -> NDArray[np.float64]:
        """Draw n numbers from (0, 1) for one purpose of one sample in one epoch; they depend on nothing else."""
        number = int(self._first[shard]) + sample
        return randomness.uniform(randomness.key(self._seed, *self._purpose, purpose, epoch), number * n + np.arange(n))


# Irrational and independent of one another: lanes that are alike at one fork of `mix` spread evenly at the next.
_FORK_PHASES = tuple(math.sqrt(prime) for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29))
_MOST_SOURCES = 2 ** (len(_FORK_PHASES) - 1)


def mix(weights: Sequence[float], lane: int, lanes: int, n: int) -> int:
    """Choose the source of a lane's n-th draw (n from 0); the weights are positive, of any sum, 512 at most.

    Bresenham's line at every fork of a balanced tree over the sources: of the first n draws that reach a fork,
    floor(n * share + phase) go left. So counts in any prefix are closed-form and never drift: with two sources
    within one draw of exact, with k within log2(k) rounded up. The phase (lane + 1/2) / lanes makes one draw
    across all the lanes as even as a prefix along one.
    """
    low, high, phase = 0, len(weights), (lane + 0.5) / lanes
    for fork_phase in _FORK_PHASES:
        if high - low == 1:
            return low
        middle = (low + high) // 2
        share = sum(weights[low:middle]) / sum(weights[low:high])
        left, left_next = math.floor(n * share + phase), math.floor((n + 1) * share + phase)
        if left_next > left:
            high, n = middle, left
        else:
            low, n = middle, n - left
        phase = (lane + 0.5) * fork_phase % 1.0
    raise AssertionError(len(weights))


def check_sources(weights: Sequence[float], names: Sequence[str]) -> None:
    """Raise a DataError for weights not finite and above 0, names given twice, and more sources than `mix` takes."""
    if len(weights) > _MOST_SOURCES:
        raise DataError(f"{len(weights)} sources are more than {_MOST_SOURCES}: merge some of them")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"source {twice[0]!r} is there twice: source names must differ")
    for name, weight in zip(names, weights, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"source {name!r}: weight {weight} must be a finite number above 0")


def check_layout(batch_size: int, lanes: int, world_size: int, group_size: int = 1) -> None:
    """Raise a DataError if the ranks do not divide the lanes, or the lanes' groups do not divide the batch."""
    if min(batch_size, lanes, world_size) < 1:
        raise DataError(
            f"train.batch_size ({batch_size}), data.lanes ({lanes}) and the ranks ({world_size}) must be at least 1"
        )
    if lanes % world_size:
        divisors = [n for n in range(1, lanes + 1) if lanes % n == 0]
        below, above = max(n for n in divisors if n < world_size), [n for n in divisors if n > world_size]
        nearest = f"{below} or {above[0]}" if above else f"{below}"
        raise DataError(f"{world_size} ranks do not divide data.lanes {lanes}: the nearest allowed is {nearest}")
    if batch_size % (unit := lanes * group_size):
        below, up = batch_size // unit * unit, (batch_size // unit + 1) * unit
        nearest = f"{below} or {up}" if below else f"{up}"
        of = f"data.lanes {lanes}" if group_size == 1 else f"data.lanes {lanes} x data.group_size {group_size}"
        raise DataError(f"train.batch_size {batch_size} is no multiple of {of}: the nearest allowed is {nearest}")
