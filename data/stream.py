"""The samples of one lane, with a cursor.

A lane draws a source (`order.mix`), takes its own next sample of it, and passes over what is filtered or bad until
one is good. What it yields is therefore a function of the manifest, the contents, the rules, the seed and the stage
alone. The cursor is a few integers: draws made, and (epoch, raw position) in each source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.errors import BadSample, DataError, Filtered
from data.fetch import Fetcher
from data.order import SourceOrder, mix
from data.select import Rules
from data.shards.index import SourceIndex
from data.shards.tar import RawSample, parse_sample
from data.window import Taken, Window

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


def _uniforms(order: SourceOrder, taken: Taken, purpose: str, n: int) -> NDArray[np.float64]:
    return order.uniforms(purpose, taken.epoch, taken.shard, taken.sample, n)


class LaneStream:
    """The endless stream of one lane's good samples.

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
        self._misses: Counter[str] = Counter()  # since the last sample yielded
        self._windows: dict[int, Window] = {}
        self._set_aside: list[SetAside] = []

    def state(self) -> dict[str, Any]:
        """Return the cursor after the last sample yielded, as plain JSON values."""
        places = {it.source.index.name: list(place) for it, place in zip(self._sources, self._places, strict=True)}
        return {"draws": self._draws, "sources": places, "counters": dict(sorted(self._counters.items()))}

    def read_so_far(self) -> Counter[str]:
        """Count as `state` does, the search for the next sample included; from any thread."""
        return Counter(dict(self._counters)) + Counter(dict(self._misses))

    def take_set_aside(self) -> list[SetAside]:
        """Return what was set aside since the last call."""
        taken, self._set_aside = self._set_aside, []
        return taken

    def next(self, use: Callable[[Visit], T]) -> tuple[str, T]:
        """Return the id of the next sample that `use` (rules, decoding) does not refuse, and what `use` made of it.

        Raises:
            DataError: too many samples of the drawn source in a row are passed over, or a shard changed since it
                was indexed.
            StoreError: the network or a disk failed for longer than the retries last.
            FetcherClosed: the fetcher was closed meanwhile.
        """
        number = mix(self._weights, self._lane, self._lanes, self._draws)
        ordered, window = self._sources[number], self._window(number)
        index, order = ordered.source.index, ordered.order
        most = self._most_misses or max(_LEAST_MISSES, -(-order.total // self._lanes))
        misses, last = Counter[str](), ""
        self._misses = misses
        while misses.total() - misses["set_aside"] < most:
            taken = window.take()
            self._places[number] = (taken.epoch, taken.position + 1)
            raw: RawSample | None = None
            where = f"{index.name}/{index.names[taken.shard]}"
            try:
                raw = parse_sample(taken.content)
                visit = Visit(
                    f"{where}/{raw.key}",
                    raw.members,
                    ordered.source.rules,
                    partial(_uniforms, order, taken),
                )
                result = use(visit)
            except Filtered as filtered:
                misses[filtered.reason] += 1
                last = f"{where}/{raw.key if raw else ''}: {filtered}"
            except BadSample as bad:
                misses.update((bad.reason, "set_aside"))
                last = f"{where}/{raw.key if raw else ''}: {bad}"
                key = raw.key if raw is not None else None
                shard = index.names[taken.shard]
                self._set_aside.append(SetAside(index.name, shard, key, taken.offset, bad.reason, bad.detail))
            else:
                self._counters += misses
                self._counters["samples"] += 1
                self._misses = Counter()
                self._draws += 1
                return visit.id, result
        raise DataError(_nothing_left(index.name, misses, last))

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


def _nothing_left(name: str, misses: Counter[str], last: str) -> str:
    del misses["set_aside"]
    counts = ", ".join(f"{reason}: {count}" for reason, count in misses.most_common())
    remedy = {
        "small_image": "set small_images: upscale, or a lower resolution or min_side",
        "missing_caption": "give every image a .txt member, or name the member that holds its caption",
        "bad_caption": "write the captions as UTF-8",
        "empty_caption": "name a member that holds captions",
        "missing_image": "give every sample an image member (jpg, jpeg, png or webp), or name its extension",
        "too_many_pixels": "write the images smaller",
        "undecodable_image": "write the shards again from whole JPEG, PNG or WebP files",
        "malformed_tar": "index the source anew",
    }.get(misses.most_common(1)[0][0], "relax the filters")
    return (
        f"source {name!r}: none of {misses.total()} samples in a row is usable ({counts}; the last: {last}): {remedy}"
    )
