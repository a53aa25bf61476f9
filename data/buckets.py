"""Aspect-ratio buckets: sizes of about equal area, and which of them an image trains at.

- SDXL's table, which PixArt and Sana took over, is a rule: 40 sizes at side 1024, and half of each at 512.
- PixelDiT has its own for 1024, of 7 sizes, and takes SDXL's for 512.
- An image goes to the bucket whose ratio of height to width, rounded to 2 decimals, is nearest its own: their
  difference, not their quotient. Of two as near, it goes to the wider.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from data.errors import DataError

Size = tuple[int, int]
"""Height and width, in pixels."""

_SDXL_PARTS = 16
"""Of a square's side in the unit of SDXL's table."""
_SDXL_LEFT_OUT = (21, 11)
"""1344 x 704 at 1024: the one size by the rule that the tables do not have."""
_PIXELDIT = ((752, 1344), (896, 1344), (896, 1200), (1024, 1024), (1200, 896), (1344, 896), (1344, 752))
_PIXELDIT_PARTS = 64
"""1024 in the unit of these."""


def sdxl_sizes(side: int) -> tuple[Size, ...]:
    """List SDXL's 40 sizes for squares of `side` pixels, a multiple of 16.

    They are the multiples of side / 16 from side / 2 to 2 side whose area is 0.9 to 1 of the square's, but one.

    Raises:
        DataError: the sizes would not be whole.
    """
    _check_side("sdxl", side, _SDXL_PARTS)
    unit, area = side // _SDXL_PARTS, _SDXL_PARTS**2
    sides = range(_SDXL_PARTS // 2, 2 * _SDXL_PARTS + 1)
    found = ((h, w) for h in sides for w in sides if 9 * area <= 10 * h * w <= 10 * area and (h, w) != _SDXL_LEFT_OUT)
    return tuple((h * unit, w * unit) for h, w in found)


def pixeldit_sizes(side: int) -> tuple[Size, ...]:
    """List the 7 sizes that PixelDiT trains at at 1024, scaled to squares of `side` pixels, a multiple of 64.

    Raises:
        DataError: the sizes would not be whole.
    """
    _check_side("pixeldit", side, _PIXELDIT_PARTS)
    return tuple((h * side // 1024, w * side // 1024) for h, w in _PIXELDIT)


def _check_side(table: str, side: int, parts: int) -> None:
    if side < 1 or side % parts:
        raise DataError(f"resolution {side} must be a multiple of {parts} for the buckets of {table}")


@dataclass(frozen=True)
class Buckets:
    """Sizes that images train at, and how many samples of one size stay together.

    Raises:
        DataError: there are none, a number is below 1, or two ratios are alike to 2 decimals.
    """

    sizes: tuple[Size, ...]
    group_size: int

    def __post_init__(self) -> None:
        if not self.sizes or min(map(min, self.sizes)) < 1:
            raise DataError(f"buckets {list(map(list, self.sizes))}: name at least one [height, width], in pixels")
        if self.group_size < 1:
            raise DataError(f"group_size {self.group_size} must be at least 1")
        seen: dict[float, Size] = {}
        for size in self.sizes:
            if (other := seen.get(_ratio(size))) is not None:
                raise DataError(
                    f"buckets {list(other)} and {list(size)} have the same ratio of height to width, {_ratio(size)}: "
                    "keep one of them"
                )
            seen[_ratio(size)] = size

    @cached_property
    def _by_ratio(self) -> dict[float, Size]:
        return {_ratio(size): size for size in sorted(self.sizes, key=_ratio)}

    def nearest(self, height: int, width: int) -> Size:
        """Choose the size for an upright image of so many pixels."""
        ratio = height / width
        return self._by_ratio[min(self._by_ratio, key=lambda of_bucket: abs(of_bucket - ratio))]


def _ratio(size: Size) -> float:
    return round(size[0] / size[1], 2)
