"""The records of one lane, with a cursor.

A lane draws a source (`order.mix`), reads its own next sample of it, and passes over what is filtered or bad until
one is good. What it yields is therefore a function of the index, the contents, the filters, the seed and the stage
alone. The cursor is a few integers: draws made, and (epoch, raw position) in each source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from data.errors import BadSample, DataError
from data.index import SourceIndex, Span
from data.order import SourceOrder, mix
from data.store import Store

T = TypeVar("T")

_MISSES_BEFORE_ERROR = 1000
"""A lane's pass over a small source is a handful of samples, which may all be bad by chance."""

_READ_APART = 64 << 10
"""Bytes between a sample's members that are cheaper to read along than to skip with another request."""


@dataclass(frozen=True)
class Source:
    """A source as a lane reads it."""

    index: SourceIndex
    order: SourceOrder


@dataclass(frozen=True)
class Record:
    """One sample as bytes. `id` is "source/shard/key"."""

    id: str
    image: bytes
    caption: str


def read_record(index: SourceIndex, shard: int, sample: int) -> Record:
    """Read one sample, by the number of its shard and its number in the shard.

    Raises:
        BadSample: with reason "missing_image" or "bad_caption".
        DataError: the shard is gone or shorter than when it was indexed.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    shard_index = index.shards[shard]
    entry = shard_index[sample]
    if entry.image is None:
        raise BadSample("missing_image", entry.key)
    if entry.caption is None:
        raise BadSample("bad_caption", "there is none")
    name = shard_index.info.name
    image, text = _read_spans(index.store, name, (entry.image, entry.caption))
    try:
        caption = text.decode("utf-8").strip()
    except UnicodeDecodeError as fault:
        raise BadSample("bad_caption", str(fault)) from fault
    if not caption:
        raise BadSample("bad_caption", "it is empty")
    return Record(f"{index.name}/{name}/{entry.key}", image, caption)


def _read_spans(store: Store, name: str, spans: Sequence[Span]) -> list[bytes]:
    """Read several spans of one object: in one read where they are neighbours."""
    start, stop = min(offset for offset, _ in spans), max(offset + size for offset, size in spans)
    if stop - start - sum(size for _, size in spans) > _READ_APART:
        return [store.read(name, offset, offset + size) for offset, size in spans]
    block = store.read(name, start, stop)
    return [block[offset - start : offset - start + size] for offset, size in spans]


class LaneStream:
    """The endless stream of one lane's good samples.

    Args:
        sources: the sources, each in the order of this seed and stage.
        weights: one positive weight a source, of any sum.
        lane: this lane's number, 0 <= lane < lanes.
        lanes: number of lanes.
        state: what `state()` returned, to go on after it: {"draws": n, "sources": {name: [epoch, position]},
            "counters": {reason: samples}}, where "counters" also has "samples", those yielded; None begins.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        lane: int,
        lanes: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.lane, self._sources, self._weights, self._lanes = lane, sources, weights, lanes
        begin: Mapping[str, Any] = state or {"draws": 0, "sources": {}, "counters": {}}
        self._draws = int(begin["draws"])
        self._places = [
            (int(epoch), int(position))
            for epoch, position in (begin["sources"].get(source.index.name, (0, 0)) for source in sources)
        ]
        self._counters: Counter[str] = Counter(begin["counters"])

    def state(self) -> dict[str, Any]:
        """Return the cursor after the last sample yielded, as plain JSON values."""
        places = {s.index.name: list(place) for s, place in zip(self._sources, self._places, strict=True)}
        return {"draws": self._draws, "sources": places, "counters": dict(sorted(self._counters.items()))}

    def next(self, use: Callable[[Record], T]) -> tuple[Record, T]:
        """Return the next record for which `use` (decoding, filters) does not raise BadSample, and its result.

        Raises:
            DataError: a whole pass over the drawn source gives nothing, or a shard changed since it was indexed.
            StoreError: the network or a disk failed for longer than the retries last.
        """
        number = mix(self._weights, self.lane, self._lanes, self._draws)
        source, order = self._sources[number], self._sources[number].order
        pass_size = max(_MISSES_BEFORE_ERROR, -(-order.total // self._lanes))
        misses: Counter[str] = Counter()
        while misses.total() < pass_size:
            epoch, position = order.settle(self.lane, *self._places[number])
            self._places[number] = (epoch, position + 1)
            try:
                record = read_record(source.index, *order.lane_position(self.lane, epoch, position))
                result = use(record)
            except BadSample as bad:
                misses[bad.reason] += 1
                continue
            self._counters += misses
            self._counters["samples"] += 1
            self._draws += 1
            return record, result
        raise DataError(_nothing_left(source.index.name, misses))


def _nothing_left(name: str, misses: Counter[str]) -> str:
    counts = ", ".join(f"{reason}: {count}" for reason, count in misses.most_common())
    remedy = {
        "small_image": "set small_images: upscale, or a lower resolution",
        "bad_caption": "give every image a non-empty UTF-8 .txt member",
        "missing_image": "give every sample an image member (jpg, jpeg, png or webp)",
        "too_many_pixels": "write the images smaller",
        "undecodable_image": "write the shards again from whole JPEG, PNG or WebP files",
    }.get(misses.most_common(1)[0][0], "relax the filters")
    return f"source {name!r}: none of {misses.total()} samples in a row is usable ({counts}): {remedy}"
