"""How many bytes of encoded samples a rank holds, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence

from data.errors import DataError
from data.example import ImageSettings
from data.fetch import MOST_AT_ONCE
from data.order import SourceOrder
from data.shards.index import SourceIndex
from data.stream import LaneSource, Source
from data.window import request_bytes

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
