"""A folder of images with captions, seen as shards: tars whose bytes are made from the files as they are read.

- A sample is an image and the files beside it of the same name up to the last dot ("a.jpg", "a.txt") or of the image's
  whole name and another extension ("a.jpg.txt"). A ".caption" is its .txt where it has no other. All else is left out,
  and counted by reason (`data/listing.py`).
- Images of one name ("a.jpg", "a.png") are samples of their own, "a%jpg" and "a%png", and share the files beside them.
- A virtual tar holds up to 1000 samples of one folder, by name. Its members carry no folder, since the shard's name
  does, and a dot in the rest of the name is written %2E, since WebDataset would take it for the extension's
  ("v1.5/a.b.jpg" is member "a%2Eb.jpg" of shard "v1.5/00000.tar"). So a key is unique in its shard.
- The files are listed once. A read names the version each file had then, so a file that changes is an error. Every
  process holds the list, 250 bytes a file; that is a way to begin, not one for millions of images.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.listing import extension, is_image, why_not_an_image
from data.store.base import ObjectInfo, Store
from data.store.virtual import (
    BLOCK,
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
_SECOND = "files beside an image that has another of their kind"


@dataclass(frozen=True, eq=False, slots=True)
class _Shard:
    """A virtual tar of files of one folder.

    Attributes:
        folder: "" or "a/b/".
        names: the files, without the folder, as they follow each other.
        members: what each is called in the tar.
        versions: theirs, in the inner store.
        sizes: int64 (files,), bytes.
        offsets: int64 (files + 1,), the first byte of each file's header, then of the closing blocks.
    """

    info: ObjectInfo
    folder: str
    names: tuple[str, ...]
    members: tuple[bytes, ...]
    versions: tuple[str, ...]
    sizes: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def file(self, number: int) -> str:
        return self.folder + self.names[number]

    def head(self, number: int) -> bytes:
        return tar_header(self.members[number], int(self.sizes[number]))


class FolderStore(VirtualTars[_Shard]):
    """The virtual tars of a store's images, "sub/00000.tar" for the folder "sub".

    Args:
        inner: what holds the files, at any depth.

    Raises:
        DataError: a file that a tar cannot hold.
        StoreError: the network failed for longer than the retries last.
    """

    def __init__(self, inner: Store) -> None:
        left_out: Counter[str] = Counter()
        super().__init__(inner, list(_shards(inner, left_out)), "a folder of images", left_out)


_Sample = list[tuple[bytes, ObjectInfo]]
"""What its files are called in the tar, and the files, in the order of their names."""


def _shards(inner: Store, left_out: Counter[str]) -> Iterator[_Shard]:
    folders: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in inner.list(left_out=left_out):
        folder, slash, _ = info.name.rpartition("/")
        folders[folder + slash].append(info)
    for folder, files in folders.items():
        samples = _samples(inner.url, folder, files, left_out)
        for number in itertools.count():
            if not (some := list(itertools.islice(samples, SAMPLES_A_SHARD))):
                break
            yield _shard(folder, f"{number:05d}.tar", list(itertools.chain.from_iterable(some)))


def _samples(url: str, folder: str, files: list[ObjectInfo], left_out: Counter[str]) -> Iterator[_Sample]:
    """The samples of one folder, by name."""
    images: dict[str, list[ObjectInfo]] = defaultdict(list)  # by their names up to the last dot
    beside: dict[str, list[ObjectInfo]] = defaultdict(list)  # the other files alike: of "a.jpg.txt" it is "a.jpg"
    for info in files:
        stem = _name(info).rpartition(".")[0]
        (images if stem and is_image(info.name) else beside)[stem].append(info)
    taken, second = set[str](), set[str]()
    for stem in sorted(images):
        several = len(images[stem]) > 1
        for image in images[stem]:
            members = {extension(image.name): image}
            around = [beside.get(stem, []), beside.get(_name(image), [])]
            for file in itertools.chain.from_iterable(reversed(around) if several else around):
                ending = extension(file.name)
                if 0 < len(encoded(ending)) <= LONGEST_EXTENSION:
                    (taken if members.setdefault(ending, file) is file else second).add(file.name)
            if "txt" not in members and "caption" in members:
                members["txt"] = members.pop("caption")
            if too_large := next((file for file in members.values() if file.size > _LARGEST_FILE), None):
                raise DataError(
                    f"{url}: {too_large.name!r} is {too_large.size} bytes, and a tar's file has at most {_LARGEST_FILE}"
                )
            # A stem has no bare "%" in its key: so keys of images that share one are free.
            key = tar_key(stem, f"%{_name(image).rpartition('.')[2]}" if several else "")
            by_file = sorted(members.items(), key=lambda item: item[1].name)
            yield [(key + b"." + encoded(ending), file) for ending, file in by_file]
    for file in itertools.chain.from_iterable(beside.values()):
        if file.name not in taken:
            left_out[_SECOND if file.name in second else why_not_an_image(file.name)] += 1


def _name(info: ObjectInfo) -> str:
    return info.name.rpartition("/")[2]


def _shard(folder: str, name: str, files: _Sample) -> _Shard:
    infos = [file for _, file in files]
    sizes = np.array([file.size for file in infos], np.int64)
    offsets = piece_offsets(BLOCK, sizes)
    return _Shard(
        tar_info(folder + name, offsets, infos),
        folder,
        tuple(file.name.removeprefix(folder) for file in infos),
        tuple(member for member, _ in files),
        tuple(file.version for file in infos),
        sizes,
        offsets,
    )
