"""The samples of one lane, with a cursor.

A lane draws a source (`order.mix`), takes its own next sample of it, and passes over what is filtered or bad until
one is good. What it yields is therefore a function of the manifest, the contents, the rules, the seed and the stage
alone. The cursor is a few integers: draws made, and (epoch, raw position) in each source. Where samples wait for others
of their size (`groups.py`), one is found, and later used or given up.
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
from data.filters import Rules
from data.listing import FORMATS, IMAGE_EXTENSIONS, told
from data.order import SourceOrder, mix
from data.prefetch import Taken, Window, read_again
from data.shards.index import SourceIndex
from data.shards.tar import parse_sample

T = TypeVar("T")

_LEAST_MISSES = 1000
"""A lane's epoch of a small source is a handful of samples, which may all be bad by chance."""

COUNTS = ("samples", "set_aside")
"""Counters besides the reasons: samples yielded, and those of the passed over whose content was bad."""


@dataclass(frozen=True)
class Source:
    """A source of training: what is in it, how much of it, and which of its samples count."""

    index: SourceIndex
    weight: float = 1.0
    rules: Rules = field(default_factory=Rules)


@dataclass(frozen=True)
class LaneSource:
    """A source as a lane reads it. `share_bytes`: what a lane may hold of it in memory."""

    source: Source
    order: SourceOrder
    share_bytes: int


@dataclass(frozen=True)
class Visit:
    """A sample at the moment a lane comes by it. `id` is "source/shard/key"."""

    id: str
    members: Mapping[str, bytes]
    rules: Rules
    uniforms: Callable[[str, int], NDArray[np.float64]]
    """(purpose, n) to n numbers from (0, 1), which belong to the sample and its source's epoch."""


@dataclass(frozen=True)
class SetAside:
    """A sample that was passed over because its content is bad; `offset` is of its first header, in bytes."""

    source: str
    shard: str
    key: str | None
    offset: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Found(Generic[T]):
    """A sample that a lane came by and can use."""

    source: int
    """Number of its source, in the order in which the lane was given them."""
    place: tuple[int, int]
    """The source's epoch and the lane's raw position in it."""
    shard: str
    key: str
    offset: int
    """Of its first header in the shard, in bytes."""
    id: str
    made: T
    """What was made of it."""


class _Misses:
    """Samples of one source that were passed over since the last one that was not."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.last = ""

    def note(self, id_: str, why: BadSample | Filtered) -> None:
        self.reasons.update(_counted(why))
        self.last = f"{id_}: {why}"

    @property
    def total(self) -> int:
        return self.reasons.total() - self.reasons["set_aside"]


def _counted(why: BadSample | Filtered) -> tuple[str, ...]:
    """The counters that a sample passed over belongs to."""
    return (why.reason, "set_aside") if isinstance(why, BadSample) else (why.reason,)


def _uniforms(order: SourceOrder, taken: Taken, purpose: str, n: int) -> NDArray[np.float64]:
    return order.uniforms(purpose, taken.epoch, taken.shard, taken.sample, n)


class LaneStream:
    """The endless stream of one lane's good samples.

    Who knows at once whether a sample is good calls `next`; who knows later calls `find`, then `use` or `give_up`.

    Args:
        sources: the sources, each in the order of this seed and stage.
        lane: this lane's number, 0 <= lane < lanes.
        lanes: number of lanes.
        fetcher: what reads for it.
        most_misses: samples in a row that are passed over before that is an error; None: a whole epoch of the lane.
        state: what `state()` returned, to go on after it: {"draws": n, "sources": {name: [epoch, position]},
            "counters": {name: samples}}, where the names are `COUNTS` and reasons; None begins.
    """

    def __init__(
        self,
        sources: Sequence[LaneSource],
        lane: int,
        lanes: int,
        fetcher: Fetcher,
        most_misses: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._lane, self._sources, self._lanes, self._fetcher = lane, sources, lanes, fetcher
        self._most_misses = most_misses
        self._weights = [ordered.source.weight for ordered in sources]
        begin: Mapping[str, Any] = state or {"draws": 0, "sources": {}, "counters": {}}
        self._draws = int(begin["draws"])
        self._places = [
            (int(epoch), int(position))
            for epoch, position in (begin["sources"].get(it.source.index.name, (0, 0)) for it in sources)
        ]
        self._counters: Counter[str] = Counter(begin["counters"])
        self._misses = _Misses()  # of the search that is under way
        self._given_up: defaultdict[int, _Misses] = defaultdict(_Misses)  # by source
        self._windows: dict[int, Window] = {}
        self._set_aside: list[SetAside] = []

    @property
    def names(self) -> list[str]:
        """Of the sources, by their numbers."""
        return [it.source.index.name for it in self._sources]

    def state(self) -> dict[str, Any]:
        """Return the cursor after the last sample yielded, as plain JSON values."""
        places = {name: list(place) for name, place in zip(self.names, self._places, strict=True)}
        return {"draws": self._draws, "sources": places, "counters": dict(sorted(self._counters.items()))}

    def read_so_far(self) -> Counter[str]:
        """Count as `state` does, the search for the next sample included; from any thread."""
        return Counter(dict(self._counters)) + Counter(dict(self._misses.reasons))

    def take_set_aside(self) -> list[SetAside]:
        """Return what was set aside since the last call."""
        taken, self._set_aside = self._set_aside, []
        return taken

    def next(self, make: Callable[[Visit], T]) -> tuple[str, T]:
        """Return the id of the next sample that `make` (rules, decoding) does not refuse, and what `make` made of it.

        Raises:
            DataError, StoreError, FetcherClosed: as `find` does.
        """
        found = self.find(make)
        self.use(found)
        return found.id, found.made

    def find(self, make: Callable[[Visit], T], source: int | None = None) -> Found[T]:
        """Return the next sample that `make` does not refuse. It is not counted among the samples yet.

        Args:
            make: rules and decoding.
            source: number of the source to take it from, in place of one that was given up; None draws one.

        Raises:
            DataError: too many samples of the source in a row are passed over, or a shard changed since it was indexed.
            StoreError: the network or a disk failed for longer than the retries last.
            FetcherClosed: the fetcher was closed meanwhile.
        """
        number = mix(self._weights, self._lane, self._lanes, self._draws) if source is None else source
        window, self._misses = self._window(number), _Misses()
        while True:
            taken = window.take()
            self._places[number] = (taken.epoch, taken.position + 1)
            if (found := self._try(number, taken, make, self._misses)) is not None:
                self._counters += self._misses.reasons
                self._misses = _Misses()
                self._draws += source is None
                return found
            self._check(number, self._misses)

    def use(self, found: Found[Any]) -> None:
        """Count a sample as yielded."""
        self._given_up.pop(found.source, None)
        self._counters["samples"] += 1

    def give_up(self, found: Found[Any], why: BadSample | Filtered) -> None:
        """Pass over a sample after all.

        Raises:
            DataError: it was too many of its source, with no one used between them.
        """
        self._note(found.source, found.shard, found.key, found.offset, why, self._given_up[found.source])
        self._counters.update(_counted(why))
        self._check(found.source, self._given_up[found.source])

    def find_again(self, places: Sequence[tuple[str, int, int]], make: Callable[[Visit], T]) -> list[Found[T]]:
        """Read samples again that `find` found before this stream's state was saved.

        Args:
            places: source's name, epoch and raw position of each.
            make: as then. What it refuses by now, for the rules may have changed, is passed over.

        Raises:
            DataError, StoreError, FetcherClosed: as `find` does.
        """
        futures = []
        for name, epoch, position in places:
            number = self.names.index(name)
            index, order = self._sources[number].source.index, self._sources[number].order
            request = read_again(index, order, self._lane, epoch, position)
            futures.append((number, self._fetcher.submit(request, int(index.mean_bytes))))
        misses = _Misses()
        found = [self._try(number, future.result(), make, misses) for number, future in futures]
        self._counters += misses.reasons
        return [it for it in found if it is not None]

    def _try(self, number: int, taken: Taken, make: Callable[[Visit], T], misses: _Misses) -> Found[T] | None:
        """What is made of a sample; None where it is passed over, which is noted in `misses`."""
        ordered = self._sources[number]
        index = ordered.source.index
        shard = index.names[taken.shard]
        key: str | None = None
        try:
            raw = parse_sample(taken.content)
            key = raw.key
            id_ = f"{index.name}/{shard}/{key}"
            made = make(Visit(id_, raw.members, ordered.source.rules, partial(_uniforms, ordered.order, taken)))
        except (Filtered, BadSample) as why:
            self._note(number, shard, key, taken.offset, why, misses)
            return None
        return Found(number, (taken.epoch, taken.position), shard, raw.key, taken.offset, id_, made)

    def _note(
        self, number: int, shard: str, key: str | None, offset: int, why: BadSample | Filtered, misses: _Misses
    ) -> None:
        name = self.names[number]
        misses.note(f"{name}/{shard}/{key or ''}", why)
        if isinstance(why, BadSample):
            self._set_aside.append(SetAside(name, shard, key, offset, why.reason, why.detail))

    def _check(self, number: int, misses: _Misses) -> None:
        most = self._most_misses or max(_LEAST_MISSES, -(-self._sources[number].order.total // self._lanes))
        if misses.total >= most:
            raise DataError(_nothing_left(self._sources[number].source.index, misses))

    def _window(self, number: int) -> Window:
        if number not in self._windows:
            it, (epoch, position) = self._sources[number], self._places[number]
            self._windows[number] = Window(
                it.source.index,
                it.order,
                self._lane,
                epoch,
                position,
                self._fetcher,
                it.share_bytes,
                self._pace(number),
            )
        return self._windows[number]

    def _pace(self, number: int) -> float:
        return sum(self._weights) / self._weights[number]


def _nothing_left(index: SourceIndex, misses: _Misses) -> str:
    reasons = Counter({reason: count for reason, count in misses.reasons.items() if reason != "set_aside"})
    counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    formats = ", ".join(it.name for it in FORMATS.values())
    remedy = {
        "small_image": "set small_images: upscale, or a lower resolution or min_side",
        "missing_caption": "give every image a .txt member, or name the member that holds its caption",
        "bad_caption": "write the captions as UTF-8",
        "empty_caption": "name a member that holds captions",
        "missing_image": f"give every sample an image member ({', '.join(IMAGE_EXTENSIONS)}), or name its extension",
        "too_many_pixels": "write the images smaller",
        "undecodable_image": f"write the shards again from whole files ({formats})",
        "malformed_tar": "index the source anew",
    }.get(reasons.most_common(1)[0][0], "relax the filters")
    return (
        f"source {index.name!r}: none of {misses.total} samples in a row is usable "
        f"({counts}; the last: {misses.last}): {remedy}{told(index.left_out)}"
    )
