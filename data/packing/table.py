"""What CSV and Parquet tables share: their columns, their rows, and the files that rows name.

Other columns with one plain value a row go into the .json member under their own names. They never decide over image
and caption: a value that cannot be converted is null, and columns without a unique name are left out.
"""

from __future__ import annotations

import io
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import BadSample, DataError, UserError
from data.packing.spec import ImageEncoder, Sample, Skipped, json_bytes, name_below, read_file, sample_key, skipped
from data.store import ObjectInfo, Store


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the image (or its path) and the caption."""

    image: str
    caption: str

    @property
    def arguments(self) -> dict[str, str]:
        """Their entries in dataset.json."""
        return {"image_column": self.image, "caption_column": self.caption}

    def check(self, there: Sequence[str], where: str) -> None:
        """Raise a UserError if the table lacks one of the names or has it twice."""
        for argument, name in (("image_column", self.image), ("caption_column", self.caption)):
            if name not in there:
                raise UserError(f"{argument} is {name!r}: it should be a column of {where}: {', '.join(there)}")
            if name not in once(there):
                raise UserError(f"{argument} is {name!r}: {where} should have one column of that name, not several")


def once(names: Sequence[str]) -> list[str]:
    """The names that are not empty and occur once, in order."""
    counts = Counter(names)
    return [name for name in names if name and counts[name] == 1]


@dataclass(frozen=True)
class Files:
    """The files that rows name, below a store's root; relative paths start at the table's folder, or at the root."""

    store: Store
    from_table: bool = True

    def read(self, path: str, table: str) -> tuple[str, bytes]:
        """Read a file that a row of `table` names; returns its name below the root and its content.

        Raises:
            BadSample: "missing_file" or "outside_root".
        """
        name = name_below(self.store.url, posixpath.dirname(table) if self.from_table else "", path)
        return name, read_file(self.store, name)


@dataclass(frozen=True)
class Row:
    """One row of a table: the image by path or by content (the path is then only a name), and other columns' values."""

    number: int
    table: str
    where: str
    caption: str | None
    path: str | None
    content: bytes | None
    values: dict[str, Any]


def row_sample(row: Row | Skipped, files: Files, encoder: ImageEncoder) -> Sample | Skipped:
    """Make a row's sample, or say why it is skipped."""
    if isinstance(row, Skipped):
        return row
    try:
        return _sample(row, files, encoder)
    except BadSample as fault:
        return skipped(row.where, fault)


def _sample(row: Row, files: Files, encoder: ImageEncoder) -> Sample:
    caption = _check_caption(None if row.caption is None else row.caption.encode("utf-8", "surrogateescape"))
    name, content = row.path or "", row.content
    if content is None:
        if row.path is None:
            raise BadSample("missing_image")
        name, content = files.read(row.path, row.table)
    extension, content = encoder(content)
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
    """A file's first bytes, for `data.listing.kind_of`."""
    return bytes(store.read(info.name, 0, min(64, info.size), version=info.version))


def look_up(store: Store, name: str) -> ObjectInfo:
    if (info := store.info(name)) is None:
        raise DataError(f"source {store.url}/{name} does not exist")
    return info
