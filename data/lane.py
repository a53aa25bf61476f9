"""The samples of one lane, with a resumable position.

A lane is one of the S orders that a stage's data is cut into (`order.py`; MosaicML streaming calls the like a canonical
node). It chooses a source (`order.mix`), takes its own next sample of it, and skips what is filtered or bad until a
sample is good. So its samples are a function of the manifest, the contents, the filters, the seed and the stage alone.
Its state is a few integers: draws made, and (epoch, raw position) in each source.

A sample is a `FetchedSample` (bytes of a tar), then a `RawSample` (members), then a `Candidate` (usable so far).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.errors import BadSample, DataError, Filtered
from data.fetch import Fetcher
from data.filters import Filters
from data.listing import FORMATS, IMAGE_EXTENSIONS, format_left_out
from data.order import SourceOrder, mix
from data.prefetch import FetchedSample, Prefetcher, read_again
from data.shards.index import SourceIndex
from data.shards.tar import parse_sample

T = TypeVar("T")

_LEAST_SKIPPED = 1000
"""A lane's epoch of a small source is a handful of samples, which may all be bad by chance."""

COUNTS = ("samples", "bad")
"""Counters besides the reasons: samples yielded, and those of the skipped samples whose content is bad."""


@dataclass(frozen=True)
class Source:
    """A source of training samples, its weight in the mix, and its filters."""

    index: SourceIndex
    weight: float = 1.0
    filters: Filters = field(default_factory=Filters)


@dataclass(frozen=True)
class LaneSource:
    """A source as a lane reads it. `buffer_bytes`: what a lane may hold of it in memory."""

    source: Source
    order: SourceOrder
    buffer_bytes: int


@dataclass(frozen=True)
class RawSample:
    """A sample's members, not yet filtered or decoded. `id` is "source/shard/key"."""

    id: str
    members: Mapping[str, bytes]
    filters: Filters
    uniforms: Callable[[str, int], NDArray[np.float64]]
    """(purpose, n) to n numbers from (0, 1), which belong to the sample and its source's epoch."""


@dataclass(frozen=True)
class Quarantined:
    """A sample that was skipped because its content is bad; `offset` is that of its first header, in bytes."""

    source: str
    shard: str
    key: str | None
    offset: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Candidate(Generic[T]):
    """A sample that is usable as far as it has been processed."""

    source: int
    """Number of its source, in the order in which the lane was given them."""
    place: tuple[int, int]
    """The source's epoch and the lane's raw position in it."""
    shard: str
    key: str
    offset: int
    """Of its first header in the shard, in bytes."""
    id: str
    result: T
    """What processing returned."""


class _Skipped:
    """Samples of one source that were skipped since its last usable one, by counter."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.last = ""

    def add(self, id_: str, why: BadSample | Filtered) -> None:
        self.counters.update(_counters_of(why))
        self.last = f"{id_}: {why}"

    @property
    def total(self) -> int:
        return self.counters.total() - self.counters["bad"]


def _counters_of(why: BadSample | Filtered) -> tuple[str, ...]:
    return (why.reason, "bad") if isinstance(why, BadSample) else (why.reason,)


class LaneStream:
    """The endless stream of one lane's good samples.

    A caller that knows at once whether a sample is good calls `next`. One that knows later calls `find`, then `accept`
    or `reject`. `process` (filtering, decoding) raises `BadSample` or `Filtered` to have a sample skipped.

    Args:
        sources: the sources, each in the order of this seed and stage.
        lane: this lane's number, 0 <= lane < lanes.
        lanes: number of lanes.
        fetcher: runs the read requests.
        most_skipped: samples skipped in a row that are an error; None: a whole epoch of the lane.
    """

    def __init__(
        self, sources: Sequence[LaneSource], lane: int, lanes: int, fetcher: Fetcher, most_skipped: int | None = None
    ) -> None:
        self._lane, self._sources, self._lanes, self._fetcher = lane, sources, lanes, fetcher
        self._most_skipped = most_skipped
        self._weights = [ordered.source.weight for ordered in sources]
        self._draws = 0
        self._places = [(0, 0)] * len(sources)
        self._counters: Counter[str] = Counter()
        self._skipped = _Skipped()  # in the search under way
        self._rejected: defaultdict[int, _Skipped] = defaultdict(_Skipped)  # by source
        self._prefetchers: dict[int, Prefetcher] = {}
        self._bad: list[Quarantined] = []

    @property
    def names(self) -> list[str]:
        """Names of the sources, by their numbers."""
        return [ordered.source.index.name for ordered in self._sources]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sample yielded, as JSON values.

        {"draws": n, "sources": {name: [epoch, position]}, "counters": {name: samples}}; counters are `COUNTS` and the
        reasons for skipping.
        """
        places = {name: list(place) for name, place in zip(self.names, self._places, strict=True)}
        return {"draws": self._draws, "sources": places, "counters": dict(sorted(self._counters.items()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a state; to be called before the first sample is taken."""
        assert not self._prefetchers
        self._draws = int(state["draws"])
        places = (state["sources"].get(name, (0, 0)) for name in self.names)
        self._places = [(int(epoch), int(position)) for epoch, position in places]
        self._counters = Counter(state["counters"])

    def read_so_far(self) -> Counter[str]:
        """The counters, the search for the next sample included; from any thread."""
        return Counter(dict(self._counters)) + Counter(dict(self._skipped.counters))

    def take_bad(self) -> list[Quarantined]:
        """The bad samples found since the last call."""
        bad, self._bad = self._bad, []
        return bad

    def next(self, process: Callable[[RawSample], T]) -> tuple[str, T]:
        """Return the id of the next good sample and what `process` made of it.

        Raises:
            DataError, StoreError, FetcherClosed: as `find` does.
        """
        candidate = self.find(process)
        self.accept(candidate)
        return candidate.id, candidate.result

    def find(self, process: Callable[[RawSample], T], source: int | None = None) -> Candidate[T]:
        """Return the next sample that `process` does not refuse. It is not counted among the samples yet.

        Args:
            process: filtering and decoding.
            source: number of the source to take it from, in place of a rejected sample; None draws one.

        Raises:
            DataError: too many samples of the source in a row are skipped, or a shard changed since it was indexed.
            StoreError: the network or a disk failed for longer than the retries last.
            FetcherClosed: the fetcher was closed meanwhile.
        """
        number = mix(self._weights, self._lane, self._lanes, self._draws) if source is None else source
        prefetcher, self._skipped = self._prefetcher(number), _Skipped()
        while True:
            fetched = prefetcher.take()
            self._places[number] = (fetched.epoch, fetched.position + 1)
            if (candidate := self._try(number, fetched, process, self._skipped)) is not None:
                self._counters += self._skipped.counters
                self._skipped = _Skipped()
                self._draws += source is None
                return candidate
            self._check(number, self._skipped)

    def accept(self, candidate: Candidate[Any]) -> None:
        """Count a sample as yielded."""
        self._rejected.pop(candidate.source, None)
        self._counters["samples"] += 1

    def reject(self, candidate: Candidate[Any], why: BadSample | Filtered) -> None:
        """Skip a sample after all.

        Raises:
            DataError: too many of its source were rejected with none accepted between them.
        """
        rejected = self._rejected[candidate.source]
        self._skip(candidate.source, candidate.shard, candidate.key, candidate.offset, why, rejected)
        self._counters.update(_counters_of(why))
        self._check(candidate.source, rejected)

    def find_again(
        self, places: Sequence[tuple[str, int, int]], process: Callable[[RawSample], T]
    ) -> list[Candidate[T]]:
        """Read samples again that `find` returned before this stream's state was saved.

        Args:
            places: source's name, epoch and raw position of each.
            process: filtering and decoding. What it refuses now, since filters may have changed, is skipped.

        Raises:
            DataError, StoreError, FetcherClosed: as `find` does.
        """
        futures = []
        for name, epoch, position in places:
            number = self.names.index(name)
            index, order = self._sources[number].source.index, self._sources[number].order
            request = read_again(index, order, self._lane, epoch, position)
            futures.append((number, self._fetcher.submit(request, int(index.mean_bytes))))
        skipped = _Skipped()
        candidates = [self._try(number, future.result(), process, skipped) for number, future in futures]
        self._counters += skipped.counters
        return [candidate for candidate in candidates if candidate is not None]

    def _try(
        self, number: int, fetched: FetchedSample, process: Callable[[RawSample], T], skipped: _Skipped
    ) -> Candidate[T] | None:
        """Process a sample; None if it is skipped, which `skipped` then counts."""
        source, order = self._sources[number].source, self._sources[number].order
        shard = source.index.names[fetched.shard]
        key: str | None = None
        try:
            sample = parse_sample(fetched.content)
            key = sample.key
            id_ = f"{source.index.name}/{shard}/{key}"
            result = process(RawSample(id_, sample.members, source.filters, partial(_uniforms, order, fetched)))
        except (Filtered, BadSample) as why:
            self._skip(number, shard, key, fetched.offset, why, skipped)
            return None
        return Candidate(number, (fetched.epoch, fetched.position), shard, sample.key, fetched.offset, id_, result)

    def _skip(
        self, number: int, shard: str, key: str | None, offset: int, why: BadSample | Filtered, skipped: _Skipped
    ) -> None:
        name = self.names[number]
        skipped.add(f"{name}/{shard}/{key or ''}", why)
        if isinstance(why, BadSample):
            self._bad.append(Quarantined(name, shard, key, offset, why.reason, why.detail))

    def _check(self, number: int, skipped: _Skipped) -> None:
        epoch = -(-self._sources[number].order.total // self._lanes)
        if skipped.total >= (self._most_skipped or max(_LEAST_SKIPPED, epoch)):
            raise DataError(_nothing_usable(self._sources[number].source.index, skipped))

    def _prefetcher(self, number: int) -> Prefetcher:
        if number not in self._prefetchers:
            ordered, (epoch, position) = self._sources[number], self._places[number]
            self._prefetchers[number] = Prefetcher(
                ordered.source.index,
                ordered.order,
                self._lane,
                epoch,
                position,
                self._fetcher,
                ordered.buffer_bytes,
                pace=sum(self._weights) / self._weights[number],
            )
        return self._prefetchers[number]


def _uniforms(order: SourceOrder, fetched: FetchedSample, purpose: str, n: int) -> NDArray[np.float64]:
    return order.uniforms(purpose, fetched.epoch, fetched.shard, fetched.sample, n)


_REMEDIES = {
    "small_image": "set small_images: upscale, or a lower resolution or min_side",
    "missing_caption": "give every image a .txt member, or name the member that holds its caption",
    "bad_caption": "write the captions as UTF-8",
    "empty_caption": "name a member that holds captions",
    "missing_image": f"give every sample an image member ({', '.join(IMAGE_EXTENSIONS)}), or name its extension",
    "too_many_pixels": "write the images smaller",
    "undecodable_image": "write the shards again from whole files "
    f"({', '.join(image_format.name for image_format in FORMATS.values())})",
    "malformed_tar": "index the source anew",
}


def _nothing_usable(index: SourceIndex, skipped: _Skipped) -> str:
    reasons = [(reason, count) for reason, count in skipped.counters.most_common() if reason != "bad"]
    counts = ", ".join(f"{reason}: {count}" for reason, count in reasons)
    return (
        f"source {index.name!r}: none of {skipped.total} samples in a row is usable ({counts}; the last: "
        f"{skipped.last}): {_REMEDIES.get(reasons[0][0], 'relax the filters')}{format_left_out(index.left_out)}"
    )
