"""What all sources share: splits of row numbers, keys, files that rows name, rows that are left out.

- Nothing is read but names and counts before packing begins; a process that writes shards reads their rows.
- Keys are the row's number and what is left of its name: so they are unique, and safe for any file system.
- A row that cannot be used is left out with a reason: "missing_file", "missing_caption", ...
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar, overload

from data.errors import BadSample, DataError
from data.packing.contents import LeftOut
from data.randomness import hash_u64, key
from data.store import Store

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


def left_out(row: str, why: BadSample) -> LeftOut:
    """Say why a row is left out."""
    return LeftOut(f"{row}: {why.detail}" if why.detail else row, why.reason)


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
