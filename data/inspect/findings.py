"""What is kept of a look at a source: counts, a few ids by reason, and thumbnails.

Findings of parts add up to those of the whole, and take no more memory however many samples there are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

ASPECT_RATIOS = {
    "1:3": 1 / 3, "1:2": 1 / 2, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "4:5": 4 / 5, "1:1": 1.0,
    "5:4": 5 / 4, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1": 2.0, "3:1": 3.0,
}  # fmt: skip
"""Width to height; an image counts under the nearest, whatever is flatter or taller still under the outermost."""

_NAMED = 5
"""Samples by which a reason is illustrated."""
_MOST_MEMBERS = 1000
_FINE_BELOW = 10_000


class Tally:
    """How often each whole number came: exact below 10,000, in three digits above, so that it stays small."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, value: int) -> None:
        """Count a number, 0 or more."""
        self._counts[value if value < _FINE_BELOW else int(float(f"{value:.2e}"))] += 1

    def update(self, other: Tally) -> None:
        """Count all that another has counted."""
        self._counts.update(other._counts)

    @property
    def total(self) -> int:
        """Numbers counted."""
        return self._counts.total()

    def quantile(self, share: float) -> int:
        """The least number that at least `share` of them, in [0, 1], do not exceed; of at least one number."""
        values = np.array(sorted(self._counts))
        reached = np.cumsum([self._counts[value] for value in values.tolist()])
        return int(values[np.searchsorted(reached, share * reached[-1] - 1e-9)])

    def below(self, limit: float) -> int:
        """How many lie below a limit."""
        return sum(count for value, count in self._counts.items() if value < limit)


@dataclass
class Reason:
    """Why samples are passed over: how many, and the first of them as (id, detail)."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def update(self, other: Reason) -> None:
        """Add another's samples after this one's."""
        self.count += other.count
        self.first = (self.first + other.first)[:_NAMED]


Reasons = dict[tuple[str, bool], Reason]
"""By reason, and whether only a sample that is decoded can show it."""


@dataclass(frozen=True)
class Tile:
    """A sample of the sheet; `jpeg` is a thumbnail, `width` and `height` are the image's own."""

    id: str
    caption: str
    width: int
    height: int
    jpeg: bytes


@dataclass
class Findings:
    """What some samples are like. `decoded` of the `read` were judged in full, and `usable` of these train."""

    read: int = 0
    decoded: int = 0
    usable: int = 0
    members: Counter[str] = field(default_factory=Counter)
    member_bytes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    aspect_ratios: Counter[str] = field(default_factory=Counter)
    """By the names of `ASPECT_RATIOS`."""
    shorter: Tally = field(default_factory=Tally)
    """Pixels of the shorter side."""
    longer: Tally = field(default_factory=Tally)
    elongation: Tally = field(default_factory=Tally)
    """Longer to shorter side, in hundredths."""
    image_bytes: Tally = field(default_factory=Tally)
    words: Tally = field(default_factory=Tally)
    """Of the captions as they are stored, before any filter or prefix."""
    bad: Reasons = field(default_factory=dict)
    filtered: Reasons = field(default_factory=dict)
    sheet: list[Tile] = field(default_factory=list)

    def update(self, other: Findings) -> None:
        """Add what was found in the samples that follow."""
        self.read += other.read
        self.decoded += other.decoded
        self.usable += other.usable
        for counts, more in (
            (self.members, other.members),
            (self.member_bytes, other.member_bytes),
            (self.formats, other.formats),
            (self.aspect_ratios, other.aspect_ratios),
        ):
            # A key with a dot in it makes an "extension" of its own of every sample.
            counts.update({name: n for name, n in more.items() if name in counts or len(counts) < _MOST_MEMBERS})
        for tally, addition in (
            (self.shorter, other.shorter),
            (self.longer, other.longer),
            (self.elongation, other.elongation),
            (self.image_bytes, other.image_bytes),
            (self.words, other.words),
        ):
            tally.update(addition)
        for reasons, found in ((self.bad, other.bad), (self.filtered, other.filtered)):
            for name, reason in found.items():
                reasons.setdefault(name, Reason()).update(reason)
        self.sheet += other.sheet
