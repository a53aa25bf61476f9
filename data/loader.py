"""Global batches for a rank: this rank's slots of batch g as pixels and captions, and the cursor after it.

- Slot i of a batch of B belongs to lane i mod S, lane s to rank s mod W: a batch's content knows neither the world
  size nor the threads. A lane is worked on by one thread at a time, in the order of its batches.
- Threads, not processes: reading, simplejpeg and torch's resizing release the GIL, and pixels are written straight
  into the batch.
- The state handed out with a batch is the state after it, so what is saved always means "consumed", however far
  the threads have read ahead.
- Bytes are read ahead by threads of their own (`fetch.py`, `window.py`), so that a slow store does not hold cores.
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
from data.example import ImageSettings, example
from data.fetch import MOST_AT_ONCE, Fetcher
from data.order import SourceOrder, check_layout, check_sources
from data.shards.index import SourceIndex
from data.stream import LaneSource, LaneStream, SetAside, Source
from data.window import request_bytes

PREFETCH = 2
"""Batches that the threads may be ahead of the consumer."""

_PATIENCE_S = 3600.0

_AHEAD_BATCHES = 2
"""Batches whose samples are read ahead of the threads, where a request holds one sample."""


@dataclass
class Batch:
    """This rank's share of one global batch, in increasing slot order. b = batch_size / world_size."""

    pixels: torch.Tensor
    """uint8 (b, 3, H, W), RGB."""
    captions: list[str]
    ids: list[str]
    """"source/shard/key"."""
    slots: NDArray[np.int64]
    """(b,), global slot numbers: batch number * batch_size + place in the batch."""
    state: dict[str, Any]
    """This rank's state after the batch, JSON values: for `merge_states`, and then a checkpoint."""
    set_aside: list[SetAside]
    """Samples with bad content that were passed over on the way to these."""
    wait_s: float
    """Seconds the consumer waited for it."""


class _Share:
    """One batch being filled by the lanes of a rank."""

    def __init__(self, size: int) -> None:
        self.captions, self.ids = [""] * size, [""] * size
        self.lane_states: dict[int, dict[str, Any]] = {}
        self.set_aside: list[SetAside] = []
        self.error: Exception | None = None
        self._pixels: torch.Tensor | None = None
        self._lock = threading.Lock()

    def pixels(self, height: int, width: int, pin_memory: bool) -> torch.Tensor:
        """The batch's memory, made by the first lane that comes."""
        with self._lock:
            if self._pixels is None:
                shape = (len(self.ids), 3, height, width)
                self._pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
            return self._pixels


class Loader:
    """An endless iterator of `Batch`. Use as a context manager, or call `close`.

    Iterating raises DataError or StoreError where the source does, in the batch that needed it.

    Args:
        sources: the sources, with different names.
        images: what becomes of their images.
        batch_size: samples in a global batch, over all ranks; a multiple of lanes.
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
            state of another order or other sources.
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
        check_layout(batch_size, lanes, world_size)
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} must be from 0 to {world_size - 1}")
        if workers < 0:
            raise DataError(f"workers {workers} must be at least 0")
        check_sources([source.weight for source in sources], [source.index.name for source in sources])
        self._order = {
            "seed": seed,
            "stage": stage,
            "lanes": lanes,
            "shuffle_block": shuffle_block,
            "sources": {source.index.name: source.index.fingerprint for source in sources},
        }
        if state is not None:
            _check_state(state, self._order)
        per_lane = batch_size // lanes
        ordered = [_ordered(source, lanes, shuffle_block, seed, stage, per_lane) for source in sources]
        _check_memory(ordered, lanes // world_size, shuffle_block, buffer_bytes)
        self._images, self._pin_memory = images, pin_memory
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._per_lane, self._workers = per_lane, workers
        self._fetcher = Fetcher()
        saved: Mapping[str, Any] = state["lanes"] if state is not None else {}
        self._streams = {
            lane: LaneStream(ordered, lane, lanes, self._fetcher, state=saved.get(str(lane)))
            for lane in range(rank, lanes, world_size)
        }
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
        slots = number * self._batch_size + np.arange(self._rank, self._batch_size, self._world_size, dtype=np.int64)
        pixels = share.pixels(*self._images.size, self._pin_memory)
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
        """Stop the threads and wait for them; each finishes at most the sample it is at."""
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
        stream, pixels = self._streams[lane], share.pixels(*self._images.size, self._pin_memory).numpy()
        for k in range(self._per_lane):
            if self._closed:
                raise RuntimeError("this Loader was closed")
            # Slot lane + k S of the batch, in steps of W from this rank's first.
            place = (lane - self._rank) // self._world_size + k * len(self._streams)
            share.ids[place], (pixels[place], share.captions[place]) = stream.next(
                lambda visit: example(visit, self._images)
            )


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


def _check_state(state: Mapping[str, Any], order: Mapping[str, Any]) -> None:
    saved = state["order"]
    for field in ("seed", "stage", "lanes", "shuffle_block"):
        if saved[field] != order[field]:
            raise DataError(
                f"{field} is {order[field]!r}, but the data state was saved with {saved[field]!r}: "
                "keep it to go on, or start the stage anew"
            )
    for name in {**saved["sources"], **order["sources"]}:
        if saved["sources"].get(name) != order["sources"].get(name):
            raise DataError(
                f"source {name!r} has other shards than when the data state was saved: "
                "restore them to go on, or start the stage anew"
            )
    if len(state["lanes"]) != order["lanes"]:
        raise DataError(
            f"the data state has {len(state['lanes'])} of {order['lanes']} lanes: give the merged state of all ranks"
        )


def _ordered(source: Source, lanes: int, shuffle_block: int, seed: int, stage: str, per_lane: int) -> LaneSource:
    """Give a source its order, and each lane as much memory for it as reading ahead needs."""
    index = source.index
    order = SourceOrder(index.name, index.counts, lanes, shuffle_block, seed, stage)
    samples = _AHEAD_BATCHES * per_lane
    if _shares_requests(index):  # they bring samples that are needed later in the block, too
        samples = max(samples, min(shuffle_block, -(-order.total // lanes)))
    return LaneSource(source, order, int(samples * index.mean_bytes))


def _shares_requests(index: SourceIndex) -> bool:
    """Whether a request is for several samples."""
    return request_bytes(index) > index.mean_bytes


def _check_memory(ordered: Sequence[LaneSource], lanes: int, shuffle_block: int, buffer_bytes: int) -> None:
    need = lanes * sum(it.share_bytes for it in ordered)
    shared = [request_bytes(it.source.index) for it in ordered if _shares_requests(it.source.index)]
    moving = 2 * MOST_AT_ONCE * max(shared, default=0)  # under way, and being cut into samples
    if need + moving > buffer_bytes:
        gib = 2**30
        block = int(shuffle_block * (buffer_bytes - moving) / need)
        lower = f"lower shuffle_block to {block}, " if block > 0 else ""
        raise DataError(
            f"{lanes} lanes a rank and {len(ordered)} sources hold about {need / gib:.2f} GiB of encoded samples ahead "
            f"in blocks of {shuffle_block}, and requests {moving / gib:.2f} GiB, over the buffer of "
            f"{buffer_bytes / gib:.2f} GiB: {lower}raise the buffer, or train on more ranks"
        )
