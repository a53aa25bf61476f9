"""A folder of images with captions, seen as shards: tars whose bytes are made from the files as they are read.

- A sample is an image and the files beside it of the same name up to the last dot. All else is left out: files
  without an image, hidden ones, names without an extension.
- A virtual tar holds up to 1000 samples of one folder, by name. Its members carry no folder, since the shard's name
  does, and a dot in the rest of the name is written %2E, since WebDataset would take it for the extension's
  ("v1.5/a.b.jpg" is member "a%2Eb.jpg" of shard "v1.5/00000.tar"). So a key is unique in its shard.
- The files are listed once. A read names the version each file had then, so a file that changes is an error. Every
  process holds the list, 170 bytes a file; that is a way to begin, not one for millions of images.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.store.base import ObjectInfo, Store
from data.store.virtual import (
    BLOCK,
    IMAGE_EXTENSIONS,
    LONGEST_EXTENSION,
    SAMPLES_A_SHARD,
    VirtualTars,
    encoded,
    piece_offsets,
    tar_header,
    tar_info,
    tar_key,
)

_LARGEST_FILE = 8**11 - 1
"""Bytes that eleven octal digits can tell."""


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

    def file(self, number: int) -> str:
        return self.folder + self.names[number]

    def head(self, number: int) -> bytes:
        return tar_header(_member(self.names[number]), int(self.sizes[number]))


class FolderStore(VirtualTars[_Shard]):
    """The virtual tars of a store's images, "sub/00000.tar" for the folder "sub".

    Args:
        inner: what holds the files, at any depth.

    Raises:
        DataError: a file that a tar cannot hold, or two that differ in the case of their extension alone.
        StoreError: the network failed for longer than the retries last.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner, _shards(inner), "a folder of images")


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
        if hidden or not stem or not 0 < len(encoded(extension.lower())) <= LONGEST_EXTENSION:
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
    return tar_key(stem) + b"." + encoded(extension.lower())


def _shard(folder: str, name: str, files: list[ObjectInfo]) -> _Shard:
    sizes = np.array([file.size for file in files], np.int64)
    offsets = piece_offsets(BLOCK, sizes)
    return _Shard(
        tar_info(folder + name, offsets, files),
        folder,
        tuple(file.name.removeprefix(folder) for file in files),
        tuple(file.version for file in files),
        sizes,
        offsets,
    )
