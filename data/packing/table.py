"""What tables share: their columns, their rows, the files that rows name.

Other columns with one plain value a row go into the .json member, under their own names. They never decide over image
and caption: a value that cannot be converted is null, and columns without a name, or with one that others have, are
left out.
"""

from __future__ import annotations

import io
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import BadSample, DataError, UserError
from data.packing.spec import Images, Skipped, Sample, below, json_bytes, left_out, read_file, sample_key
from data.store import ObjectInfo, Store


@dataclass(frozen=True)
class Columns:
    """Names of the columns with the image (or its path) and the caption."""

    image: str
    caption: str

    @property
    def arguments(self) -> dict[str, str]:
        """What dataset.json says of them."""
        return {"image_column": self.image, "caption_column": self.caption}

    def check(self, there: Sequence[str], where: str) -> None:
        """Refuse a name that the table does not have, or has twice.

        Raises:
            UserError: naming the argument and the columns that are there.
        """
        for argument, name in (("image_column", self.image), ("caption_column", self.caption)):
            if name not in there:
                raise UserError(f"{argument} is {name!r}: it should be a column of {where}: {', '.join(there)}")
            if name not in once(there):
                raise UserError(f"{argument} is {name!r}: {where} should have one column of that name, not several")


def once(names: Sequence[str]) -> list[str]:
    """Those names that are not empty and come once, in their order."""
    counts = Counter(names)
    return [name for name in names if name and counts[name] == 1]


@dataclass(frozen=True)
class Files:
    """Where the files lie that rows name: below a store's root."""

    store: Store
    beside: bool = True
    """Whether a relative path starts from the folder of the table that names it, rather than from the root."""

    def read(self, path: str, table: str) -> tuple[str, bytes]:
        """Read a file that a row of the table of that name gives: its name below the root, and its content.

        Raises:
            BadSample: ("missing_file", "outside_root").
        """
        name = below(self.store.url, posixpath.dirname(table) if self.beside else "", path)
        return name, read_file(self.store, name)


@dataclass(frozen=True)
class Row:
    """One row of a table: its image by path, or the content (then the path is but a name); other columns' values."""

    number: int
    table: str
    where: str
    caption: str | None
    path: str | None
    content: bytes | None
    values: dict[str, Any]


def row_sample(row: Row | Skipped, files: Files, images: Images) -> Sample | Skipped:
    """Make a row's sample, or say why it is left out."""
    if isinstance(row, Skipped):
        return row
    try:
        return _sample(row, files, images)
    except BadSample as fault:
        return left_out(row.where, fault)


def _sample(row: Row, files: Files, images: Images) -> Sample:
    caption = _check_caption(None if row.caption is None else row.caption.encode("utf-8", "surrogateescape"))
    name, content = row.path or "", row.content
    if content is None:
        if row.path is None:
            raise BadSample("missing_image")
        name, content = files.read(row.path, row.table)
    extension, content = images(content)
    members = {extension: content, "txt": caption}
    if row.values:
        members["json"] = json_bytes(row.values)
    return Sample(sample_key(row.number, posixpath.splitext(name)[0]), members)


def _check_caption(content: bytes | None) -> bytes:
    if content is None or not content.strip():
        raise BadSample("missing_caption")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise BadSample("bad_caption", str(error)) from error
    if "\0" in text:
        raise BadSample("bad_caption", "it has NUL characters")
    return content


class ObjectFile(io.RawIOBase):
    """One version of an object as a seekable file."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store, self._info, self._at = store, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        stop = min(self._at + len(view), self._info.size)
        if stop <= self._at:
            return 0
        content = self._store.read(self._info.name, self._at, stop, version=self._info.version)
        view[: len(content)] = content
        self._at += len(content)
        return len(content)


def beginning(store: Store, info: ObjectInfo) -> bytes:
    """A file's first bytes, which tell what it is (`data.listing.kind_of`)."""
    return bytes(store.read(info.name, 0, min(64, info.size), version=info.version))


def look_up(store: Store, name: str) -> ObjectInfo:
    if (info := store.info(name)) is None:
        raise DataError(f"source {store.url}/{name} does not exist")
    return info
