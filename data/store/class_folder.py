"""A folder of classes, seen as shards: `n01440764/x.JPEG`, the layout of ImageNet and of torchvision's ImageFolder.

- The folders at the root are the classes, numbered from 0 in the order of their names, as ImageFolder does. A sample
  is an image at any depth in one of them; its second member, `.cls`, is made: the class's number in digits.
- A virtual tar holds up to 1000 samples of all classes, in an order shuffled once and for all, so that shards are
  alike and a shuffle inside a block of them is one over classes.
- The files are listed once. Every process holds the list, 200 bytes an image: some 250 MB for ImageNet's 1.28 million.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.randomness import key, permutation
from data.store.base import ObjectInfo, OnFault, Store, changed, shrunk
from data.store.folder import (
    BLOCK,
    END,
    IMAGE_EXTENSIONS,
    SAMPLES_A_SHARD,
    files_digest,
    paste,
    tar_header,
    tar_key,
)

LABEL = "cls"
"""Extension of the member that holds the class's number."""
_LABEL_BYTES = 2 * BLOCK
"""Of a label's header and content."""


@dataclass(frozen=True, eq=False, slots=True)
class _Shard:
    """A virtual tar.

    Attributes:
        names: the images, in the inner store.
        versions: theirs.
        sizes: int64 (samples,), bytes of them.
        labels: int64 (samples,).
        offsets: int64 (samples + 1,), the first byte of each sample, then of the closing blocks.
    """

    info: ObjectInfo
    names: tuple[str, ...]
    versions: tuple[str, ...]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]


class ClassFolderStore:
    """The virtual tars "00000.tar", ... of a store whose folders are classes.

    Args:
        inner: what holds the folders.

    Raises:
        DataError: there is no image, or one that lies in no folder.
        StoreError: the network failed for longer than the retries last.
    """

    readahead = 0

    def __init__(self, inner: Store) -> None:
        self.url = inner.url
        self._inner = inner
        images = [info for info in inner.list() if _is_image(info.name)]
        if stray := next((info.name for info in images if "/" not in info.name), None):
            raise DataError(f"{self.url}/{stray} lies in no folder: put it into its class's")
        if not images:
            raise DataError(f"{self.url} holds no folder with an image (jpg, jpeg, png or webp)")
        self.classes = tuple(sorted({_class(info.name) for info in images}))
        """The folders' names; a class's number is its place among them."""
        self._shards = {shard.info.name: shard for shard in _shards(images, self.classes)}

    def list(self, suffix: str = "") -> list[ObjectInfo]:
        """List the virtual tars, sorted by name."""
        return [shard.info for name, shard in sorted(self._shards.items()) if name.endswith(suffix)]

    def offsets(self, name: str) -> NDArray[np.int64]:
        """The first byte of each sample of a virtual tar, then the end of the last."""
        return self._shards[name].offsets

    def info(self, name: str) -> ObjectInfo | None:
        """Look a virtual tar up."""
        shard = self._shards.get(name)
        return shard.info if shard else None

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
            raise DataError(f"{self.url}/{name} does not exist: the source is a folder of classes, read as tars")
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
            stem, _, extension = file.rpartition(".")
            sample = tar_key(stem)
            label = b"%d" % shard.labels[number]
            head = tar_header(sample + b"." + LABEL.encode(), len(label)) + label.ljust(BLOCK, b"\0")
            paste(content, at - start, head + tar_header(sample + b"." + extension.lower().encode(), size))
            data = at + _LABEL_BYTES + BLOCK
            first, last = max(start, data), min(stop, data + size)
            if first < last:
                content[first - start : last - start] = self._inner.read(
                    file, first - data, last - data, version=shard.versions[number], on_fault=on_fault
                )
        return content


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in name


def _class(name: str) -> str:
    return name.partition("/")[0]


def _shards(images: list[ObjectInfo], classes: tuple[str, ...]) -> Iterator[_Shard]:
    numbers = {name: number for number, name in enumerate(classes)}
    order = permutation(key(0, "folder of classes"), len(images))
    for number, first in enumerate(range(0, len(images), SAMPLES_A_SHARD)):
        files = tuple(images[i] for i in order[first : first + SAMPLES_A_SHARD])
        sizes = np.array([file.size for file in files], np.int64)
        whole = _LABEL_BYTES + BLOCK + -(-sizes // BLOCK) * BLOCK
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(whole)])
        labels = np.array([numbers[_class(file.name)] for file in files], np.int64)
        info = ObjectInfo(
            f"{number:05d}.tar",
            int(offsets[-1]) + len(END),
            files_digest(files, b"".join(b"%d," % label for label in labels)),
            max(file.modified for file in files),
        )
        names, versions = (tuple(getattr(file, part) for file in files) for part in ("name", "version"))
        yield _Shard(info, names, versions, sizes, labels, offsets)
