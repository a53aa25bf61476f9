"""Which samples the next global batches hold, without training on them.

The loader itself says it, one lane at a time: a batch does not depend on the number of ranks, and a rank of one lane
needs the least memory. Images are decoded, because what cannot be decoded, or is too small, is not in the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from data.buckets import Size
from data.errors import DataError
from data.example import ImageSettings
from data.loader import Loader
from data.order import check_layout
from data.stream import COUNTS, Source


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
