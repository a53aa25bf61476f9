"""Global batches for a rank: this rank's slots of batch g as pixels and captions, and the state after it.

- Slot i of a batch of B belongs to lane i mod S, lane s to rank s mod W: a batch's content depends neither on the world
  size nor on the threads. A lane is worked on by one thread at a time, in the order of its batches.
- The state that comes with a batch is the state after it: what is saved always means "consumed", however far the
  threads are ahead.
- Threads, not processes: reading, simplejpeg and torch's resizing release the GIL, and pixels are written straight
  into the batch. Bytes are prefetched by threads of their own (`fetch.py`, `prefetch.py`): a slow store holds no cores.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from data.errors import DataError
from data.fetch import MOST_AT_ONCE, Fetcher
from data.filters import Size
from data.lane import LaneSource, LaneStream, Quarantined, Source
from data.order import SourceOrder, check_layout, check_sources
from data.prefetch import request_bytes
from data.sample import BucketLane, ImageSettings, Lane, SingleSizeLane
from data.shards.index import SourceIndex

PREFETCH = 2
"""Batches that the threads may be ahead of the consumer."""

_WAIT_S = 3600.0
_GIB = 2**30


@dataclass
class Batch:
    """This rank's share of one global batch. b = batch_size / world_size."""

    pixels: list[torch.Tensor]
    """uint8 (n, 3, H, W), RGB: one tensor of all b; with buckets one of each group, the share in their order."""
    captions: list[str]
    ids: list[str]
    """"source/shard/key"."""
    slots: NDArray[np.int64]
    """(b,), global slot numbers: batch number * batch_size + place in the batch. Without buckets they increase."""
    state: dict[str, Any]
    """This rank's state after the batch, JSON values: for `merge_states`, and then a checkpoint."""
    bad: list[Quarantined]
    """Samples with bad content that were skipped on the way to these."""
    wait_s: float
    """Seconds the consumer waited for it."""

    def micro_batches(self, size: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Cut the share into micro-batches of `size`, which divides a group: places in the share, and pixels."""
        first = 0
        for group in self.pixels:
            for pixels in group.split(size):
                yield slice(first, first + len(pixels)), pixels
                first += len(pixels)


class _PartialBatch:
    """A batch of `size` samples while the lanes of a rank fill it."""

    def __init__(self, size: int) -> None:
        self.captions, self.ids = [""] * size, [""] * size
        self.lane_states: dict[int, dict[str, Any]] = {}  # of the lanes that are done
        self.bad: list[Quarantined] = []
        self.error: Exception | None = None
        self.groups: dict[int, torch.Tensor] = {}  # pixels by the place of their first sample
        self.lock = threading.Lock()


class Loader:
    """An endless iterator of `Batch`. Use as a context manager, or call `close`.

    Iterating raises DataError or StoreError where the source does, in the batch that needed it.

    Args:
        sources: the sources, with different names.
        images: what becomes of their images.
        batch_size: samples in a global batch, over all ranks; a multiple of lanes x images.group_size.
        lanes: independent orders the data is cut into; a multiple of world_size.
        seed: the run's seed.
        stage: the stage's name; every stage has another order.
        rank: this process's number, 0 <= rank < world_size.
        world_size: number of processes that share a global batch.
        workers: decoding threads; 0 decodes in the consumer's.
        shuffle_block: samples that are permuted together inside a lane.
        buffer_bytes: most encoded bytes that this rank holds prefetched.
        pin_memory: make the pixels' memory page-locked, for fast copies to a GPU.

    Raises:
        DataError: sizes that do not divide, wrong weights or names, or blocks that do not fit into buffer_bytes.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        images: ImageSettings,
        *,
        batch_size: int,
        lanes: int,
        seed: int,
        stage: str,
        rank: int,
        world_size: int,
        workers: int,
        shuffle_block: int,
        buffer_bytes: int,
        pin_memory: bool = False,
    ) -> None:
        check_layout(batch_size, lanes, world_size, images.group_size)
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} must be from 0 to {world_size - 1}")
        if workers < 0:
            raise DataError(f"data.workers {workers} must be at least 0")
        check_sources([source.weight for source in sources], [source.index.name for source in sources])
        self._order = {
            "seed": seed,
            "stage": stage,
            "lanes": lanes,
            "shuffle_block": shuffle_block,
            "sources": {source.index.name: source.index.fingerprint for source in sources},
        }
        if images.buckets is not None:
            sizes = [list(size) for size in images.buckets.sizes]
            self._order |= {"buckets": sizes, "group_size": images.group_size}
        self._per_lane = batch_size // lanes
        ordered = [_lane_source(source, lanes, shuffle_block, seed, stage, self._per_lane) for source in sources]
        _check_memory(ordered, images, lanes // world_size, shuffle_block, buffer_bytes)
        self._images, self._pin_memory, self._workers = images, pin_memory, workers
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._places = _places(range(rank, lanes, world_size), lanes, self._per_lane, images.group_size)
        self._fetcher = Fetcher()
        self._lanes: dict[int, Lane] = {}
        for lane in range(rank, lanes, world_size):
            stream = LaneStream(ordered, lane, lanes, self._fetcher)
            self._lanes[lane] = (
                SingleSizeLane(stream, images) if images.buckets is None else BucketLane(stream, images, images.buckets)
            )
        # Below: shared with the threads, touched only under the lock.
        self._changed = threading.Condition()
        self._partial: dict[int, _PartialBatch] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._waiting_since: float | None = None
        self._start_at(0)

    def _start_at(self, batch: int) -> None:
        self._consumed = batch
        self._lane_states = {number: lane.state_dict() for number, lane in self._lanes.items()}
        self._ready = [(batch, lane) for lane in self._lanes]  # a heap: the earliest batch first

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a global state from `merge_states`, of any world size; before the first batch is taken.

        Raises:
            DataError: it is a state of another order, other buckets or other sources.
        """
        assert not self._threads and not self._partial
        _check_state(state, self._order)
        for number, lane in self._lanes.items():
            lane.load_state_dict(state["lanes"][str(number)])
        self._start_at(int(state["batch"]))

    def state_dict(self) -> dict[str, Any]:
        """This rank's state after the last batch handed out, as JSON values."""
        lanes = {str(lane): state for lane, state in sorted(self._lane_states.items())}
        return {"batch": self._consumed, "order": self._order, "lanes": lanes}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while (batch := self.take(_WAIT_S)) is None:
            pass
        return batch

    def take(self, within_s: float) -> Batch | None:
        """Return the next batch, or None if it is not complete within `within_s` seconds.

        Raises:
            DataError, StoreError: where a source does.
        """
        began = time.perf_counter()
        number = self._consumed
        if self._closed:
            raise RuntimeError("this Loader is closed")
        if self._waiting_since is None:
            self._waiting_since = began
        if self._workers:
            self._start_threads()
            with self._changed:
                self._changed.wait_for(lambda: self._finished(number), within_s)
        else:
            while not self._finished(number) and time.perf_counter() < began + within_s:
                self._advance(*heapq.heappop(self._ready))
        if not self._finished(number):
            return None
        partial = self._partial[number]
        if partial.error is not None:
            raise partial.error
        with self._changed:
            del self._partial[number]
            self._consumed += 1
            self._lane_states = partial.lane_states
            self._changed.notify_all()
        slots = number * self._batch_size + self._places
        pixels = [partial.groups[first] for first in sorted(partial.groups)]
        waited, self._waiting_since = time.perf_counter() - self._waiting_since, None
        return Batch(pixels, partial.captions, partial.ids, slots, self.state_dict(), _sorted(partial.bad), waited)

    def retries(self) -> dict[str, int]:
        """Count the faults that this process's requests met and got over, by kind."""
        return self._fetcher.faults()

    def counters(self) -> dict[str, int]:
        """Count, in this rank's lanes since the stage began, `lane.COUNTS` and skipped samples by reason."""
        total: Counter[str] = Counter()
        for state in self._lane_states.values():
            total.update(state["counters"])
        return dict(sorted(total.items()))

    def read_so_far(self) -> dict[str, int]:
        """The `counters`, with what was read ahead of the consumer."""
        total: Counter[str] = Counter()
        for lane in self._lanes.values():
            total.update(lane.read_so_far())
        return dict(total)

    def take_bad(self) -> list[Quarantined]:
        """Return the bad samples found ahead of the consumer, for one that takes no further batch."""
        with self._changed:
            bad = [sample for partial in self._partial.values() for sample in partial.bad]
            self._partial.clear()
        return _sorted(bad + [sample for lane in self._lanes.values() for sample in lane.take_bad()])

    def close(self) -> None:
        """Stop the threads and wait for them; each finishes at most the sample or group in hand."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._fetcher.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_threads(self) -> None:
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._work, name=f"data-{n}", daemon=True) for n in range(self._workers)
            ]
            for thread in self._threads:
                thread.start()

    def _finished(self, number: int) -> bool:
        partial = self._partial.get(number)
        return partial is not None and (partial.error is not None or len(partial.lane_states) == len(self._lanes))

    def _may_work(self) -> bool:
        return bool(self._ready) and self._ready[0][0] < self._consumed + PREFETCH

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_work())
                if self._closed:
                    return
                task = heapq.heappop(self._ready)
            self._advance(*task)

    def _advance(self, number: int, lane: int) -> None:
        """Fill one lane's slots of one batch. A lane is in the heap once, so never with two threads."""
        with self._changed:
            partial = self._partial.setdefault(number, _PartialBatch(self._batch_size // self._world_size))
        try:
            self._fill(partial, lane)
        except Exception as error:
            with self._changed:
                partial.error = error
                self._changed.notify_all()
            return
        with self._changed:
            partial.lane_states[lane] = self._lanes[lane].state_dict()
            partial.bad += self._lanes[lane].take_bad()
            heapq.heappush(self._ready, (number + 1, lane))
            self._changed.notify_all()

    def _fill(self, partial: _PartialBatch, lane: int) -> None:
        size = self._images.group_size
        for number in range(self._per_lane // size):
            if self._closed:
                raise RuntimeError("this Loader was closed")
            # The order of `_places`: one group of each lane, then the next of each.
            first = ((lane - self._rank) // self._world_size + number * len(self._lanes)) * size
            places = slice(first, first + size)

            def allocate(size: Size, places: slice = places) -> torch.Tensor:
                return self._allocate(partial, places, size)

            partial.captions[places], partial.ids[places] = self._lanes[lane].next(allocate)

    def _allocate(self, partial: _PartialBatch, places: slice, size: Size) -> torch.Tensor:
        """Memory for a group's pixels; without buckets it is a part of the whole share's."""
        if self._images.buckets is not None:
            partial.groups[places.start] = self._empty(places.stop - places.start, size)
            return partial.groups[places.start]
        with partial.lock:
            if not partial.groups:
                partial.groups[0] = self._empty(len(partial.ids), size)
        return partial.groups[0][places]

    def _empty(self, n: int, size: Size) -> torch.Tensor:
        return torch.empty((n, 3, *size), dtype=torch.uint8, pin_memory=self._pin_memory)


def _places(own: range, lanes: int, per_lane: int, group_size: int) -> NDArray[np.int64]:
    """(b,), places in the global batch of a rank's share: the first group of each of its lanes, then the second.

    Slot i is of lane i mod lanes, and group j of a lane has its slots j group_size to (j + 1) group_size - 1. A lane
    without buckets has groups of one sample: the places increase.
    """
    of_lane = np.arange(per_lane, dtype=np.int64).reshape(-1, 1, group_size)
    return (of_lane * lanes + np.asarray(own, np.int64)[None, :, None]).reshape(-1)


def _sorted(bad: list[Quarantined]) -> list[Quarantined]:
    """In an order that does not depend on the threads that found them."""
    return sorted(bad, key=lambda sample: (sample.source, sample.shard, sample.offset))


# Memory

_BATCHES = 2
"""Batches whose samples are prefetched, where a request holds one sample."""


def _lane_source(source: Source, lanes: int, shuffle_block: int, seed: int, stage: str, per_lane: int) -> LaneSource:
    """Give a source its order, and each lane as much memory for it as prefetching needs."""
    index = source.index
    order = SourceOrder(index.name, index.counts, lanes, shuffle_block, seed, stage)
    samples = _BATCHES * per_lane
    if _shares_requests(index):  # they bring samples that are needed later in the block, too
        samples = max(samples, min(shuffle_block, -(-order.total // lanes)))
    return LaneSource(source, order, int(samples * index.mean_bytes))


def _check_memory(
    sources: Sequence[LaneSource], images: ImageSettings, lanes: int, shuffle_block: int, buffer_bytes: int
) -> None:
    """Raise a DataError, with what would fit, if the encoded samples of a rank's lanes do not fit into its buffer."""
    indices = [ordered.source.index for ordered in sources]
    need = lanes * sum(ordered.buffer_bytes for ordered in sources)
    shared = [request_bytes(index) for index in indices if _shares_requests(index)]
    moving = 2 * MOST_AT_ONCE * max(shared, default=0)  # under way, and being cut into samples
    waiting = 0
    if images.buckets is not None:  # on average; a bucket is as often at any number below a group's
        weights = [ordered.source.weight for ordered in sources]
        mean_bytes = sum(weight * index.mean_bytes for weight, index in zip(weights, indices, strict=True))
        samples = len(images.buckets.sizes) * (images.group_size - 1) / 2
        waiting = int(lanes * samples * (mean_bytes / sum(weights)))
    if need + moving + waiting <= buffer_bytes:
        return
    block = int(shuffle_block * (buffer_bytes - moving - waiting) / need)
    lower = f"lower data.shuffle_block to {block}, " if block > 0 else ""
    in_buckets = ""
    if waiting:
        lower += "lower data.group_size, "
        in_buckets = f", and samples that wait in buckets {waiting / _GIB:.2f} GiB"
    raise DataError(
        f"{lanes} of data.lanes a rank and {len(sources)} sources hold about {need / _GIB:.2f} GiB of encoded samples "
        f"ahead in blocks of data.shuffle_block {shuffle_block}, and requests {moving / _GIB:.2f} GiB{in_buckets}, "
        f"over data.buffer_gib {buffer_bytes / _GIB:.2f}: {lower}raise data.buffer_gib, or train on more ranks"
    )


def _shares_requests(index: SourceIndex) -> bool:
    """Whether a request is for several samples."""
    return request_bytes(index) > index.mean_bytes


# States


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join every rank's state after the same batch into the global state of all lanes.

    Raises:
        ValueError: the ranks disagree on batch or order, or lanes are missing.
    """
    lanes: dict[str, Any] = {}
    for state in states:
        if (state["batch"], state["order"]) != (states[0]["batch"], states[0]["order"]):
            raise ValueError("the ranks' data states are of different batches or orders")
        lanes.update(state["lanes"])
    expected = states[0]["order"]["lanes"]
    if len(lanes) != expected or sum(len(state["lanes"]) for state in states) != expected:
        raise ValueError(f"{len(states)} data states hold {len(lanes)} of {expected} lanes: one from each rank is due")
    ordered = {str(lane): lanes[str(lane)] for lane in range(expected)}
    return {"batch": states[0]["batch"], "order": states[0]["order"], "lanes": ordered}


def _check_state(state: Mapping[str, Any], order: Mapping[str, Any]) -> None:
    anew = "to go on, or start the stage anew"
    saved = state["order"]
    if saved.get("buckets") != order.get("buckets"):
        raise DataError(f"data.buckets has other sizes than when the data state was saved: keep them {anew}")
    for field in ("seed", "stage", "data.lanes", "data.shuffle_block", "data.group_size"):
        before, now = (values.get(field.removeprefix("data.")) for values in (saved, order))
        if before != now:
            raise DataError(f"{field} is {now!r}, but the data state was saved with {before!r}: keep it {anew}")
    _check_same_sources(saved["sources"], order["sources"])
    if len(state["lanes"]) != order["lanes"]:
        raise DataError(
            f"the data state has {len(state['lanes'])} of {order['lanes']} lanes: give the merged state of all ranks"
        )


def _check_same_sources(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse sources, fingerprints by name, that are not those of a data state."""
    anew = "to go on, or start the stage anew"
    gone = [name for name in before if name not in now]
    for name in now:
        if name in before:
            continue
        if (was := next((old for old in gone if before[old] == now[name]), None)) is not None:
            raise DataError(
                f"source {name!r} of data.sources has another name than when the data state was saved, {was!r}: give "
                f"it that {anew}"
            )
        raise DataError(f"source {name!r} of data.sources is new since the data state was saved: leave it out {anew}")
    if gone:
        raise DataError(
            f"source {gone[0]!r} is not in data.sources, but was when the data state was saved: put it back {anew}"
        )
    for name in now:
        if before[name] != now[name]:
            raise DataError(f"source {name!r} has other shards than when the data state was saved: restore them {anew}")
