"""Samples read without training on them: a fixed validation set, and what the next global batches hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from data.decode import Pixels
from data.errors import DataError
from data.fetch import Fetcher
from data.filters import Size
from data.lane import COUNTS, LaneSource, LaneStream, Source
from data.loader import Loader
from data.order import SourceOrder, check_layout, check_sources
from data.sample import ImageSettings, make_sample

# The set is fixed only as long as this is: another number is another order.
_SHUFFLE_BLOCK = 1024
_PREFETCH_BYTES = 32 << 20
# In a source of millions, the wrong name of a member or a field is reported after these.
_MOST_SKIPPED = 5000


class TooFewSamples(DataError):
    """Sources have fewer usable samples than were asked for; `found` is how many."""

    def __init__(self, message: str, found: int = 0) -> None:  # by the message alone when unpickled
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class ValidationSet:
    """Samples for validation: pixels uint8 (n, 3, H, W), captions, ids."""

    pixels: torch.Tensor
    captions: list[str]
    ids: list[str]


def read_validation_set(sources: Sequence[Source], n: int, images: ImageSettings) -> ValidationSet:
    """Read the first n (at least 1) different usable samples of an order that no seed, stage or world size changes.

    Raises:
        TooFewSamples: the sources have fewer.
        DataError: their weights or names are wrong.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    check_sources([source.weight for source in sources], [source.index.name for source in sources])
    ordered = []
    for source in sources:
        order = SourceOrder(source.index.name, source.index.counts, 1, _SHUFFLE_BLOCK, 0, "fixed")
        ordered.append(LaneSource(source, order, _PREFETCH_BYTES))
    found: dict[str, tuple[Pixels, str]] = {}
    with closing(Fetcher()) as fetcher:
        stream = LaneStream(ordered, 0, 1, fetcher, _MOST_SKIPPED)
        while len(found) < n:
            id_, sample = stream.next(partial(make_sample, images=images))
            found.setdefault(id_, sample)
            epochs = [epoch for epoch, _ in stream.state_dict()["sources"].values()]
            if len(found) < n and min(epochs) > 0:
                names = ", ".join(repr(source.index.name) for source in sources)
                raise TooFewSamples(f"{n} were asked for, but of {names} only {len(found)} can be used", len(found))
    stacked = np.stack([pixels for pixels, _ in found.values()])
    return ValidationSet(torch.from_numpy(stacked), [caption for _, caption in found.values()], list(found))


@dataclass(frozen=True)
class Preview:
    """The next global batches: `ids[b][i]` is in slot i of batch `first + b`. `skipped` on the way, by reason."""

    first: int
    ids: list[list[str]]
    skipped: dict[str, int]
    sizes: dict[Size, int]
    """How many of their samples train at each (height, width)."""
    waiting: int
    """Samples that wait in buckets after them."""


def preview_batches(
    sources: Sequence[Source],
    images: ImageSettings,
    batches: int,
    *,
    batch_size: int,
    lanes: int,
    seed: int,
    stage: str,
    shuffle_block: int,
    buffer_bytes: int,
    state: Mapping[str, Any] | None = None,
    workers: int = 4,
    progress: Callable[[int], object] = lambda n: None,
) -> Preview:
    """Read the ids of the next global batches of a stage, with the loader itself.

    One lane is read at a time: a batch does not depend on the number of ranks, and a rank of one lane needs the least
    memory. Images are decoded, because one that cannot be decoded, or is too small, is not in the batch.

    Args:
        sources, images, batch_size, lanes, seed, stage, shuffle_block, buffer_bytes: as for `Loader`.
        batches: how many.
        state: a global state to go on after; None is the stage's first batch.
        workers: lanes that are read at a time.
        progress: called with the number of samples found since its last call.

    Raises:
        DataError: as `Loader` raises it, or batches is below 1.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    if batches < 1:
        raise DataError(f"order is {batches}: it should be at least 1 batch")
    check_layout(batch_size, lanes, 1, images.group_size)
    ids = [[""] * batch_size for _ in range(batches)]
    stopped = False

    def read(lane: int) -> tuple[Counter[str], Counter[Size], int]:
        with Loader(
            sources,
            images,
            batch_size=batch_size,
            lanes=lanes,
            seed=seed,
            stage=stage,
            rank=lane,
            world_size=lanes,
            workers=0,
            shuffle_block=shuffle_block,
            buffer_bytes=buffer_bytes,
        ) as loader:
            if state is not None:
                loader.load_state_dict(state)
            before, sizes = loader.counters(), Counter[Size]()
            for row in ids:
                if stopped:
                    break
                batch = next(loader)
                for slot, id_ in zip(batch.slots.tolist(), batch.ids, strict=True):
                    row[slot % batch_size] = id_
                for pixels in batch.pixels:
                    sizes[pixels.shape[2], pixels.shape[3]] += len(pixels)
            waiting = loader.state_dict()["lanes"][str(lane)].get("waiting", ())
            return Counter(loader.counters()) - Counter(before), sizes, len(waiting)

    counters: Counter[str] = Counter()
    sizes: Counter[Size] = Counter()
    waiting = 0
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(read, lane) for lane in range(lanes)]):
            of_lane, sizes_of_lane, waiting_of_lane = future.result()
            counters += of_lane
            sizes += sizes_of_lane
            waiting += waiting_of_lane
            progress(batches * batch_size // lanes)
    finally:
        stopped = True
        pool.shutdown(wait=False, cancel_futures=True)
    skipped = {name: n for name, n in sorted(counters.items()) if name not in COUNTS}
    first = int(state["batch"]) if state is not None else 0
    return Preview(first, ids, skipped, dict(sorted(sizes.items())), waiting)
