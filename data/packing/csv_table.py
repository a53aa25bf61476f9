"""Packing the rows of a CSV or TSV file with a header, whose image column holds paths.

- The delimiter is the one of tab, comma, semicolon and bar that finds both columns in the header.
- Cells are quoted as RFC 4180 has it. In a TSV quotes belong to the text, as captions are published, unless its header
  is quoted, or a row's quotes hold what else could be in no cell: a tab, a newline, a doubled quote.
- A row has as many cells as the header. Another one is left out ("wrong_cell_count"); so is one whose quotes are not
  closed, or not doubled inside, or merge lines that are rows ("bad_quotes"). The next row begins on the next line: a
  stray quote costs one row. Where the caption is the first or the last cell, a line with too few cells may be a part of
  it: the row beside is left out with it. So no caption is cut or merged.
- Rows are counted once, from front to back, and every thousandth row's place is noted: a process begins to read at the
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
from data.packing.spec import DatasetSpec, Images, Skipped, PackOptions, Sample, ahead
from data.packing.table import Columns, Files, ObjectFile, Row, beginning, look_up, once, row_sample
from data.store import ObjectInfo, Store, changed

_ROWS_A_MARK = 1000
_BUFFER = 1 << 20
"""Bytes that are read at a time, or as many as another request costs."""
_LONGEST = 32 << 20
"""Characters of a line, and bytes of a row, in which a quote must be closed."""
csv.field_size_limit(2 * _LONGEST)  # the process's; 131,072 by default
_DELIMITERS = "\t,;|"
_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_NULL = "\\N"
"""How MySQL, Hive and PostgreSQL write that a cell has no value."""
_NEWLINE = ("wrong_cell_count", "a newline of its caption seems to be outside of quotes")


class _Line(NamedTuple):
    start: int
    """Its first byte in the file."""
    number: int
    """From 1."""
    text: str
    """With its end: LF, CRLF or CR."""


class _Lines(Iterator[_Line]):
    """The lines of a file from one on. Those that were given back come again."""

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
    """One row as it stands in the file: its first line, how many lines it has, and why it is left out, if it is."""

    line: _Line
    lines: int
    cells: list[str]
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class _Form:
    """How a file's lines are rows.

    Attributes:
        quoted: quotes at a cell's ends are no part of it; else only where they must be.
        spaced: so are spaces before a cell, since the header has them.
        image, caption: which of the cells they are.
    """

    header: list[str]
    delimiter: str
    quoted: bool
    spaced: bool
    image: int
    caption: int

    def rows(self, lines: _Lines) -> Iterator[_Cells]:
        """The rows, blank lines aside."""
        for line in lines:
            if not line.text.strip(" \r\n"):
                continue
            row = self._row(line, lines)
            width, last = len(self.header), len(self.header) - 1
            if self.caption == last and not row.reason and row.cells[self.image]:
                rest = self._short(lines, row.cells[self.image])
                yield _Cells(line, row.lines + rest, row.cells, *_NEWLINE) if rest else row
            elif self.caption == 0 and row.reason == "wrong_cell_count" and len(row.cells) < width:
                rest = self._short(lines)
                end = next(lines, None)
                if end and len(self._split(end.text)) == width and not (self.quoted and '"' in end.text):
                    rest += 1
                elif end:
                    lines.give_back([end])
                yield _Cells(line, 1 + rest, row.cells, *_NEWLINE)
            else:
                yield row

    def _short(self, lines: _Lines, path: str = "") -> int:
        """Read past lines with too few cells that name no image; how many, blank ones aside.

        An image is named by its extension, be it only this path's.
        """
        count = 0
        for line in lines:
            is_short = line.text.count(self.delimiter) < len(self.header) - 1
            cells = self._split(line.text) if is_short and not (self.quoted and '"' in line.text) else []
            named = cells[min(self.image, len(cells) - 1)] if cells else ""
            if not cells or is_image(named) or (_kind(path) and _kind(path) == _kind(named)):
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
        detail = "its quotes are not closed, or not doubled inside a cell, or take in another row"
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
        """The cells of the row that begins on a line, None if its quotes are wrong, and the lines that were read."""
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
        """Whether a row of several lines holds one that is a row by itself: it names another image."""
        if len(taken) == 1:
            return False
        path = cells[self.image]
        others = [split[self.image] for line in taken if len(split := self._split(line.text)) == len(self.header)]
        return any(other != path and (is_image(other) or _kind(other) == _kind(path)) for other in others)


def _kind(path: str) -> str:
    return posixpath.splitext(path)[1]


@dataclass(frozen=True)
class _CsvReader:
    store: Store
    info: ObjectInfo
    form: _Form
    marks: list[tuple[int, int]]
    """Where rows 0, 1000, 2000, ... begin: byte and line."""
    columns: Columns
    files: Files
    images: Images

    def __call__(self, items: Sequence[int]) -> Iterator[Sample | Skipped]:
        return ahead(lambda row: row_sample(row, self.files, self.images), self._rows(items))

    def _rows(self, items: Sequence[int]) -> Iterator[Row | Skipped]:
        rows: Iterator[_Cells] = iter(())
        at = -1  # the next row that `rows` gives
        for number in items:
            mark = number // _ROWS_A_MARK
            if at < 0 or mark * _ROWS_A_MARK > at:
                rows = self.form.rows(_Lines(self.store, self.info, *self.marks[mark]))
                at = mark * _ROWS_A_MARK
            row = next(islice(rows, number - at, None), None)
            if row is None:
                raise changed(self.store.url, self.info.name)
            at = number + 1
            yield self._made(number, row)

    def _made(self, number: int, row: _Cells) -> Row | Skipped:
        where = f"line {row.line.number}"
        if row.reason:
            return Skipped(f"{where}: {row.detail}", row.reason)
        cells = dict(zip(self.form.header, row.cells, strict=True))
        path, caption = cells.pop(self.columns.image), cells.pop(self.columns.caption)
        where = f"{where} ({path})"
        if any('\\"' in cell or cell.endswith("\\") for cell in (path, caption)):
            return Skipped(f"{where}: a backslash before a quote or a newline; RFC 4180 doubles quotes", "bad_quotes")
        values = {name: _plain(cells[name]) for name in once(self.form.header) if name in cells}
        return Row(number, self.info.name, where, None if caption == _NULL else caption, path, None, values)


def _plain(cell: str) -> Any:
    """A cell's value: what is written as JSON writes numbers is one, what is empty is nothing."""
    if _JSON_NUMBER.fullmatch(cell) and len(cell) < 300 and math.isfinite(float(cell)):
        return json.loads(cell)
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") or None


def csv_table(
    store: Store,
    name: str,
    columns: Columns,
    files: Files,
    recipe: PackOptions,
    notice: Callable[[str], None] = print,
) -> DatasetSpec:
    """Count the rows of a CSV or TSV with a header, whose image column holds paths.

    Args:
        notice: is told how many lines there are for how many rows, where some rows have several.

    Raises:
        UserError: a column is not there, or twice.
        DataError: there is no such file, or no row, or it is not UTF-8 text, or has a line of 32 MiB.
    """
    info, where = look_up(store, name), f"{store.url}/{name}"
    if kind := kind_of(beginning(store, info)):
        raise DataError(f"source {where} should be CSV or TSV, as UTF-8 text, but is {kind}")
    lines = _Lines(store, info)
    head = next((line for line in lines if line.text.strip()), None)
    if head is None or "\0" in head.text:
        raise DataError(f"source {where} should begin with a header, as UTF-8 text")
    form = _form(head.text, columns, name)
    marks, count, longer = [], 0, 0
    digest = hashlib.blake2b(head.text.encode("utf-8", "surrogateescape"), digest_size=8)
    for row in form.rows(lines):
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
    contents = recipe.contents(
        "csv",
        count,
        _CsvReader(store, info, form, marks, columns, files, recipe.images),
        origin=where,
        fingerprint=digest.hexdigest(),
        arguments=columns.arguments,
    )
    return replace(contents, about={**contents.about, "lines": counted})


def _form(text: str, columns: Columns, name: str) -> _Form:
    """How a file with this header is read.

    Raises:
        UserError: a column is not there, or twice.
    """
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
    return _Form(header, delimiter, quoted, spaced, header.index(columns.image), header.index(columns.caption))
