"""Virtual tars: folders of files seen as shards, whose bytes are made from the files as they are read.

A folder of images with captions (`FolderStore`):
- A sample is an image and the files of the same name up to the last dot ("a.jpg", "a.txt"), or of the image's whole
  name plus an extension ("a.jpg.txt"). A ".caption" serves as .txt where there is none. Other files are left out and
  counted by reason (`data/listing.py`).
- Images that share a name ("a.jpg", "a.png") are separate samples, "a%jpg" and "a%png", and share their other files.
- A virtual tar holds up to 1000 samples of one folder, by name. Members carry no folder, since the shard's name does.
  Dots before the extension are written %2E, since WebDataset splits at the first dot ("v1.5/a.b.jpg" is member
  "a%2Eb.jpg" of shard "v1.5/00000.tar"). So keys are unique in a shard.
- Long names are cut to what a plain ustar header holds and end in a hash: no reader needs more.

A folder of classes (`ClassFolderStore`), `n01440764/x.JPEG`, as ImageNet and torchvision's ImageFolder have it:
- The folders at the root are the classes, numbered from 0 in the order of their names, as ImageFolder does. A sample
  is an image at any depth in one of them and a generated member `.cls`: the class's number in digits.
- A virtual tar holds up to 1000 samples of all classes in one fixed shuffled order, so that shards are alike and a
  shuffle within a block is one over classes.

Files are listed once; a read insists on the version that each file had then. Every process holds the list, about 250
bytes a file (250 MB for ImageNet's 1.28 million), so larger sources should be packed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.listing import IMAGE_EXTENSIONS, extension, is_image, why_not_an_image
from data.randomness import key, permutation
from data.store.base import ObjectInfo, OnFault, Store, changed, shrunk

SAMPLES_A_SHARD = 1000

BLOCK = 512
END = bytes(2 * BLOCK)
LONGEST_EXTENSION = 20
"""Bytes; a longer one is a name with a dot in it, not an extension that anything reads."""
_LONGEST_KEY = 100 - 1 - LONGEST_EXTENSION


class VirtualTar(Protocol):
    """A tar made of pieces: each is a generated head and then a file's content, padded."""

    @property
    def info(self) -> ObjectInfo:
        """The tar's entry in a listing."""

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions of the files."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of the files."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Int64 (pieces + 1,): first byte of each piece, then of the closing blocks."""

    def file(self, number: int) -> str:
        """Name of a piece's file."""

    def head(self, number: int) -> bytes:
        """A piece's bytes before its file's content."""


T = TypeVar("T", bound=VirtualTar)


class VirtualTars(Generic[T]):
    """A store of virtual tars, made of the files of the store `inner`.

    Args:
        what: the source in words, for messages.
        left_out: what else `inner` holds, by reason.
    """

    readahead = 0  # each file is a request of its own, and headers cost none

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
        """Read bytes [start, stop) of a virtual tar, as `Store.read` does; DataError if one of its files changed."""
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
    """Int64 (files + 1,): first byte of each file's piece, then the end of the last; heads have `head_bytes` each."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(head_bytes + -(-sizes // BLOCK) * BLOCK)])


def tar_info(name: str, offsets: NDArray[np.int64], files: Iterable[ObjectInfo], extra: bytes = b"") -> ObjectInfo:
    """A tar's entry in a listing; its version is a hash of `extra` and of the files' entries."""
    digest, modified = hashlib.blake2b(extra, digest_size=16), 0.0
    for file in files:
        digest.update(encoded(f"{file.name}\0{file.size}\0{file.version}\0"))
        modified = max(modified, file.modified)
    return ObjectInfo(name, int(offsets[-1]) + len(END), digest.hexdigest(), modified)


def tar_header(name: bytes, size: int) -> bytes:
    """A plain ustar header: mode 644, no owner, no time."""
    head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2
    head += b"%011o\0" % size + b"%011o\0" % 0
    tail = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - len(head) - 8, b"\0")
    checksum = sum(head) + sum(tail) + 8 * ord(" ")  # the checksum field itself counts as spaces
    return head + b"%06o\0 " % checksum + tail


def tar_key(stem: str, ending: str = "") -> bytes:
    """A sample's key: its files' name without the extension, dots escaped and cut to fit a header.

    `ending` distinguishes samples of one stem; it holds no dot.
    """
    key = encoded(stem.replace("%", "%25").replace(".", "%2E") + ending)
    if len(key) <= _LONGEST_KEY:
        return key
    digest = hashlib.blake2b(key, digest_size=8).hexdigest()
    # The cut may split a character.
    start = key[: _LONGEST_KEY - 1 - len(digest)].decode("utf-8", "ignore")
    return encoded(f"{start}~{digest}")


def encoded(name: str) -> bytes:
    """A name's bytes in a tar."""
    return name.encode("utf-8", "surrogateescape")  # file names need not be UTF-8


def _paste(content: bytearray, at: int, piece: bytes) -> None:
    """Copy the part of a piece at byte `at` (which may be negative) that lies within the content."""
    first, last = max(at, 0), min(at + len(piece), len(content))
    if first < last:
        content[first:last] = piece[first - at : last - at]


_LARGEST_FILE = 8**11 - 1
"""The largest size that a header's eleven octal digits can hold."""
_SECOND = "files beside an image that has another of their kind"


@dataclass(frozen=True, eq=False, slots=True)
class _Shard:
    """A virtual tar of files of one folder.

    Attributes:
        folder: "" or "a/b/".
        names: the files in order, without the folder.
        members: their names in the tar.
        versions: their versions in the inner store.
        sizes: int64 (files,), bytes.
        offsets: int64 (files + 1,), first byte of each file's header, then of the closing blocks.
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
    """The virtual tars of a store's images, at any depth: "sub/00000.tar" for the folder "sub".

    Raises:
        DataError: a file is too large for a tar.
    """

    def __init__(self, inner: Store) -> None:
        left_out: Counter[str] = Counter()
        super().__init__(inner, list(_shards(inner, left_out)), "a folder of images", left_out)


_Sample = list[tuple[bytes, ObjectInfo]]
"""Pairs of a file's name in the tar and its entry, in the order of the files' names."""


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
    others: dict[str, list[ObjectInfo]] = defaultdict(list)  # likewise: "a.jpg.txt" is under "a.jpg"
    for info in files:
        stem = _name(info).rpartition(".")[0]
        (images if stem and is_image(info.name) else others)[stem].append(info)
    taken, second = set[str](), set[str]()
    for stem in sorted(images):
        several = len(images[stem]) > 1
        for image in images[stem]:
            members = {extension(image.name): image}
            around = [others.get(stem, []), others.get(_name(image), [])]
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
            # A stem's "%" is escaped in its key, so keys with a bare "%" are free.
            key = tar_key(stem, f"%{_name(image).rpartition('.')[2]}" if several else "")
            by_file = sorted(members.items(), key=lambda item: item[1].name)
            yield [(key + b"." + encoded(ending), file) for ending, file in by_file]
    for file in itertools.chain.from_iterable(others.values()):
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


LABEL = "cls"
"""Extension of the member that holds the class's number."""
_LABEL_BYTES = 2 * BLOCK
"""Bytes of a label's header and content."""


@dataclass(frozen=True, eq=False, slots=True)
class _ClassShard:
    """A virtual tar.

    Attributes:
        names: the images, in the inner store.
        versions: their versions.
        sizes: int64 (samples,), bytes of the images.
        labels: int64 (samples,).
        offsets: int64 (samples + 1,), first byte of each sample, then of the closing blocks.
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
        """The label as a member, then the image's header."""
        stem, _, extension = self.names[number].rpartition(".")
        key, label = tar_key(stem), b"%d" % self.labels[number]
        member = tar_header(key + b"." + LABEL.encode(), len(label)) + label.ljust(BLOCK, b"\0")
        return member + tar_header(key + b"." + extension.lower().encode(), int(self.sizes[number]))


class ClassFolderStore(VirtualTars[_ClassShard]):
    """The virtual tars "00000.tar", ... of a store whose folders are classes.

    Raises:
        DataError: there is no image, or one lies in no folder.
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
        """Names of the folders; a class's number is its index."""
        super().__init__(inner, _class_shards(images, self.classes), "a folder of classes", left_out)

    def offsets(self, name: str) -> NDArray[np.int64]:
        """Int64 (samples + 1,): first byte of each sample of a virtual tar, then the end of the last."""
        return self._tars[name].offsets


def _class(name: str) -> str:
    return name.partition("/")[0]


def _class_shards(images: list[ObjectInfo], classes: tuple[str, ...]) -> Iterator[_ClassShard]:
    numbers = {name: number for number, name in enumerate(classes)}
    order = permutation(key(0, "folder of classes"), len(images))
    for number, first in enumerate(range(0, len(images), SAMPLES_A_SHARD)):
        files = tuple(images[i] for i in order[first : first + SAMPLES_A_SHARD])
        sizes = np.array([file.size for file in files], np.int64)
        offsets = piece_offsets(_LABEL_BYTES + BLOCK, sizes)
        labels = np.array([numbers[_class(file.name)] for file in files], np.int64)
        info = tar_info(f"{number:05d}.tar", offsets, files, b"".join(b"%d," % label for label in labels))
        names, versions = (tuple(getattr(file, part) for file in files) for part in ("name", "version"))
        yield _ClassShard(info, names, versions, sizes, labels, offsets)
