"""A folder of classes, seen as shards: `n01440764/x.JPEG`, the layout of ImageNet and of torchvision's ImageFolder.

- The folders at the root are the classes, numbered from 0 in the order of their names, as ImageFolder does. A sample
  is an image at any depth in one of them; its second member, `.cls`, is made: the class's number in digits.
- A virtual tar holds up to 1000 samples of all classes, in an order shuffled once and for all, so that shards are
  alike and a shuffle inside a block of them is one over classes.
- The files are listed once. Every process holds the list, 200 bytes an image: some 250 MB for ImageNet's 1.28 million.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.formats import IMAGE_EXTENSIONS
from data.listing import is_image, why_not_an_image
from data.randomness import key, permutation
from data.store.base import ObjectInfo, Store
from data.store.virtual import (
    BLOCK,
    SAMPLES_A_SHARD,
    VirtualTars,
    piece_offsets,
    tar_header,
    tar_info,
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

    def file(self, number: int) -> str:
        return self.names[number]

    def head(self, number: int) -> bytes:
        """The label as a member, and the image's header."""
        stem, _, extension = self.names[number].rpartition(".")
        key, label = tar_key(stem), b"%d" % self.labels[number]
        member = tar_header(key + b"." + LABEL.encode(), len(label)) + label.ljust(BLOCK, b"\0")
        return member + tar_header(key + b"." + extension.lower().encode(), int(self.sizes[number]))


class ClassFolderStore(VirtualTars[_Shard]):
    """The virtual tars "00000.tar", ... of a store whose folders are classes.

    Args:
        inner: what holds the folders.

    Raises:
        DataError: there is no image, or one that lies in no folder.
        StoreError: the network failed for longer than the retries last.
    """

    def __init__(self, inner: Store) -> None:
        left_out: Counter[str] = Counter()
        images, others = list[ObjectInfo](), list[ObjectInfo]()
        for info in inner.list(left_out=left_out):
            (images if is_image(info.name) else others).append(info)
        left_out.update(why_not_an_image(info.name) for info in others)
        if stray := next((info.name for info in images if "/" not in info.name), None):
            raise DataError(f"{inner.url}/{stray} lies in no folder: put it into its class's")
        if not images:
            raise DataError(f"{inner.url} holds no folder with an image ({', '.join(IMAGE_EXTENSIONS)})")
        self.classes = tuple(sorted({_class(info.name) for info in images}))
        """The folders' names; a class's number is its place among them."""
        super().__init__(inner, _shards(images, self.classes), "a folder of classes", left_out)

    def offsets(self, name: str) -> NDArray[np.int64]:
        """The first byte of each sample of a virtual tar, then the end of the last."""
        return self._tars[name].offsets


def _class(name: str) -> str:
    return name.partition("/")[0]


def _shards(images: list[ObjectInfo], classes: tuple[str, ...]) -> Iterator[_Shard]:
    numbers = {name: number for number, name in enumerate(classes)}
    order = permutation(key(0, "folder of classes"), len(images))
    for number, first in enumerate(range(0, len(images), SAMPLES_A_SHARD)):
        files = tuple(images[i] for i in order[first : first + SAMPLES_A_SHARD])
        sizes = np.array([file.size for file in files], np.int64)
        offsets = piece_offsets(_LABEL_BYTES + BLOCK, sizes)
        labels = np.array([numbers[_class(file.name)] for file in files], np.int64)
        info = tar_info(f"{number:05d}.tar", offsets, files, b"".join(b"%d," % label for label in labels))
        names, versions = (tuple(getattr(file, part) for file in files) for part in ("name", "version"))
        yield _Shard(info, names, versions, sizes, labels, offsets)
