"""What is packed: rows of splits, and a reader that makes samples of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data.errors import UserError

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Sample:
    """One sample as it is written: members by extension. Keys are the reader's to make unique and safe."""

    key: str
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class LeftOut:
    """A row that cannot be used: what its user would look for (a path, a row's number), and the counter's name."""

    row: str
    reason: str


Reader = Callable[[Sequence[Any]], Iterable[Sample | LeftOut]]
"""Reads neighbouring items of a split: one result each, in their order. It is pure and can be pickled."""


@dataclass(frozen=True)
class Each:
    """A reader that makes a sample of each item by itself."""

    sample: Callable[[Any], Sample]

    def __call__(self, items: Sequence[Any]) -> Iterator[Sample]:
        """Make the samples."""
        return map(self.sample, items)


@dataclass(frozen=True)
class Contents:
    """What to pack. A split's items are sliced, never walked through, and a slice is what a process is sent."""

    name: str
    arguments: dict[str, Any]
    splits: dict[str, Sequence[Any]]
    read: Reader
    about: dict[str, str] = field(default_factory=dict)
    """What dataset.json says besides, such as licence and credit."""
    left_out: dict[str, int] = field(default_factory=dict)
    """What there is besides the items: reason and number."""
    versions: dict[str, str] = field(default_factory=dict)
    """What the bytes come from: packages, fingerprints. Another version does not go on with a pack."""


def picture(key: str, image: NDArray[np.uint8], caption: str, meta: Mapping[str, Any]) -> Sample:
    """Make a sample of pixels (H, W, 3), RGB: a JPEG without chroma subsampling, .txt, and `meta` as .json."""
    jpeg = bytes(simplejpeg.encode_jpeg(image, JPEG_QUALITY, "RGB", "444"))
    return Sample(key, {"jpg": jpeg, "txt": caption.encode(), "json": json_bytes(meta)})


def json_bytes(value: Any) -> bytes:
    """Encode a JSON file."""
    # What is no Unicode, such as half of a file's name in another encoding, becomes an escape that JSON knows.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def check(good: bool, field: str, value: object, should_be: str) -> None:
    """Refuse a user's value.

    Raises:
        UserError: it is not good.
    """
    if not good:
        raise UserError(f"{field} is {value}: it should be {should_be}")


def check_heldout(heldout: float) -> None:
    """Refuse a wrong share to hold out.

    Raises:
        UserError: naming the argument and what would be right.
    """
    check(0 <= heldout < 1, "heldout", heldout, "a share of at least 0 and below 1")


def check_common(size: int, heldout: float) -> None:
    """Refuse a wrong side of drawn pictures in pixels or a wrong share to hold out.

    Raises:
        UserError: naming the argument and what would be right.
    """
    check(8 <= size <= 4096, "size", size, "a number of pixels between 8 and 4096")
    check_heldout(heldout)
