"""Packing the rows of a CSV or TSV file with a header, whose image column holds paths.

Its rows are counted once, from front to back, and every thousandth row's place is noted: a process begins to read at
the nearest one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from data.packing.contents import Contents, LeftOut, Sample
from data.packing.images import Images
from data.packing.recipe import Recipe
from data.packing.rows import ahead
from data.packing.table import Columns, Files, ObjectFile, Row, look_up, row_sample
from data.store import ObjectInfo, Store

_ROWS_A_MARK = 1000
_BUFFER = 1 << 20
"""Bytes that are read at a time, or as many as another request costs."""
_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


@dataclass(frozen=True)
class _CsvReader:
    store: Store
    info: ObjectInfo
    delimiter: str
    header: list[str]
    marks: array[int]
    """Where rows 0, 1000, 2000, ... begin, in bytes."""
    columns: Columns
    files: Files
    images: Images

    def __call__(self, items: Sequence[int]) -> Iterator[Sample | LeftOut]:
        return ahead(lambda row: row_sample(row, self.files, self.images), self._rows(items))

    def _rows(self, items: Sequence[int]) -> Iterator[Row]:
        image, caption = (self.header.index(name) for name in (self.columns.image, self.columns.caption))
        fields: Iterator[tuple[int, list[str]]] = iter(())
        at = -1  # the next row that `fields` gives
        for number in items:
            mark = number // _ROWS_A_MARK
            if at < 0 or mark * _ROWS_A_MARK > at:
                fields = _csv_rows(self.store, self.info, self.delimiter, self.marks[mark])
                at = mark * _ROWS_A_MARK
            for _ in range(number - at):
                next(fields)
            _, cells = next(fields)
            at = number + 1
            where = f"row {number}"
            if len(cells) <= max(image, caption):
                yield Row(number, self.info.name, where, None, None, None, {})
                continue
            others = {
                name: _plain(cell)
                for n, (name, cell) in enumerate(zip(self.header, cells, strict=False))
                if n not in (image, caption)
            }
            where = f"{where} ({cells[image]})"
            yield Row(number, self.info.name, where, cells[caption], cells[image], None, others)


def _csv_rows(store: Store, info: ObjectInfo, delimiter: str, start: int) -> Iterator[tuple[int, list[str]]]:
    """The rows from byte `start` on, empty lines aside: first byte, cells."""
    position = start

    def lines() -> Iterator[str]:
        nonlocal position
        for line in file:
            position += len(line)
            yield line.decode("utf-8", "surrogateescape").removeprefix("\ufeff" if position == len(line) else "")

    with io.BufferedReader(ObjectFile(store, info), max(_BUFFER, store.readahead)) as file:
        file.seek(start)
        begin = position
        reader = csv.reader(lines(), delimiter=delimiter)
        try:
            for cells in reader:
                if cells:
                    yield begin, cells
                begin = position
        except csv.Error as error:
            raise DataError(
                f"source {store.url}/{info.name}: the row at byte {begin} should have its cells separated by "
                f"{delimiter!r} and its quotes closed: {error}"
            ) from error


def _plain(cell: str) -> Any:
    """A cell's value: what is written as JSON writes numbers is one, what is empty is nothing."""
    if _JSON_NUMBER.fullmatch(cell) and len(cell) < 300 and math.isfinite(float(cell)):
        return json.loads(cell)
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") or None


def csv_table(store: Store, name: str, columns: Columns, files: Files, recipe: Recipe) -> Contents:
    """Count the rows of a CSV (or, by its name, a TSV) with a header, whose image column holds paths.

    Raises:
        UserError: a column is not there.
        DataError: there is no such file, no row, or a quote is never closed.
    """
    info = look_up(store, name)
    delimiter = "\t" if name.lower().endswith((".tsv", ".tab")) else ","
    rows = _csv_rows(store, info, delimiter, 0)
    _, header = next(rows, (0, []))
    columns.check(header, name)
    marks, count, digest = array("q"), 0, hashlib.blake2b(_text(header), digest_size=8)
    for start, cells in rows:
        if count % _ROWS_A_MARK == 0:
            marks.append(start)
        count += 1
        digest.update(_text([*cells, "\n"]))
    if not count:
        raise DataError(f"source {store.url}/{name} has no row below its header")
    return recipe.contents(
        "csv",
        count,
        _CsvReader(store, info, delimiter, header, marks, columns, files, recipe.images),
        origin=f"{store.url}/{name}",
        fingerprint=digest.hexdigest(),
        arguments=columns.arguments,
    )


def _text(cells: list[str]) -> bytes:
    return "\x1f".join(cells).encode("utf-8", "surrogateescape")
