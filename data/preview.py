"""Which samples the next global batches hold, without training on them.

The loader itself says it, one lane at a time: a batch does not depend on the number of ranks, and a rank of one lane
needs the least memory. Images are decoded, because what cannot be decoded, or is too small, is not in the batch.

Samples that stay the same for every seed, stage and world size: for validation, and to see that there are any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
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
from data.sample import ImageSettings, example

# Part of what makes the samples fixed: another number is another order.
_SHUFFLE_BLOCK = 1024
_AHEAD_BYTES = 32 << 20
# Of a source of millions, a wrong name of a member or a field is told after these.
_MOST_MISSES = 5000


class TooFewSamples(DataError):
    """Sources have fewer usable samples than were asked for; `found` is how many."""

    def __init__(self, message: str, found: int = 0) -> None:  # by the message alone when unpickled
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class FixedSamples:
    """Samples for validation: pixels uint8 (n, 3, H, W), captions, ids."""

    pixels: torch.Tensor
    captions: list[str]
    ids: list[str]


def fixed_samples(sources: Sequence[Source], n: int, images: ImageSettings) -> FixedSamples:
    """Read the first n different usable samples of one fixed order.

    Args:
        sources: the sources, with different names.
        n: number of samples, 1 or more.
        images: what becomes of their images.

    Raises:
        TooFewSamples: the sources have fewer.
        DataError: their weights or names are wrong.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    check_sources([source.weight for source in sources], [source.index.name for source in sources])
    ordered = [
        LaneSource(
            source, SourceOrder(source.index.name, source.index.counts, 1, _SHUFFLE_BLOCK, 0, "fixed"), _AHEAD_BYTES
        )
        for source in sources
    ]
    found: dict[str, tuple[Pixels, str]] = {}
    with closing(Fetcher()) as fetcher:
        stream = LaneStream(ordered, 0, 1, fetcher, _MOST_MISSES)
        while len(found) < n:
            id_, result = stream.next(lambda visit: example(visit, images))
            found.setdefault(id_, result)
            epochs = [epoch for epoch, _ in stream.state()["sources"].values()]
            if len(found) < n and min(epochs) > 0:
                names = ", ".join(repr(source.index.name) for source in sources)
                raise TooFewSamples(f"{n} were asked for, but of {names} only {len(found)} can be used", len(found))
    stacked = np.stack([pixels for pixels, _ in found.values()])
    return FixedSamples(torch.from_numpy(stacked), [caption for _, caption in found.values()], list(found))


@dataclass(frozen=True)
class Coming:
    """The next global batches: `ids[b][i]` is in slot i of batch `first + b`. `passed_over` on the way, by reason."""

    first: int
    ids: list[list[str]]
    passed_over: dict[str, int]
    sizes: dict[Size, int]
    """How many of their samples train at each (height, width)."""
    waiting: int
    """Samples that wait in buckets after them."""


def coming_batches(
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
) -> Coming:
    """Read the ids of the next global batches of a stage.

    Args:
        sources, images, batch_size, lanes, seed, stage, shuffle_block, buffer_bytes, state: as for `Loader`.
        batches: how many.
        workers: lanes that are read at a time.
        progress: told the number of samples found since it was told last.

    Raises:
        DataError: as `Loader` raises it, or batches is below 1.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    if batches < 1:
        raise DataError(f"order is {batches}: it should be at least 1 batch")
    check_layout(batch_size, lanes, 1, images.group_size)
    first = int(state["batch"]) if state is not None else 0
    ids = [[""] * batch_size for _ in range(batches)]
    passed_over: Counter[str] = Counter()
    sizes: Counter[Size] = Counter()
    waiting = 0
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
            state=state,
        ) as loader:
            before, of_lane = loader.counters(), Counter[Size]()
            for row in ids:
                if stopped:
                    break
                batch = next(loader)
                for slot, id_ in zip(batch.slots.tolist(), batch.ids, strict=True):
                    row[slot % batch_size] = id_
                for pixels in batch.pixels:
                    of_lane[pixels.shape[2], pixels.shape[3]] += len(pixels)
            left = loader.state()["lanes"][str(lane)].get("waiting", ())
            return Counter(loader.counters()) - Counter(before), of_lane, len(left)

    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(read, lane) for lane in range(lanes)]):
            passed, of_lane, left = future.result()
            passed_over += passed
            sizes += of_lane
            waiting += left
            progress(batches * batch_size // lanes)
    finally:
        stopped = True
        pool.shutdown(wait=False, cancel_futures=True)
    reasons = {name: n for name, n in sorted(passed_over.items()) if name not in COUNTS}
    return Coming(first, ids, reasons, dict(sorted(sizes.items())), waiting)
