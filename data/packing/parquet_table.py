"""Packing the rows of Parquet files whose image column holds bytes, paths, or structs of both (Hugging Face's form).

Counting rows reads only the footer of each file. A process reads the row groups that its shards touch, page by page,
since a row group may be as large as the file. (pyarrow's writer puts 1,024 images into a page by default.)
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import DataError, UserError
from data.listing import kind_of
from data.packing.spec import DatasetSpec, ImageEncoder, PackOptions, Sample, Skipped, fingerprint, prefetch
from data.packing.table import Columns, Files, ObjectFile, Row, beginning, look_up, once, row_sample
from data.store import ObjectInfo, Store

_THREADS = 8
_ROWS_A_BATCH = 64
_BUFFER = 1 << 20
"""Bytes read at a time, unless the store's readahead is larger."""


@dataclass(frozen=True)
class _ParquetReader:
    store: Store
    infos: list[ObjectInfo]
    ends: list[int]
    """Number of rows up to the end of each file."""
    columns: Columns
    files: Files
    encoder: ImageEncoder

    def __call__(self, items: Sequence[int]) -> Iterator[Sample | Skipped]:
        return prefetch(lambda row: row_sample(row, self.files, self.encoder), self._rows(items))

    def _rows(self, items: Sequence[int]) -> Iterator[Row | Skipped]:
        place = 0
        while place < len(items):
            file = bisect_right(self.ends, items[place])
            first = self.ends[file - 1] if file else 0
            stop = bisect_left(items, self.ends[file])
            yield from self._rows_of(self.infos[file], first, items[place:stop])
            place = stop

    def _rows_of(self, info: ObjectInfo, first: int, items: Sequence[int]) -> Iterator[Row | Skipped]:
        with _open_parquet(self.store, info) as table:
            groups = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
            others = _scalars(table.schema_arrow, self.columns)
            for group, (begin, end) in enumerate(pairwise(accumulate(groups, initial=first))):
                start, stop = bisect_left(items, begin), bisect_left(items, end)
                if start < stop:
                    yield from self._rows_of_group(table, group, others, info.name, begin, first, items[start:stop])

    def _rows_of_group(
        self,
        table: pq.ParquetFile,
        group: int,
        others: list[str],
        file: str,
        begin: int,
        first: int,
        items: Sequence[int],
    ) -> Iterator[Row | Skipped]:
        """Rows `items` of a row group that begins at row `begin`, in a file that begins at row `first`."""
        given, words = 0, "the row group ends before it"
        # If other columns cannot be read, the remaining rows are read without them.
        for values in [others, []] if others else [[]]:
            at, names = begin, [self.columns.image, self.columns.caption, *values]
            try:
                for batch in table.iter_batches(_ROWS_A_BATCH, [group], names, use_threads=False):
                    while given < len(items) and items[given] < at + len(batch):
                        number = items[given]
                        yield self._row(batch, number - at, number, file, f"{file} row {number - first}", others)
                        given += 1
                    at += len(batch)
                    if given == len(items):
                        return
            except (pa.ArrowException, OSError) as fault:
                words = " ".join(str(fault).split())[:200]
        for number in items[given:]:
            yield Skipped(f"{file} row {number - first}: {words}", "corrupt_parquet")

    def _row(
        self, batch: pa.RecordBatch, n: int, number: int, file: str, where: str, others: list[str]
    ) -> Row | Skipped:
        there = set(batch.schema.names)
        values = {name: _json_value(batch.column(name)[n]) if name in there else None for name in others}
        image, path, content = batch.column(self.columns.image)[n], None, None
        if isinstance(image, pa.StructScalar):
            fields = image.type.names if image.is_valid else []
            path = _text(image["path"]) if "path" in fields else None
            content = image["bytes"].as_py() if "bytes" in fields else None
        elif _is_text(image.type):
            path = _text(image)
        else:
            content = image.as_py()
        try:
            caption = batch.column(self.columns.caption)[n].as_py()
        except UnicodeDecodeError as error:
            return Skipped(f"{where}: {error}", "bad_caption")
        return Row(number, file, where, caption, path, content, values)


def _open_parquet(store: Store, info: ObjectInfo) -> pq.ParquetFile:
    """Open a file, and check that it is Parquet with a consistent number of rows."""
    try:
        # pre_buffer=False and a buffer make it decode page by page: a row group may be as large as the file.
        buffer = max(_BUFFER, store.readahead)
        file = pa.PythonFile(ObjectFile(store, info), mode="r")
        table = pq.ParquetFile(file, pre_buffer=False, buffer_size=buffer)
        _ = table.schema_arrow  # raises on a type that Arrow does not know
    except (pa.ArrowException, OSError) as fault:
        kind = None if (head := beginning(store, info)).startswith(b"PAR1") else kind_of(head)
        words = f"it is {kind}" if kind else " ".join(str(fault).split())
        raise DataError(f"source {store.url}/{info.name} should be a Parquet file: {words}") from fault
    rows, groups = table.metadata.num_rows, [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
    if rows != sum(groups):
        raise DataError(
            f"source {store.url}/{info.name} should have as many rows as its row groups: it says {rows:,}, "
            f"and they have {sum(groups):,}"
        )
    return table


def _scalars(schema: pa.Schema, columns: Columns) -> list[str]:
    used = (columns.image, columns.caption)
    return [name for name in once(schema.names) if name not in used and _is_scalar(schema.field(name).type)]


def _is_scalar(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_time = pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_time(kind)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return is_time or is_number or pa.types.is_boolean(kind) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _text(scalar: pa.Scalar) -> str | None:
    """The text; bytes that are not UTF-8 are replaced."""
    scalar = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
    return scalar.as_buffer().to_pybytes().decode("utf-8", "replace") if scalar.is_valid else None


def _json_value(scalar: pa.Scalar) -> Any:
    """A value in JSON's types, times in UTC; None if it is null or cannot be converted."""
    scalar = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
    if not scalar.is_valid:
        return None
    kind = scalar.type
    if _is_text(kind):
        return _text(scalar)
    try:
        if pa.types.is_timestamp(kind) and kind.tz:  # the zone's name may be unknown here
            return f"{scalar.cast(pa.timestamp(kind.unit)).cast(pa.string()).as_py()}Z"
        if pa.types.is_temporal(kind):
            return scalar.cast(pa.string()).as_py()  # Python's own times have no nanoseconds
        value = scalar.as_py()
        if isinstance(value, Decimal):
            value = float(value)
    except (pa.ArrowException, ValueError, OverflowError):
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_types(schema: pa.Schema, columns: Columns, where: str) -> None:
    columns.check(schema.names, where)
    image, caption = schema.field(columns.image).type, schema.field(columns.caption).type
    fields = {field.name: field.type for field in image} if pa.types.is_struct(image) else {}
    in_struct = _is_binary(fields.get("bytes", pa.null())) or _is_text(fields.get("path", pa.null()))
    if not (_is_binary(image) or _is_text(image) or in_struct):
        should_be = "a column of bytes, of paths, or of structs of bytes and path"
        raise UserError(f"image_column is {columns.image!r} ({image} in {where}): it should be {should_be}")
    if not _is_text(caption):
        raise UserError(f"caption_column is {columns.caption!r} ({caption} in {where}): it should be a column of text")


def parquet_table(
    store: Store,
    names: Sequence[str],
    columns: Columns,
    files: Files,
    pack_options: PackOptions,
) -> DatasetSpec:
    """Describe Parquet files whose image column holds bytes, paths, or structs of both, after counting their rows.

    Raises:
        UserError: a column is missing or of another type.
        DataError: there is no file or no row, or a file is not Parquet.
    """

    def count(name: str) -> tuple[ObjectInfo, int]:
        info = look_up(store, name)
        with _open_parquet(store, info) as table:
            _check_types(table.schema_arrow, columns, name)
            return info, table.metadata.num_rows

    with ThreadPoolExecutor(_THREADS) as pool:
        counted = list(pool.map(count, sorted(names)))
    ends = list(accumulate(rows for _, rows in counted))
    if not counted or not ends[-1]:
        raise DataError(f"source {store.url} should hold Parquet files with rows")
    return pack_options.dataset_spec(
        "parquet",
        ends[-1],
        _ParquetReader(store, [info for info, _ in counted], ends, columns, files, pack_options),
        origin=store.url,
        fingerprint=fingerprint((info.name, info.size, info.version, rows) for info, rows in counted),
        arguments=columns.arguments,
    )
