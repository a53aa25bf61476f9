"""What is in each shard: for every sample, its key and where in the tar its image and caption lie.

- WebDataset's convention: neighbouring members whose names agree up to the first dot of the basename are one
  sample; the rest of the name, in lower case, is the member's extension.
- Headers are read and data is skipped where skipping pays (`Store.readahead`), so local shards cost a few
  reads a sample and S3 shards one stream.
- A member's name is only ever compared and shown: nothing is extracted, no name becomes a path.
- A shard's table is one int64 array, so that an index stays small and pickles to other ranks as it is.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.store import ObjectInfo, Store

Span = tuple[int, int]
"""Byte offset in the tar, and size in bytes."""

SHARD_SUFFIX = ".tar"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Of several images in one sample the first listed wins."""
CAPTION_EXTENSION = "txt"

_THREADS = 8
"""Shards that are indexed at a time."""


@dataclass(frozen=True)
class SampleEntry:
    """Where one sample lies in its shard; None for a part it does not have."""

    key: str
    image: Span | None
    caption: Span | None


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One shard. `spans` is int64 (samples, 2, 2): image, caption; offset and size in bytes, -1 where absent.

    `damage` says where and why reading ended early; the samples before it are whole.
    """

    info: ObjectInfo
    keys: tuple[str, ...]
    spans: NDArray[np.int64]
    damage: str | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, sample: int) -> SampleEntry:
        image, caption = ((int(offset), int(size)) if offset >= 0 else None for offset, size in self.spans[sample])
        return SampleEntry(self.keys[sample], image, caption)


@dataclass(frozen=True, eq=False)
class SourceIndex:
    """A source as the loader wants it: its store, and its shards in the order of their names."""

    name: str
    store: Store
    shards: tuple[ShardIndex, ...]
    counts: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", np.array([len(shard) for shard in self.shards], dtype=np.int64))

    def fingerprint(self) -> str:
        """Hash shard names and sample counts: 16 hex digits that change whenever the order of samples would."""
        text = "\n".join(f"{shard.info.name}\t{len(shard)}" for shard in self.shards)
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def index_source(store: Store, name: str) -> SourceIndex:
    """Index every shard of a store.

    Args:
        store: what holds the shards, at any depth.
        name: the source's name, the first part of its samples' ids; without "/".

    Raises:
        DataError: there are no shards, or one is empty, not a tar, or without any image.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    if not name or "/" in name:
        raise DataError(f"source name {name!r} must be non-empty and without '/': ids are source/shard/key")
    infos = store.list(SHARD_SUFFIX)
    if not infos:
        raise DataError(f"source {name!r}: no {SHARD_SUFFIX} shard below {store.url}")
    with ThreadPoolExecutor(_THREADS) as pool:
        shards = tuple(pool.map(lambda info: index_shard(store, info), infos))
    return SourceIndex(name, store, shards)


def index_shard(store: Store, info: ObjectInfo) -> ShardIndex:
    """List the samples of one shard, as many as lie whole before its end or the first fault.

    Raises:
        DataError: the shard is empty, not a tar, or without any image.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    where = f"shard {store.url}/{info.name}"
    if info.size == 0:
        raise DataError(f"{where} is empty (0 bytes): remove it or write it again")
    keys: list[str] = []
    rows: list[list[Span]] = []
    seen: dict[str, None] = {}
    scan = _TarScan(store, info)
    for key, parts in _samples(scan):
        seen.update(dict.fromkeys(parts))
        image = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
        row = [image, parts.get(CAPTION_EXTENSION)]
        if any(row):
            keys.append(key)
            rows.append([span or (-1, -1) for span in row])
    if not scan.found:
        raise DataError(f"{where} is not a tar file with any whole member: {scan.damage or 'it holds none'}")
    spans = np.array(rows, dtype=np.int64).reshape(len(rows), 2, 2)
    if not (spans[:, 0, 0] >= 0).any():
        extensions = ", ".join(f".{extension}" for extension in list(seen)[:8]) or "none with an extension"
        raise DataError(f"{where} has no image ({'|'.join(IMAGE_EXTENSIONS)}); its members are: {extensions}")
    return ShardIndex(info, tuple(keys), spans, scan.damage)


def _samples(members: Iterable[tuple[str, Span]]) -> Iterator[tuple[str, dict[str, Span]]]:
    current: str | None = None
    parts: dict[str, Span] = {}
    for name, span in members:
        match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name, re.DOTALL)
        if match is None:
            continue
        key, extension = match[1], match[2].lower()
        # The same part twice is two samples under one key, not one sample that lost a part.
        if key != current or extension in parts:
            if current is not None:
                yield current, parts
            current, parts = key, {}
        parts[extension] = span
    if current is not None:
        yield current, parts


class _TarScan:
    """The whole regular members of a tar as (name, span), and afterwards what was `found` and any `damage`."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._file = io.BufferedReader(_Ranged(store, info), store.readahead)
        self._size = info.size
        self.found = 0
        self.damage: str | None = None

    def __iter__(self) -> Iterator[tuple[str, Span]]:
        end = 0
        try:
            with tarfile.open(fileobj=self._file, mode="r:", errorlevel=0) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                    end = member.offset_data + member.size
                    if member.isreg() and not member.issparse():
                        if member.size < 0 or end > self._size:
                            self.damage = f"cut off at byte {self._size}, inside member {member.name!r}"
                            return
                        self.found += 1
                        yield member.name, (member.offset_data, member.size)
                # tarfile takes a broken header for the end; only zeros or the end of the file are one.
                self._file.seek(tar.offset)
                if self._file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    self.damage = f"no tar header at byte {tar.offset}"
        except (tarfile.TarError, ValueError, OverflowError) as fault:
            self.damage = f"{fault} (after byte {end})"


class _Ranged(io.RawIOBase):
    """An object as a seekable file, for tarfile."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store, self._info, self._at = store, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        stop = min(self._at + len(view), self._info.size)
        content = self._store.read(self._info.name, self._at, stop) if stop > self._at else b""
        view[: len(content)] = content
        self._at += len(content)
        return len(content)


def all_damage(indices: Sequence[SourceIndex]) -> list[str]:
    """Say in one line for each damaged shard what is wrong and how many samples are kept."""
    return [
        f"source {index.name!r}: {shard.info.name}: {shard.damage}; {len(shard)} samples kept"
        for index in indices
        for shard in index.shards
        if shard.damage
    ]
