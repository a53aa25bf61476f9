"""Packing the rows of a CSV or TSV file with a header, whose image column holds paths.

- The delimiter is the one of tab, comma, semicolon and bar that finds both columns in the header.
- Cells are quoted as in RFC 4180. In a TSV quotes belong to the text, as captions are published, unless the header is
  quoted or a row's quotes enclose what no plain cell can hold: a tab, a newline, a doubled quote.
- A row has as many cells as the header; another one is skipped ("wrong_cell_count"). So is a row whose quotes are not
  closed, not doubled inside a cell, or enclose another row ("bad_quotes"). The next row begins on the next line, so a
  stray quote costs one row. If the caption is the first or last cell, a line with too few cells may be part of a
  caption, so the row beside it is skipped too. No caption is ever cut or merged.
- Rows are counted once, front to back, noting where every thousandth row begins; a process starts reading at the
  nearest one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from data.errors import DataError
from data.listing import is_image, kind_of
from data.packing.spec import DatasetSpec, ImageEncoder, PackOptions, Sample, Skipped, prefetch
from data.packing.table import Columns, Files, ObjectFile, Row, beginning, look_up, once, row_sample
from data.store import ObjectInfo, Store, changed

_ROWS_A_MARK = 1000
_BUFFER = 1 << 20
"""Bytes read at a time, unless the store's readahead is larger."""
_LONGEST = 32 << 20
"""Maximum of a line in characters, and of a row in bytes."""
csv.field_size_limit(2 * _LONGEST)  # for the whole process; 131,072 by default
_DELIMITERS = "\t,;|"
_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_NULL = "\\N"
"""How MySQL, Hive and PostgreSQL write NULL."""
_NEWLINE = ("wrong_cell_count", "its caption seems to have a newline outside of quotes")


class _Line(NamedTuple):
    """A line: its first byte in the file, its number from 1, and its text with LF, CRLF or CR."""

    start: int
    number: int
    text: str


class _Lines(Iterator[_Line]):
    """Lines of a file from byte `start` on; `give_back` makes lines come again."""

    def __init__(self, store: Store, info: ObjectInfo, start: int = 0, number: int = 1) -> None:
        buffered = io.BufferedReader(ObjectFile(store, info), max(_BUFFER, store.readahead))
        buffered.seek(start)
        self._file = io.TextIOWrapper(buffered, "utf-8", "surrogateescape", newline="")
        self._where, self._start, self.number = f"{store.url}/{info.name}", start, number
        self._returned: list[_Line] = []  # the next one last

    def __next__(self) -> _Line:
        if self._returned:
            return self._returned.pop()
        text = self._file.readline(_LONGEST)
        if not text:
            raise StopIteration
        if len(text) == _LONGEST:
            raise DataError(f"source {self._where}: line {self.number} is longer than {_LONGEST >> 20} MiB")
        line = _Line(self._start, self.number, text.removeprefix("" if self._start else "\ufeff"))
        self._start += len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))
        self.number += 1
        return line

    def give_back(self, lines: Sequence[_Line]) -> None:
        self._returned.extend(reversed(lines))


class _Cells(NamedTuple):
    """One row of the file: its first line, its number of lines, and why it is skipped, if it is."""

    line: _Line
    lines: int
    cells: list[str]
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class _Dialect:
    """How a file's lines make rows.

    Attributes:
        quoted: quotes around a cell are no part of it; if False, only where they enclose what no plain cell can hold.
        spaced: spaces before a cell are no part of it, since the header has them.
        image, caption: indices of the two cells.
    """

    header: list[str]
    delimiter: str
    quoted: bool
    spaced: bool
    image: int
    caption: int

    def rows(self, lines: _Lines) -> Iterator[_Cells]:
        """The rows; blank lines are skipped."""
        for line in lines:
            if not line.text.strip(" \r\n"):
                continue
            row = self._row(line, lines)
            width, last = len(self.header), len(self.header) - 1
            if self.caption == last and not row.reason and row.cells[self.image]:
                rest = self._skip_fragments(lines, row.cells[self.image])
                yield _Cells(line, row.lines + rest, row.cells, *_NEWLINE) if rest else row
            elif self.caption == 0 and row.reason == "wrong_cell_count" and len(row.cells) < width:
                rest = self._skip_fragments(lines)
                end = next(lines, None)
                if end and len(self._split(end.text)) == width and not (self.quoted and '"' in end.text):
                    rest += 1
                elif end:
                    lines.give_back([end])
                yield _Cells(line, 1 + rest, row.cells, *_NEWLINE)
            else:
                yield row

    def _skip_fragments(self, lines: _Lines, path: str = "") -> int:
        """Read past lines with too few cells that name no image; returns how many, not counting blank ones.

        A cell names an image if its extension is an image's or that of `path`.
        """
        count = 0
        for line in lines:
            is_short = line.text.count(self.delimiter) < len(self.header) - 1
            cells = self._split(line.text) if is_short and not (self.quoted and '"' in line.text) else []
            named = cells[min(self.image, len(cells) - 1)] if cells else ""
            if not cells or is_image(named) or (_suffix(path) and _suffix(path) == _suffix(named)):
                lines.give_back([line])
                break
            count += bool(line.text.strip())
        return count

    def _row(self, line: _Line, lines: _Lines) -> _Cells:
        plain = self._split(line.text)
        if '"' not in line.text:
            return self._counted(line, plain)
        cells, taken = self._unquoted(line, lines)
        quoted = self.quoted or len(taken) > 1 or len(plain) != len(cells or plain) or '""' in line.text
        if quoted and cells and len(cells) == len(self.header) and not self._merges(cells, taken):
            return _Cells(line, len(taken), cells)
        lines.give_back(taken[1:])
        if not self.quoted:
            return self._counted(line, plain)
        if cells is not None and len(taken) == 1:
            return self._counted(line, cells)
        detail = "its quotes are not closed, not doubled inside a cell, or enclose another row"
        return _Cells(line, 1, plain, "bad_quotes", detail)

    def _split(self, text: str) -> list[str]:
        cells = text.rstrip("\r\n").split(self.delimiter)
        return [cell.lstrip(" ") for cell in cells] if self.spaced else cells

    def _counted(self, line: _Line, cells: list[str]) -> _Cells:
        if len(cells) == len(self.header):
            return _Cells(line, 1, cells)
        detail = f"it has {len(cells)} cells, and the header has {len(self.header)}"
        return _Cells(line, 1, cells, "wrong_cell_count", detail)

    def _unquoted(self, line: _Line, lines: _Lines) -> tuple[list[str] | None, list[_Line]]:
        """The cells of the row that begins on a line (None if its quotes are wrong), and the lines that were read."""
        taken = [line]

        def texts() -> Iterator[str]:
            yield line.text
            for more in lines:
                taken.append(more)
                if more.start - line.start > _LONGEST:
                    return
                yield more.text

        reader = csv.reader(texts(), delimiter=self.delimiter, strict=True, skipinitialspace=self.spaced)
        try:
            return next(reader), taken
        except csv.Error:
            return None, taken

    def _merges(self, cells: list[str], taken: list[_Line]) -> bool:
        """Whether a row of several lines contains a line that is a row by itself, since it names another image."""
        if len(taken) == 1:
            return False
        path = cells[self.image]
        others = [split[self.image] for line in taken if len(split := self._split(line.text)) == len(self.header)]
        return any(other != path and (is_image(other) or _suffix(other) == _suffix(path)) for other in others)


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1]


@dataclass(frozen=True)
class _CsvReader:
    store: Store
    info: ObjectInfo
    dialect: _Dialect
    marks: list[tuple[int, int]]
    """Byte and line number at which rows 0, 1000, 2000, ... begin."""
    columns: Columns
    files: Files
    encoder: ImageEncoder

    def __call__(self, items: Sequence[int]) -> Iterator[Sample | Skipped]:
        return prefetch(lambda row: row_sample(row, self.files, self.encoder), self._rows(items))

    def _rows(self, items: Sequence[int]) -> Iterator[Row | Skipped]:
        rows: Iterator[_Cells] = iter(())
        at = -1  # number of the next row of `rows`
        for number in items:
            mark = number // _ROWS_A_MARK
            if at < 0 or mark * _ROWS_A_MARK > at:
                rows = self.dialect.rows(_Lines(self.store, self.info, *self.marks[mark]))
                at = mark * _ROWS_A_MARK
            row = next(islice(rows, number - at, None), None)
            if row is None:
                raise changed(self.store.url, self.info.name)
            at = number + 1
            yield self._convert(number, row)

    def _convert(self, number: int, row: _Cells) -> Row | Skipped:
        where = f"line {row.line.number}"
        if row.reason:
            return Skipped(f"{where}: {row.detail}", row.reason)
        cells = dict(zip(self.dialect.header, row.cells, strict=True))
        path, caption = cells.pop(self.columns.image), cells.pop(self.columns.caption)
        where = f"{where} ({path})"
        if any('\\"' in cell or cell.endswith("\\") for cell in (path, caption)):
            return Skipped(f"{where}: a backslash before a quote or a newline; RFC 4180 doubles quotes", "bad_quotes")
        values = {name: _plain(cells[name]) for name in once(self.dialect.header) if name in cells}
        return Row(number, self.info.name, where, None if caption == _NULL else caption, path, None, values)


def _plain(cell: str) -> Any:
    """A cell's value: a number if it is written as in JSON, None if it is empty, else its text."""
    if _JSON_NUMBER.fullmatch(cell) and len(cell) < 300 and math.isfinite(float(cell)):
        return json.loads(cell)
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") or None


def csv_table(
    store: Store,
    name: str,
    columns: Columns,
    files: Files,
    pack_options: PackOptions,
    notice: Callable[[str], None] = print,
) -> DatasetSpec:
    """Describe a CSV or TSV with a header, whose image column holds paths, after counting its rows.

    `notice` is called with the counts of lines and rows if some rows have several lines.

    Raises:
        UserError: a column is missing, or is there twice.
        DataError: the file is missing, has no row or a line of 32 MiB, or is not UTF-8 text.
    """
    info, where = look_up(store, name), f"{store.url}/{name}"
    if kind := kind_of(beginning(store, info)):
        raise DataError(f"source {where} should be CSV or TSV, as UTF-8 text, but is {kind}")
    lines = _Lines(store, info)
    head = next((line for line in lines if line.text.strip()), None)
    if head is None or "\0" in head.text:
        raise DataError(f"source {where} should begin with a header, as UTF-8 text")
    dialect = _find_dialect(head.text, columns, name)
    marks, count, longer = [], 0, 0
    digest = hashlib.blake2b(head.text.encode("utf-8", "surrogateescape"), digest_size=8)
    for row in dialect.rows(lines):
        if count % _ROWS_A_MARK == 0:
            marks.append((row.line.start, row.line.number))
        count += 1
        longer += row.lines - 1
        digest.update("\x1f".join([*row.cells, "\n"]).encode("utf-8", "surrogateescape"))
    if not count:
        raise DataError(f"source {where} has no row below its header")
    below = lines.number - 1 - head.number
    blank = below - count - longer
    counted = f"{below} lines below the header: {count} rows, {longer} lines that continue one, {blank} blank lines"
    if longer:
        notice(f"{where}: {counted}")
    spec = pack_options.dataset_spec(
        "csv",
        count,
        _CsvReader(store, info, dialect, marks, columns, files, pack_options),
        origin=where,
        fingerprint=digest.hexdigest(),
        arguments=columns.arguments,
    )
    return replace(spec, about={**spec.about, "lines": counted})


def _find_dialect(text: str, columns: Columns, name: str) -> _Dialect:
    heads = {delimiter: next(csv.reader([text], delimiter=delimiter)) for delimiter in _DELIMITERS}
    headers = {delimiter: [cell.strip() for cell in head] for delimiter, head in heads.items()}

    def fit(delimiter: str) -> tuple[int, int]:
        header = headers[delimiter]
        return (columns.image in header) + (columns.caption in header), len(header)

    delimiter = max(_DELIMITERS, key=fit)
    header = headers[delimiter]
    columns.check(header, name)
    spaced = any(cell.startswith(" ") for cell in heads[delimiter][1:])
    quoted = delimiter != "\t" or text.startswith('"')
    return _Dialect(header, delimiter, quoted, spaced, header.index(columns.image), header.index(columns.caption))
