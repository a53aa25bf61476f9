"""A lane's next samples of one source, prefetched.

- A block of the order (`order.block`) is a few ranges of a few shards, permuted. Neighbours are read in one request
  where that is cheaper than two (`Store.readahead`): on S3 some tens of samples, on a disk one.
- Requests go out in the order in which their first sample is needed, as long as the prefetcher holds no more than its
  buffer. The sample that is needed now is always requested, so a small buffer never stops the lane.
- Small requests are given to a thread together, as many as make the hand-over worth while.
- Where requests hold many samples, nearly all of a block arrives with its first few: the buffer is then a block, and
  used samples make room for the next block.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.fetch import Fetcher, Request
from data.order import SourceOrder
from data.shards.index import SourceIndex
from data.store import OnFault

_HAND_OVER_BYTES = 1 << 20
"""About what a disk reads while one thread makes way for another and comes back."""


@dataclass(frozen=True)
class FetchedSample:
    """One sample's bytes as the tar has them, and where they were."""

    epoch: int
    position: int
    """Raw position of the lane in the epoch."""
    shard: int
    sample: int
    """Number in the shard."""
    offset: int
    """Of its first header in the shard, in bytes."""
    content: bytes | bytearray


@dataclass(frozen=True)
class Range:
    """One request: bytes [start, stop) of a shard, and the places in the block of the samples in it."""

    shard: int
    start: int
    stop: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A block: its samples (n, 2) as shard and number, their offsets and sizes in bytes, and requests by priority."""

    epoch: int
    base: int
    """Raw position of its first sample."""
    samples: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    ranges: tuple[Range, ...]


def plan_block(
    index: SourceIndex, order: SourceOrder, lane: int, epoch: int, position: int, on_fault: OnFault = None
) -> Block:
    """Cut the block at a lane's raw position, from there on, into requests.

    Raises:
        DataError: an index of offsets is gone or does not fit its shard.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    number, first = divmod(position, order.shuffle_block)
    samples = order.block(lane, epoch, number)
    shards = samples[:, 0]
    starts, stops = np.zeros(len(samples), np.int64), np.zeros(len(samples), np.int64)
    for shard in np.unique(shards[first:]):
        of_shard = np.flatnonzero(shards == shard)
        offsets = index.offsets(int(shard), on_fault)
        starts[of_shard], stops[of_shard] = offsets[samples[of_shard, 1]], offsets[samples[of_shard, 1] + 1]
    gap, most = index.store.readahead, request_bytes(index)
    groups: list[list[int]] = []
    for place in map(int, first + np.lexsort((starts[first:], shards[first:]))):
        if groups and shards[groups[-1][0]] == shards[place]:
            begin, end = starts[groups[-1][0]], stops[groups[-1][-1]]
            if starts[place] - end <= gap and stops[place] - begin <= most:
                groups[-1].append(place)
                continue
        groups.append([place])
    ranges = [
        Range(int(shards[group[0]]), int(starts[group[0]]), int(stops[group[-1]]), tuple(group))
        for group in sorted(groups, key=min)
    ]
    return Block(epoch, number * order.shuffle_block, samples, starts, stops - starts, tuple(ranges))


def request_bytes(index: SourceIndex) -> int:
    """The most bytes of a request for several samples: moving them takes twice as long as the wait for a request."""
    return 2 * index.store.readahead


def read_again(index: SourceIndex, order: SourceOrder, lane: int, epoch: int, position: int) -> Request[FetchedSample]:
    """The request for the one sample at a raw position of a lane."""

    def read(on_fault: OnFault) -> FetchedSample:
        number, place = divmod(position, order.shuffle_block)
        shard, sample = map(int, order.block(lane, epoch, number)[place])
        start, stop = map(int, index.offsets(shard, on_fault)[sample : sample + 2])
        name, version = index.names[shard], index.versions[shard]
        content = index.store.read(name, start, stop, version=version, on_fault=on_fault)
        return FetchedSample(epoch, position, shard, sample, start, content)

    return read


class Prefetcher:
    """Prefetches a lane's samples of one source. To be used by one thread at a time.

    Args:
        index: the source.
        order: its order.
        lane: the lane.
        epoch, position: where the lane stands: the first sample to take is there or after it.
        fetcher: runs the requests.
        buffer_bytes: most bytes held and under way, apart from the sample that is needed now.
        pace: samples that the lane takes from all sources for each one of this source, on average.
    """

    def __init__(
        self,
        index: SourceIndex,
        order: SourceOrder,
        lane: int,
        epoch: int,
        position: int,
        fetcher: Fetcher,
        buffer_bytes: int,
        pace: float = 1.0,
    ) -> None:
        self._index, self._order, self._lane = index, order, lane
        self._fetcher, self._buffer_bytes, self._pace = fetcher, buffer_bytes, pace
        self._next = order.settle(lane, epoch, position)  # the place of the sample to take
        self._unplanned = self._next  # where the next block to plan begins
        self._plan: Future[Block] | None = None
        self._blocks: deque[Block] = deque()  # that of the sample to take, and later ones
        self._queue: deque[tuple[Block, Range, float]] = deque()  # requests not sent yet, and their priorities
        self._planned = 0  # samples before the next block
        self._requested: dict[tuple[int, int], tuple[Future[list[Any]], int]] = {}  # by epoch and raw position
        self._held = 0  # bytes requested and not taken yet

    def take(self) -> FetchedSample:
        """Return the next sample.

        Raises:
            DataError: a shard is gone or changed since it was indexed.
            StoreError: the network or a disk failed for longer than the retries last.
            FetcherClosed: the fetcher was closed meanwhile.
        """
        epoch, position = self._next
        self._prefetch()
        while (epoch, position) not in self._requested:
            if not self._queue:
                self._take_plan()
            self._send()
        future, number = self._requested.pop((epoch, position))
        contents = future.result()
        content, contents[number] = contents[number], None
        self._held -= len(content)
        block = self._blocks[0]
        place = position - block.base
        shard, sample = map(int, block.samples[place])
        if place == len(block.samples) - 1:
            self._blocks.popleft()
        self._next = self._order.settle(self._lane, epoch, position + 1)
        return FetchedSample(epoch, position, shard, sample, int(block.offsets[place]), content)

    def _prefetch(self) -> None:
        """Send as many requests as the buffer allows, without waiting."""
        while True:
            if not self._queue:
                if not self._planning().done():
                    return
                self._take_plan()
            size = sum(request.stop - request.start for _, request, _ in self._next_task())
            if self._held + size > self._buffer_bytes:
                return
            self._send()

    def _next_task(self) -> list[tuple[Block, Range, float]]:
        """The next requests for one thread: each costs as much as `readahead` bytes, and together they cost enough."""
        most = min(_HAND_OVER_BYTES, self._buffer_bytes // 2)
        task: list[tuple[Block, Range, float]] = []
        for block, request, priority in self._queue:
            most -= request.stop - request.start + self._index.store.readahead
            if task and most < 0:
                break
            task.append((block, request, priority))
        return task

    def _planning(self) -> Future[Block]:
        """The plan of the next block: made on a thread, since it may read offsets from the store."""
        if self._plan is None:
            epoch, position = self._unplanned
            request = partial(plan_block, self._index, self._order, self._lane, epoch, position)
            self._plan = self._fetcher.submit(request, priority=self._planned * self._pace)
        return self._plan

    def _take_plan(self) -> None:
        block = self._planning().result()
        self._plan = None
        self._blocks.append(block)
        first = self._unplanned[1] - block.base
        for request in block.ranges:
            self._queue.append((block, request, (self._planned + min(request.places) - first) * self._pace))
        self._planned += len(block.samples) - first
        self._unplanned = self._order.settle(self._lane, block.epoch, block.base + len(block.samples))

    def _send(self) -> None:
        """Send the next requests."""
        task = self._next_task()
        reads = [(self._read(block, request), request.stop - request.start) for block, request, _ in task]
        futures = self._fetcher.submit_in_turn(reads, task[0][2])
        for (block, request, _), future in zip(task, futures, strict=True):
            self._queue.popleft()
            for number, place in enumerate(request.places):
                self._requested[block.epoch, block.base + place] = future, number
                self._held += int(block.sizes[place])

    def _read(self, block: Block, request: Range) -> Request[list[bytes | bytearray]]:
        spans = [
            (int(block.offsets[place]) - request.start, int(block.offsets[place] + block.sizes[place]) - request.start)
            for place in request.places
        ]
        store, name = self._index.store, self._index.names[request.shard]
        version = self._index.versions[request.shard]

        def read(on_fault: OnFault) -> list[bytes | bytearray]:
            content = store.read(name, request.start, request.stop, version=version, on_fault=on_fault)
            # Copies, so that used samples are freed one by one.
            return [content] if len(spans) == 1 else [bytes(content[start:stop]) for start, stop in spans]

        return read
