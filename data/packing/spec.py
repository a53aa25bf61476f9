"""What is packed: the rows of each split, and a reader that makes samples of them.

- Before packing begins only names and counts are read; the processes that write shards read the rows.
- A key is the row's number and what is left of the file's name, so it is unique and safe for any file system.
- A row that cannot be used is skipped with a reason: "missing_file", "missing_caption", ...
- An image's bytes pass through, or it is resized and encoded as JPEG again.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from typing import Any, TypeVar, overload

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data.errors import BadSample, DataError, UserError
from data.listing import FORMATS, format_of, kind_of
from data.randomness import hash_u64, key
from data.store import Store

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Sample:
    """One sample as it is written: members by extension. The reader makes the key unique and safe."""

    key: str
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used: what its user would look for (a path, a row's number), and the counter's name."""

    row: str
    reason: str


Reader = Callable[[Sequence[Any]], Iterable[Sample | Skipped]]
"""Reads neighbouring items of a split, one result each, in order. It is pure and can be pickled."""


@dataclass(frozen=True)
class EachItem:
    """A reader that makes a sample of each item by itself."""

    sample: Callable[[Any], Sample]

    def __call__(self, items: Sequence[Any]) -> Iterator[Sample]:
        return map(self.sample, items)


@dataclass(frozen=True)
class DatasetSpec:
    """What to pack. The items of a split are only sliced, and a process is sent its slice.

    Attributes:
        name: the kind of source.
        arguments: what decides the samples; another value is another pack.
        about: further entries of dataset.json, such as licence and credit.
        left_out: what there is besides the items: reason and number.
        versions: packages and fingerprints that decide the bytes; another version does not resume a pack.
    """

    name: str
    arguments: dict[str, Any]
    splits: dict[str, Sequence[Any]]
    read: Reader
    about: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def make_sample(key: str, image: NDArray[np.uint8], caption: str, meta: Mapping[str, Any]) -> Sample:
    """Make a sample of pixels (H, W, 3), RGB: a JPEG without chroma subsampling, .txt, and `meta` as .json."""
    jpeg = bytes(simplejpeg.encode_jpeg(image, JPEG_QUALITY, "RGB", "444"))
    return Sample(key, {"jpg": jpeg, "txt": caption.encode(), "json": json_bytes(meta)})


def json_bytes(value: Any) -> bytes:
    # What is not Unicode, such as a file name in another encoding, becomes an escape that JSON knows.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def check(good: bool, field: str, value: object, should_be: str) -> None:
    """Raise a UserError for a user's value unless it is good."""
    if not good:
        raise UserError(f"{field} is {value}: it should be {should_be}")


def check_heldout(heldout: float) -> None:
    check(0 <= heldout < 1, "heldout", heldout, "a share of at least 0 and below 1")


def check_common(size: int, heldout: float) -> None:
    check(8 <= size <= 4096, "size", size, "a number of pixels between 8 and 4096")
    check_heldout(heldout)


@dataclass(frozen=True)
class ImageEncoder:
    """Resizes and encodes images.

    Attributes:
        resize: maximum of the shorter side in pixels, 8 to 16384; None leaves every image its size.
        quality: JPEG quality, 1 to 100, with which every image is encoded; with None, images that need no resizing pass
            through byte by byte.
    """

    resize: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.resize is not None:
            check(8 <= self.resize <= 16384, "resize", self.resize, "a number of pixels between 8 and 16384")
        if self.quality is not None:
            check(1 <= self.quality <= 100, "quality", self.quality, "between 1 and 100")

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that decide the bytes."""
        if self.resize is None and self.quality is None:
            return {}
        return {name: version(name) for name in ("pillow", "simplejpeg", "torch")}

    def __call__(self, content: bytes) -> tuple[str, bytes]:
        """Return the member's extension (that of the content, whatever the file was called) and its bytes.

        Raises:
            BadSample: "other_format" (not decoded), "undecodable_image" or "too_many_pixels" (when encoding).
        """
        if (format_ := format_of(content)) is None:
            formats = ", ".join(known.name for known in FORMATS.values())
            raise BadSample("other_format", kind_of(content) or f"not {formats}")
        if self.resize is None and self.quality is None:
            return format_.extensions[0], content
        # Imported here: only encoding needs the decoder, whose torch takes seconds.
        from data.decode import decode, image_size

        height, width = image_size(content)
        scale = min(1.0, (self.resize or min(height, width)) / min(height, width))
        if scale == 1 and self.quality is None:
            return format_.extensions[0], content
        # The size has the image's own aspect ratio, so at most a rounded pixel is cropped.
        pixels_chw = decode(content, (round(height * scale), round(width * scale)), small_images="upscale")
        pixels_hwc = pixels_chw.transpose(1, 2, 0).copy()
        return "jpg", bytes(simplejpeg.encode_jpeg(pixels_hwc, self.quality or JPEG_QUALITY, "RGB", "444"))


T = TypeVar("T")
R = TypeVar("R")

_THREADS = 8
"""Files that a process reads at a time; on S3 each takes tens of milliseconds."""
_LONGEST_STEM = 60


@dataclass(frozen=True)
class SplitRows(Sequence[int]):
    """The row numbers of one split, ascending, computed on access.

    Of `rows` rows `heldout` are held out: the rows are cut into as many strata, and one row of each is drawn.
    """

    rows: int
    heldout: int
    seed: int
    is_heldout: bool
    span: range

    def __len__(self) -> int:
        return len(self.span)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> SplitRows: ...
    def __getitem__(self, index: int | slice) -> int | SplitRows:
        if isinstance(index, slice):
            return SplitRows(self.rows, self.heldout, self.seed, self.is_heldout, self.span[index])
        return self._row(self.span[index])

    def _row(self, place: int) -> int:
        if self.heldout == 0:
            return place
        if self.is_heldout:
            return self._drawn(place)
        # Before stratum s lie `start(s)` rows, s of them held out.
        stratum = bisect_right(range(self.heldout), place, key=lambda s: self._start(s) - s) - 1
        row = place + stratum
        return row + (row >= self._drawn(stratum))

    def _start(self, stratum: int) -> int:
        return self.rows * stratum // self.heldout

    def _drawn(self, stratum: int) -> int:
        start, stop = self._start(stratum), self._start(stratum + 1)
        return start + int(hash_u64(key(self.seed, "pack", "heldout"), stratum)) % (stop - start)


def split_rows(rows: int, heldout: float, seed: int) -> dict[str, SplitRows]:
    """Split range(rows) into "train" and "heldout", a share of at least 0 and below 1."""
    count = round(rows * heldout)
    return {
        "train": SplitRows(rows, count, seed, False, range(rows - count)),
        "heldout": SplitRows(rows, count, seed, True, range(count)),
    }


def sample_key(row: int, name: str) -> str:
    """Make a row's key from its number and its file's name, reduced to letters, digits, "-" and "_"."""
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", name)[-_LONGEST_STEM:].strip("_-")
    return f"{row:09d}-{stem}" if stem else f"{row:09d}"


def skipped(row: str, why: BadSample) -> Skipped:
    return Skipped(f"{row}: {why.detail}" if why.detail else row, why.reason)


def fingerprint(listed: Iterable[Iterable[object]]) -> str:
    """Hash a listing of a source's objects to 16 hex digits."""
    lines = ("\t".join(map(str, row)) for row in listed)
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def prefetch(function: Callable[[T], R], items: Iterable[T], most: int = 2 * _THREADS) -> Iterator[R]:
    """Map in threads, in order, at most `most` results ahead of their use."""
    items = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        pending = deque(pool.submit(function, item) for item in islice(items, most))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(items, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()


def read_file(store: Store, name: str) -> bytes:
    """Read a file that a row names.

    Raises:
        BadSample: "missing_file".
        DataError: reading is not permitted.
    """
    if "\0" in name or any(len(part.encode("utf-8", "replace")) > 255 for part in name.split("/")):
        raise BadSample("missing_file", "no file can be named so")
    try:
        return bytes(store.read(name))
    except DataError:
        if store.info(name) is not None:
            raise
        raise BadSample("missing_file") from None


def name_below(root: str, base: str, path: str) -> str:
    """The name below the address `root` of a path in a row, which is relative to the folder `base` or an address.

    Raises:
        BadSample: "outside_root", or "missing_file" if the path is empty.
    """
    if not path.strip():
        raise BadSample("missing_file", "its path is empty")
    name = posixpath.join(base, path)
    if path.startswith("/") or "://" in path:
        path, inside = _absolute(path), _absolute(root).rstrip("/") + "/"
        if not path.startswith(inside):
            raise BadSample("outside_root", f"it is not below {root}")
        name = path.removeprefix(inside).lstrip("/")
    name = posixpath.normpath(name)
    if name == ".." or name.startswith(("../", "/")):
        raise BadSample("outside_root", f"it is not below {root}")
    return name


def _absolute(address: str) -> str:
    return address if "://" in address else os.path.abspath(address)


@dataclass(frozen=True)
class PackOptions(ImageEncoder):
    """How rows become samples, and which of them are held out.

    Args:
        resize: Maximum of an image's shorter side in pixels; larger images are resized and encoded as JPEG.
        quality: Encode every image as JPEG of this quality. By default what needs no resizing passes byte by byte.
        heldout: Share of the rows that goes into OUT/heldout.
        seed: Decides which rows are held out.

    Raises:
        UserError: a number outside its range.
    """

    heldout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_heldout(self.heldout)
        super().__post_init__()

    def dataset_spec(
        self,
        name: str,
        rows: int,
        read: Reader,
        *,
        origin: str,
        fingerprint: str,
        arguments: Mapping[str, Any] | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> DatasetSpec:
        """Describe a source of `rows` rows at the address `origin`, which `read` reads by number.

        `fingerprint` changes with the source's content; `arguments` are what decides the samples besides these options.
        """
        return DatasetSpec(
            name=name,
            arguments={**(arguments or {}), **asdict(self)},
            splits=dict(split_rows(rows, self.heldout, self.seed)),
            read=read,
            about={"origin": origin},
            left_out=dict(left_out or {}),
            versions={"contents": fingerprint, **self.versions},
        )
