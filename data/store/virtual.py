"""Tars that no disk holds: their bytes are made from files as they are read.

Names are cut to what a plain ustar header holds, with a hash in place of the rest: no reader needs more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.store.base import ObjectInfo, OnFault, Store, changed, shrunk

SAMPLES_A_SHARD = 1000

BLOCK = 512
END = bytes(2 * BLOCK)
LONGEST_EXTENSION = 20
"""In bytes; longer ones are names with a dot in them, not members that anything reads."""
_LONGEST_KEY = 100 - 1 - LONGEST_EXTENSION


class VirtualTar(Protocol):
    """What a tar is made of: pieces, each some made bytes and then a file's content, padded."""

    @property
    def info(self) -> ObjectInfo:
        """The tar as it is listed."""

    @property
    def versions(self) -> tuple[str, ...]:
        """The files'."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of the files."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Int64 (pieces + 1,): the first byte of each piece, then of the closing blocks."""

    def file(self, number: int) -> str:
        """Name of a piece's file."""

    def head(self, number: int) -> bytes:
        """A piece's bytes before its file's content."""


T = TypeVar("T", bound=VirtualTar)


class VirtualTars(Generic[T]):
    """A store of virtual tars.

    Args:
        inner: what holds the files.
        tars: what is made of them.
        what: the source in words, for messages.
        left_out: what `inner` holds besides, by reason.
    """

    readahead = 0  # headers are made, not read: what a request costs, it costs a file

    def __init__(self, inner: Store, tars: Iterable[T], what: str, left_out: Counter[str]) -> None:
        self.url, self._inner, self._what, self._left_out = inner.url, inner, what, left_out
        self._tars = {tar.info.name: tar for tar in tars}

    def list(self, suffix: str = "", left_out: Counter[str] | None = None) -> list[ObjectInfo]:
        """List the virtual tars, sorted by name; as `Store.list` does."""
        if left_out is not None:
            left_out.update(self._left_out)
        return [tar.info for name, tar in sorted(self._tars.items()) if name.endswith(suffix)]

    def info(self, name: str) -> ObjectInfo | None:
        """Look a virtual tar up."""
        tar = self._tars.get(name)
        return tar.info if tar else None

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        version: str | None = None,
        on_fault: OnFault = None,
    ) -> bytes | bytearray:
        """Read bytes [start, stop) of a virtual tar, as `Store.read` does.

        Raises:
            DataError: there is no such tar, it ends before `stop`, or one of its files is gone or changed.
            StoreError: the network or a disk failed for longer than the retries last.
        """
        tar = self._tars.get(name)
        if tar is None:
            raise DataError(f"{self.url}/{name} does not exist: the source is {self._what}, read as tars")
        if version is not None and version != tar.info.version:
            raise changed(self.url, name)
        stop = tar.info.size if stop is None else stop
        if stop > tar.info.size:
            raise shrunk(self.url, name, stop)
        content = bytearray(max(0, stop - start))
        for number in range(int(np.searchsorted(tar.offsets, start, "right")) - 1, len(tar.sizes)):
            at, head = int(tar.offsets[number]), tar.head(number)
            if at >= stop:
                break
            _paste(content, at - start, head)
            data = at + len(head)
            first, last = max(start, data), min(stop, data + int(tar.sizes[number]))
            if first < last:
                content[first - start : last - start] = self._inner.read(
                    tar.file(number), first - data, last - data, version=tar.versions[number], on_fault=on_fault
                )
        return content


def piece_offsets(head_bytes: int, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where pieces of files of these sizes begin, and the last ends, if so many bytes precede each file."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(head_bytes + -(-sizes // BLOCK) * BLOCK)])


def tar_info(name: str, offsets: NDArray[np.int64], files: Iterable[ObjectInfo], besides: bytes = b"") -> ObjectInfo:
    """A tar as it is listed; its version is of its files and of other bytes."""
    digest, modified = hashlib.blake2b(besides, digest_size=16), 0.0
    for file in files:
        digest.update(encoded(f"{file.name}\0{file.size}\0{file.version}\0"))
        modified = max(modified, file.modified)
    return ObjectInfo(name, int(offsets[-1]) + len(END), digest.hexdigest(), modified)


def tar_header(name: bytes, size: int) -> bytes:
    """A plain ustar header: readable by all, owned by nobody, of no time."""
    head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2
    head += b"%011o\0" % size + b"%011o\0" % 0
    tail = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - len(head) - 8, b"\0")
    checksum = sum(head) + sum(tail) + 8 * ord(" ")  # its own field counts as spaces
    return head + b"%06o\0 " % checksum + tail


def tar_key(stem: str, ending: str = "") -> bytes:
    """A sample's key: the name of its files without the extension, with no dot in it and no longer than may be.

    `ending` tells samples of one stem apart; it holds no dot.
    """
    key = encoded(stem.replace("%", "%25").replace(".", "%2E") + ending)
    if len(key) <= _LONGEST_KEY:
        return key
    digest = hashlib.blake2b(key, digest_size=8).hexdigest()
    # Half a character at the cut would be no text.
    start = key[: _LONGEST_KEY - 1 - len(digest)].decode("utf-8", "ignore")
    return encoded(f"{start}~{digest}")


def encoded(name: str) -> bytes:
    """A name as a tar holds it."""
    return name.encode("utf-8", "surrogateescape")  # a disk's names need not be text


def _paste(content: bytearray, at: int, piece: bytes) -> None:
    """Put a piece at byte `at`, which may lie before the content's beginning, as far as there is room."""
    first, last = max(at, 0), min(at + len(piece), len(content))
    if first < last:
        content[first:last] = piece[first - at : last - at]
