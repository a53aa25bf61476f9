"""A folder of images with captions, seen as shards: tars whose bytes are made from the files as they are read.

- A sample is an image and the files beside it of the same name up to the last dot. All else is left out: files
  without an image, hidden ones, names without an extension.
- A virtual tar holds up to 1000 samples of one folder, by name. Its members carry no folder, since the shard's name
  does, and a dot in the rest of the name is written %2E, since WebDataset would take it for the extension's
  ("v1.5/a.b.jpg" is member "a%2Eb.jpg" of shard "v1.5/00000.tar"). So a key is unique in its shard.
- Names are cut to what a plain ustar header holds, with a hash in place of the rest: no reader needs more.
- The files are listed once. A read names the version each file had then, so a file that changes is an error. Every
  process holds the list, 170 bytes a file; that is a way to begin, not one for millions of images.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.store.base import ObjectInfo, OnFault, Store, changed, shrunk

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
SAMPLES_A_SHARD = 1000

BLOCK = 512
END = bytes(2 * BLOCK)
_LARGEST_FILE = 8**11 - 1
"""Bytes that eleven octal digits can tell."""
_LONGEST_EXTENSION = 20
"""In bytes; longer ones are names with a dot in them, not members that anything reads."""
_LONGEST_KEY = 100 - 1 - _LONGEST_EXTENSION


@dataclass(frozen=True, eq=False, slots=True)
class _Shard:
    """A virtual tar of files of one folder.

    Attributes:
        folder: "" or "a/b/".
        names: the files, without the folder, as they follow each other.
        versions: theirs, in the inner store.
        sizes: int64 (files,), bytes.
        offsets: int64 (files + 1,), the first byte of each file's header, then of the closing blocks.
    """

    info: ObjectInfo
    folder: str
    names: tuple[str, ...]
    versions: tuple[str, ...]
    sizes: NDArray[np.int64]
    offsets: NDArray[np.int64]


class FolderStore:
    """The virtual tars of a store's images, "sub/00000.tar" for the folder "sub".

    Args:
        inner: what holds the files, at any depth.

    Raises:
        DataError: a file that a tar cannot hold, or two that differ in the case of their extension alone.
        StoreError: the network failed for longer than the retries last.
    """

    readahead = 0  # headers are made, not read: what a request costs, it costs a file

    def __init__(self, inner: Store) -> None:
        self.url = inner.url
        self._inner = inner
        self._shards = {shard.info.name: shard for shard in _shards(inner)}

    def list(self, suffix: str = "") -> list[ObjectInfo]:
        """List the virtual tars, sorted by name."""
        return [shard.info for name, shard in sorted(self._shards.items()) if name.endswith(suffix)]

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
        shard = self._shards.get(name)
        if shard is None:
            raise DataError(f"{self.url}/{name} does not exist: the source is a folder of images, read as tars")
        if version is not None and version != shard.info.version:
            raise changed(self.url, name)
        stop = shard.info.size if stop is None else stop
        if stop > shard.info.size:
            raise shrunk(self.url, name, stop)
        content = bytearray(max(0, stop - start))
        for number in range(int(np.searchsorted(shard.offsets, start, "right")) - 1, len(shard.names)):
            at, size, file = int(shard.offsets[number]), int(shard.sizes[number]), shard.names[number]
            if at >= stop:
                break
            paste(content, at - start, tar_header(_member(file), size))
            data = at + BLOCK
            first, last = max(start, data), min(stop, data + size)
            if first < last:
                content[first - start : last - start] = self._inner.read(
                    shard.folder + file, first - data, last - data, version=shard.versions[number], on_fault=on_fault
                )
        return content

    def info(self, name: str) -> ObjectInfo | None:
        """Look a virtual tar up."""
        shard = self._shards.get(name)
        return shard.info if shard else None


def _shards(inner: Store) -> Iterator[_Shard]:
    for folder, samples in _samples(inner).items():
        keys = iter(sorted(samples))
        for number in itertools.count():
            if not (some := list(itertools.islice(keys, SAMPLES_A_SHARD))):
                break
            files = [file for key in some for file in _checked(inner.url, samples[key])]
            yield _shard(folder, f"{number:05d}.tar", files)


def _samples(inner: Store) -> dict[str, dict[str, list[ObjectInfo]]]:
    """By folder ("" or "a/b/") and name up to the last dot, the files of every sample that has an image."""
    files: dict[str, dict[str, list[ObjectInfo]]] = defaultdict(lambda: defaultdict(list))
    images: dict[str, set[str]] = defaultdict(set)
    for info in inner.list():
        folder, slash, name = info.name.rpartition("/")
        stem, _, extension = name.rpartition(".")
        hidden = any(part.startswith(".") for part in info.name.split("/"))
        if hidden or not stem or not 0 < len(_bytes(extension.lower())) <= _LONGEST_EXTENSION:
            continue
        files[folder + slash][stem].append(info)
        if extension.lower() in IMAGE_EXTENSIONS:
            images[folder + slash].add(stem)
    return {folder: {stem: files[folder][stem] for stem in stems} for folder, stems in images.items()}


def _checked(url: str, files: list[ObjectInfo]) -> list[ObjectInfo]:
    """The files of one sample, in the order of its members."""
    seen = dict[str, str]()
    for file in (files := sorted(files, key=lambda info: info.name)):
        extension = file.name.rpartition(".")[2].lower()
        if extension in seen:
            raise DataError(f"{url}: {seen[extension]!r} and {file.name!r} would be one member of a sample: rename one")
        if file.size > _LARGEST_FILE:
            raise DataError(f"{url}: {file.name!r} is {file.size} bytes, and a tar's file has at most {_LARGEST_FILE}")
        seen[extension] = file.name
    return files


def _member(file: str) -> bytes:
    """What a file is called in its tar."""
    stem, _, extension = file.rpartition(".")
    return tar_key(stem) + b"." + _bytes(extension.lower())


def tar_key(stem: str) -> bytes:
    """A sample's key: the name of its files without the extension, with no dot in it and no longer than may be."""
    key = _bytes(stem.replace("%", "%25").replace(".", "%2E"))
    if len(key) <= _LONGEST_KEY:
        return key
    digest = hashlib.blake2b(key, digest_size=8).hexdigest()
    # Half a character at the cut would be no text.
    start = key[: _LONGEST_KEY - 1 - len(digest)].decode("utf-8", "ignore")
    return _bytes(f"{start}~{digest}")


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # a disk's names need not be text


def _shard(folder: str, name: str, files: list[ObjectInfo]) -> _Shard:
    sizes = np.array([file.size for file in files], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(BLOCK + -(-sizes // BLOCK) * BLOCK)])
    modified = max(file.modified for file in files)
    return _Shard(
        ObjectInfo(folder + name, int(offsets[-1]) + len(END), files_digest(files), modified),
        folder,
        tuple(file.name.removeprefix(folder) for file in files),
        tuple(file.version for file in files),
        sizes,
        offsets,
    )


def files_digest(files: Iterable[ObjectInfo], besides: bytes = b"") -> str:
    """The version of a tar made of these files, and of other bytes."""
    digest = hashlib.blake2b(besides, digest_size=16)
    for file in files:
        digest.update(_bytes(f"{file.name}\0{file.size}\0{file.version}\0"))
    return digest.hexdigest()


def tar_header(name: bytes, size: int) -> bytes:
    """A plain ustar header: readable by all, owned by nobody, of no time."""
    head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2
    head += b"%011o\0" % size + b"%011o\0" % 0
    tail = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - len(head) - 8, b"\0")
    checksum = sum(head) + sum(tail) + 8 * ord(" ")  # its own field counts as spaces
    return head + b"%06o\0 " % checksum + tail


def paste(content: bytearray, at: int, piece: bytes) -> None:
    """Put a piece at byte `at`, which may lie before the content's beginning, as far as there is room."""
    first, last = max(at, 0), min(at + len(piece), len(content))
    if first < last:
        content[first:last] = piece[first - at : last - at]
