"""Global batches for a rank: this rank's slots of batch g as pixels and captions, and the cursor after it.

- Slot i of a batch of B belongs to lane i mod S, lane s to rank s mod W: a batch's content knows neither the world
  size nor the threads. A lane is worked on by one thread at a time, in the order of its batches.
- With aspect-ratio buckets a lane fills its slots group by group (`groups.py`), each of one size, and the samples that
  wait for more of theirs are part of the state.
- Threads, not processes: reading, simplejpeg and torch's resizing release the GIL, and pixels are written straight
  into the batch.
- The state handed out with a batch is the state after it, so what is saved always means "consumed", however far
  the threads have read ahead.
- Bytes are read ahead by threads of their own (`fetch.py`, `window.py`), so that a slow store does not hold cores.

How many bytes of encoded samples a rank holds, and whether they fit.
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
from data.lane import LaneSource, LaneStream, SetAside, Source
from data.order import SourceOrder, check_layout, check_sources
from data.prefetch import request_bytes
from data.sample import ImageSettings, LaneGroups, example
from data.shards.index import SourceIndex

_BATCHES = 2
"""Whose samples are read ahead of the threads, where a request holds one sample."""
_GIB = 2**30


def lane_source(source: Source, lanes: int, shuffle_block: int, seed: int, stage: str, per_lane: int) -> LaneSource:
    """Give a source its order, and each lane as much memory for it as reading ahead needs."""
    index = source.index
    order = SourceOrder(index.name, index.counts, lanes, shuffle_block, seed, stage)
    samples = _BATCHES * per_lane
    if _shares_requests(index):  # they bring samples that are needed later in the block, too
        samples = max(samples, min(shuffle_block, -(-order.total // lanes)))
    return LaneSource(source, order, int(samples * index.mean_bytes))


def check_memory(
    sources: Sequence[LaneSource], images: ImageSettings, lanes: int, shuffle_block: int, buffer_bytes: int
) -> None:
    """See that what a rank's lanes hold fits into its buffer.

    Raises:
        DataError: it does not; with what would.
    """
    need = lanes * sum(it.share_bytes for it in sources)
    shared = [request_bytes(it.source.index) for it in sources if _shares_requests(it.source.index)]
    moving = 2 * MOST_AT_ONCE * max(shared, default=0)  # under way, and being cut into samples
    waiting = int(lanes * _waiting_samples(images) * _mean_bytes(sources))
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


def _waiting_samples(images: ImageSettings) -> float:
    """Of a lane, on average: a bucket is as often at any number below a group's."""
    return len(images.buckets.sizes) * (images.group_size - 1) / 2 if images.buckets is not None else 0.0


def _mean_bytes(sources: Sequence[LaneSource]) -> float:
    weights = [it.source.weight for it in sources]
    return sum(it.source.weight * it.source.index.mean_bytes for it in sources) / sum(weights)


PREFETCH = 2
"""Batches that the threads may be ahead of the consumer."""

_PATIENCE_S = 3600.0


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
    set_aside: list[SetAside]
    """Samples with bad content that were passed over on the way to these."""
    wait_s: float
    """Seconds the consumer waited for it."""

    def micro_batches(self, size: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Cut the share into micro-batches of `size`, which divides a group: places in the share, and pixels."""
        first = 0
        for group in self.pixels:
            for pixels in group.split(size):
                yield slice(first, first + len(pixels)), pixels
                first += len(pixels)


class _Share:
    """One batch being filled by the lanes of a rank."""

    def __init__(self, size: int) -> None:
        self.captions, self.ids = [""] * size, [""] * size
        self.lane_states: dict[int, dict[str, Any]] = {}
        self.set_aside: list[SetAside] = []
        self.error: Exception | None = None
        self.groups: dict[int, torch.Tensor] = {}
        """Pixels by the place of their first sample."""
        self._lock = threading.Lock()

    def whole(self, height: int, width: int, pin_memory: bool) -> torch.Tensor:
        """The memory of a batch of one size, made by the first lane that comes."""
        with self._lock:
            if not self.groups:
                shape = (len(self.ids), 3, height, width)
                self.groups[0] = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
            return self.groups[0]


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
        buffer_bytes: most encoded bytes that this rank holds ahead.
        pin_memory: make the pixels' memory page-locked, for fast copies to a GPU.
        state: a global state from `merge_states`, of any world size; None starts at the stage's first batch.

    Raises:
        DataError: sizes that do not divide, wrong weights or names, blocks that do not fit into buffer_bytes, or a
            state of another order, other buckets or other sources.
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
        state: Mapping[str, Any] | None = None,
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
        if state is not None:
            _check_state(state, self._order)
        per_lane = batch_size // lanes
        ordered = [lane_source(source, lanes, shuffle_block, seed, stage, per_lane) for source in sources]
        check_memory(ordered, images, lanes // world_size, shuffle_block, buffer_bytes)
        self._images, self._pin_memory = images, pin_memory
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._per_lane, self._workers = per_lane, workers
        self._places = _places(range(rank, lanes, world_size), lanes, per_lane, images.group_size)
        self._fetcher = Fetcher()
        saved: Mapping[str, Any] = state["lanes"] if state is not None else {}
        self._streams: dict[int, LaneStream | LaneGroups] = {}
        for lane in range(rank, lanes, world_size):
            begin = saved.get(str(lane))
            stream = LaneStream(ordered, lane, lanes, self._fetcher, state=begin)
            self._streams[lane] = (
                stream if images.buckets is None else LaneGroups(stream, images, images.buckets, pin_memory, begin)
            )
        self._consumed = int(state["batch"]) if state is not None else 0
        self._lane_states = {lane: stream.state() for lane, stream in self._streams.items()}
        # Below: shared with the threads, touched only under the lock.
        self._changed = threading.Condition()
        self._shares: dict[int, _Share] = {}
        self._ready = [(self._consumed, lane) for lane in self._streams]  # a heap: the earliest batch first
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._waiting_since: float | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while (batch := self.take(_PATIENCE_S)) is None:
            pass
        return batch

    def take(self, within_s: float) -> Batch | None:
        """Return the next batch, or None if it is not there within so many seconds.

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
            self._start()
            with self._changed:
                self._changed.wait_for(lambda: self._finished(number), within_s)
        else:
            while not self._finished(number) and time.perf_counter() < began + within_s:
                self._work_once(*heapq.heappop(self._ready))
        if not self._finished(number):
            return None
        share = self._shares[number]
        if share.error is not None:
            raise share.error
        with self._changed:
            del self._shares[number]
            self._consumed += 1
            self._lane_states = share.lane_states
            self._changed.notify_all()
        slots = number * self._batch_size + self._places
        pixels = [share.groups[first] for first in sorted(share.groups)]
        waited, self._waiting_since = time.perf_counter() - self._waiting_since, None
        return Batch(pixels, share.captions, share.ids, slots, self.state(), _sorted(share.set_aside), waited)

    def state(self) -> dict[str, Any]:
        """Return this rank's state after the last batch handed out, JSON values."""
        lanes = {str(lane): state for lane, state in sorted(self._lane_states.items())}
        return {"batch": self._consumed, "order": self._order, "lanes": lanes}

    def retries(self) -> dict[str, int]:
        """Count the faults that this process's requests met and got over, by kind."""
        return self._fetcher.faults()

    def counters(self) -> dict[str, int]:
        """Count, in this rank's lanes since the stage began, `stream.COUNTS` and samples passed over by reason."""
        total: Counter[str] = Counter()
        for state in self._lane_states.values():
            total.update(state["counters"])
        return dict(sorted(total.items()))

    def read_so_far(self) -> dict[str, int]:
        """Count as `counters` does, what was read ahead of the consumer included."""
        total: Counter[str] = Counter()
        for stream in self._streams.values():
            total.update(stream.read_so_far())
        return dict(total)

    def take_set_aside(self) -> list[SetAside]:
        """Return what was set aside ahead of the consumer, for one who takes no further batch."""
        with self._changed:
            found = [it for share in self._shares.values() for it in share.set_aside]
            self._shares.clear()
        return _sorted(found + [it for stream in self._streams.values() for it in stream.take_set_aside()])

    def close(self) -> None:
        """Stop the threads and wait for them; each finishes at most the sample, or the group, it is at."""
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

    def _start(self) -> None:
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._work, name=f"data-{n}", daemon=True) for n in range(self._workers)
            ]
            for thread in self._threads:
                thread.start()

    def _finished(self, number: int) -> bool:
        share = self._shares.get(number)
        return share is not None and (share.error is not None or len(share.lane_states) == len(self._streams))

    def _may_work(self) -> bool:
        return bool(self._ready) and self._ready[0][0] < self._consumed + PREFETCH

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_work())
                if self._closed:
                    return
                task = heapq.heappop(self._ready)
            self._work_once(*task)

    def _work_once(self, number: int, lane: int) -> None:
        """Fill one lane's slots of one batch. A lane is in the heap once, so never with two threads."""
        with self._changed:
            share = self._shares.setdefault(number, _Share(self._batch_size // self._world_size))
        try:
            self._fill(share, lane)
        except Exception as error:
            with self._changed:
                share.error = error
                self._changed.notify_all()
            return
        with self._changed:
            share.lane_states[lane] = self._streams[lane].state()
            share.set_aside += self._streams[lane].take_set_aside()
            heapq.heappush(self._ready, (number + 1, lane))
            self._changed.notify_all()

    def _fill(self, share: _Share, lane: int) -> None:
        stream, size = self._streams[lane], self._images.group_size
        for number in range(self._per_lane // size):
            if self._closed:
                raise RuntimeError("this Loader was closed")
            # As `_places` has it: one group of each lane, then the next of each.
            first = ((lane - self._rank) // self._world_size + number * len(self._streams)) * size
            if isinstance(stream, LaneGroups):
                group, places = stream.next(), slice(first, first + size)
                share.groups[first], share.ids[places], share.captions[places] = group.pixels, group.ids, group.captions
            else:
                pixels = share.whole(*self._images.size, self._pin_memory).numpy()
                share.ids[first], (pixels[first], share.captions[first]) = stream.next(
                    lambda visit: example(visit, self._images)
                )


def _places(own: range, lanes: int, per_lane: int, group_size: int) -> NDArray[np.int64]:
    """(b,), places in the global batch of a rank's share: the first group of each of its lanes, then the second.

    Slot i is of lane i mod lanes, and group j of a lane has its slots j group_size to (j + 1) group_size - 1. A lane
    without buckets has groups of one sample: the places increase.
    """
    of_lane = np.arange(per_lane, dtype=np.int64).reshape(-1, 1, group_size)
    return (of_lane * lanes + np.asarray(own, np.int64)[None, :, None]).reshape(-1)


def _sorted(found: list[SetAside]) -> list[SetAside]:
    """In an order that the threads, which found them, do not change."""
    return sorted(found, key=lambda it: (it.source, it.shard, it.offset))


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


def _check_same_sources(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse sources, fingerprints by name, that are not those of a data state; say which is new, gone, renamed or
    changed."""
    new, gone = ([name for name in one if name not in other] for one, other in ((now, before), (before, now)))
    for name in new:
        was = next((old for old in gone if before[old] == now[name]), None)
        if was is not None:
            raise DataError(
                f"source {name!r} of data.sources has another name than when the data state was saved, {was!r}: give "
                "it that to go on, or start the stage anew"
            )
        raise DataError(
            f"source {name!r} of data.sources is new since the data state was saved: leave it out to go on, or start "
            "the stage anew"
        )
    if gone:
        raise DataError(
            f"source {gone[0]!r} is not in data.sources, but was when the data state was saved: put it back to go on, "
            "or start the stage anew"
        )
    for name in now:
        if before[name] != now[name]:
            raise DataError(
                f"source {name!r} has other shards than when the data state was saved: "
                "restore them to go on, or start the stage anew"
            )


def _check_state(state: Mapping[str, Any], order: Mapping[str, Any]) -> None:
    saved = state["order"]
    if saved.get("buckets") != order.get("buckets"):
        raise DataError(
            "data.buckets has other sizes than when the data state was saved: keep them to go on, or start the stage "
            "anew"
        )
    for field in ("seed", "stage", "data.lanes", "data.shuffle_block", "data.group_size"):
        before, now = (it.get(field.removeprefix("data.")) for it in (saved, order))
        if before != now:
            raise DataError(
                f"{field} is {now!r}, but the data state was saved with {before!r}: "
                "keep it to go on, or start the stage anew"
            )
    _check_same_sources(saved["sources"], order["sources"])
    if len(state["lanes"]) != order["lanes"]:
        raise DataError(
            f"the data state has {len(state['lanes'])} of {order['lanes']} lanes: give the merged state of all ranks"
        )
