"""What is packed: rows of splits, and a reader that makes samples of them.

What packing does to an image: its bytes pass through, or it is made smaller and encoded as JPEG again.

What all sources share: splits of row numbers, keys, files that rows name, rows that are left out.

- Nothing is read but names and counts before packing begins; a process that writes shards reads their rows.
- Keys are the row's number and what is left of its name: so they are unique, and safe for any file system.
- A row that cannot be used is left out with a reason: "missing_file", "missing_caption", ...

What packing does to the rows of any source.
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
    """One sample as it is written: members by extension. Keys are the reader's to make unique and safe."""

    key: str
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used: what its user would look for (a path, a row's number), and the counter's name."""

    row: str
    reason: str


Reader = Callable[[Sequence[Any]], Iterable[Sample | Skipped]]
"""Reads neighbouring items of a split: one result each, in their order. It is pure and can be pickled."""


@dataclass(frozen=True)
class Each:
    """A reader that makes a sample of each item by itself."""

    sample: Callable[[Any], Sample]

    def __call__(self, items: Sequence[Any]) -> Iterator[Sample]:
        """Make the samples."""
        return map(self.sample, items)


@dataclass(frozen=True)
class DatasetSpec:
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


@dataclass(frozen=True)
class Images:
    """What to do with every image.

    Attributes:
        resize: most pixels of the shorter side; a smaller image stays as it is. None leaves every image its size.
        quality: of the JPEGs, 1 to 100, which every image becomes. None lets what need not be made smaller pass
            through, byte by byte.

    Raises:
        UserError: a number outside its range.
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
        """The packages that decide the bytes."""
        if self.resize is None and self.quality is None:
            return {}
        return {name: version(name) for name in ("pillow", "simplejpeg", "torch")}

    def __call__(self, content: bytes) -> tuple[str, bytes]:
        """Return the member's extension, which is that of the content whatever its file was called, and its bytes.

        Raises:
            BadSample: ("other_format") of a format that is not decoded; ("undecodable_image", "too_many_pixels") to be
                encoded again.
        """
        if (format_ := format_of(content)) is None:
            kind = kind_of(content)
            raise BadSample("other_format", kind or f"not {', '.join(it.name for it in FORMATS.values())}")
        if self.resize is None and self.quality is None:
            return format_.extensions[0], content
        # Imported here: only who encodes again needs the decoder, whose torch takes seconds.
        from data.decode import image_size

        height, width = image_size(content)
        scale = min(1.0, (self.resize or min(height, width)) / min(height, width))
        if scale == 1 and self.quality is None:
            return format_.extensions[0], content
        return "jpg", _encode(content, (round(height * scale), round(width * scale)), self.quality or JPEG_QUALITY)


def _encode(content: bytes, size: tuple[int, int], quality: int) -> bytes:
    import simplejpeg

    from data.decode import decode

    # The size has the image's own aspect ratio, so that no more than a rounded pixel is cropped.
    pixels_chw = decode(content, size, small_images="upscale")
    pixels_hwc = pixels_chw.transpose(1, 2, 0).copy()
    return bytes(simplejpeg.encode_jpeg(pixels_hwc, quality, "RGB", "444"))


T = TypeVar("T")
R = TypeVar("R")

_THREADS = 8
"""Files that a process reads at a time: on S3 each takes tens of milliseconds."""
_LONGEST_STEM = 60


@dataclass(frozen=True)
class Part(Sequence[int]):
    """The rows of one split, by their numbers, ascending; none is held in memory.

    Of `rows` rows `heldout` are held out: the rows are cut into as many strata, and a row of each is drawn.
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
    def __getitem__(self, index: slice) -> Part: ...
    def __getitem__(self, index: int | slice) -> int | Part:
        if isinstance(index, slice):
            return Part(self.rows, self.heldout, self.seed, self.is_heldout, self.span[index])
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


def parts(rows: int, heldout: float, seed: int) -> dict[str, Part]:
    """Split range(rows) into "train" and "heldout", a share of at least 0 and below 1."""
    held = round(rows * heldout)
    return {
        "train": Part(rows, held, seed, False, range(rows - held)),
        "heldout": Part(rows, held, seed, True, range(held)),
    }


def sample_key(row: int, name: str) -> str:
    """Make the key of a row from its number and what is left of its file's name: letters, digits, "-" and "_"."""
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", name)[-_LONGEST_STEM:].strip("_-")
    return f"{row:09d}-{stem}" if stem else f"{row:09d}"


def left_out(row: str, why: BadSample) -> Skipped:
    """Say why a row is left out."""
    return Skipped(f"{row}: {why.detail}" if why.detail else row, why.reason)


def fingerprint(listed: Iterable[Iterable[object]]) -> str:
    """Hash what is known of a source's objects to 16 hex digits."""
    lines = ("\t".join(map(str, row)) for row in listed)
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def ahead(function: Callable[[T], R], items: Iterable[T], most: int = 2 * _THREADS) -> Iterator[R]:
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
        BadSample: ("missing_file") there is none of that name.
        DataError: it may not be read.
    """
    if "\0" in name or any(len(part.encode("utf-8", "replace")) > 255 for part in name.split("/")):
        raise BadSample("missing_file", "no file can be named so")
    try:
        return bytes(store.read(name))
    except DataError:
        if store.info(name) is not None:
            raise
        raise BadSample("missing_file") from None


def below(root: str, base: str, path: str) -> str:
    """Find the name below `root` of a path that a row gives.

    Args:
        root: the address of a store.
        base: the folder below `root` that a relative path starts from.
        path: relative, or an address below `root`.

    Raises:
        BadSample: ("outside_root") it leads elsewhere; ("missing_file") it is empty.
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
class PackOptions:
    """How rows become samples, and which of them are held out.

    Args:
        resize: Most pixels of an image's shorter side: larger ones are made smaller and encoded as JPEG.
        quality: Encode every image as JPEG of this quality. By default what needs no resizing passes byte by byte.
        heldout: Share of the rows that goes into OUT/heldout.
        seed: Decides which rows are held out.

    Raises:
        UserError: a number outside its range.
    """

    resize: int | None = None
    quality: int | None = None
    heldout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_heldout(self.heldout)
        Images(self.resize, self.quality)

    @property
    def images(self) -> Images:
        """What is done to every image."""
        return Images(self.resize, self.quality)

    def contents(
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
        """Describe a source of so many rows; `read` is given their numbers.

        Args:
            name: the kind of source.
            rows: how many it has.
            read: makes samples of them.
            origin: its address.
            fingerprint: another one, another content.
            arguments: what decides the samples besides the recipe.
            left_out: what there is besides the rows: reason and number.
        """
        return DatasetSpec(
            name=name,
            arguments={**(arguments or {}), **asdict(self)},
            splits=dict(parts(rows, self.heldout, self.seed)),
            read=read,
            about={"origin": origin},
            left_out=dict(left_out or {}),
            versions={"contents": fingerprint, **self.images.versions},
        )
