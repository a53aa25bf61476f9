"""Tables as people have them: no row is merged or cut, what is left out is counted, unused columns decide nothing."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tar_samples import jpeg

from data.packing.csv_table import csv_table
from data.packing.parquet_table import parquet_table
from data.packing.spec import PackOptions, Sample, Skipped
from data.packing.table import Columns, Files
from data.store import open_store
from launch.pack import main


def read(folder: Path, content: bytes | str, *columns: str, name: str = "t.csv") -> tuple[list[str], list[str], str]:
    """The captions of a table's rows and the reasons of those left out, in their order, and what dataset.json says."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for n in range(9):
        (folder / f"{n}.jpg").write_bytes(jpeg(n))
    store, said = open_store(str(folder)), list[str]()
    contents = csv_table(
        store, name, Columns(*(columns or ("path", "caption"))), Files(store), PackOptions(), said.append
    )
    rows = list(contents.read(contents.splits["train"]))
    captions = [row.members["txt"].decode() for row in rows if isinstance(row, Sample)]
    for row in rows:
        if isinstance(row, Sample):  # each beside its own image
            assert row.members["jpg"] == jpeg(int(row.key.rpartition("-")[2]))
    assert len(said) == ("0 lines that continue" not in contents.about["lines"])
    return captions, [row.reason for row in rows if isinstance(row, Skipped)], contents.about["lines"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"

UNQUOTED = [
    "a dog",
    '"Hello summer sign on a wall',
    "a cat",
    'a 12" record',
    "a car",
    '"Stop" sign, red',
    '"Go"',
    'bye"',
]


@pytest.mark.parametrize("caption_first", [False, True])
def test_a_tsv_of_captions_is_not_quoted(caption_first: bool, tmp_path: Path) -> None:
    rows = [("path", "caption"), *((f"{n}.jpg", caption) for n, caption in enumerate(UNQUOTED))]
    text = "".join("\t".join(row[::-1] if caption_first else row) + "\n" for row in rows)
    assert read(tmp_path, text, name="t.tsv")[:2] == (UNQUOTED, [])
    assert read(tmp_path, text)[:2] == (UNQUOTED, [])  # whatever its name
    # Another mistake between two stray quotes changes none of its neighbours.
    spoiled = text.replace("a cat", "a\tcat")
    assert read(tmp_path, spoiled)[:2] == ([*UNQUOTED[:2], *UNQUOTED[3:]], ["wrong_cell_count"])


@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_writers_quote_is_read_as_it_was(delimiter: str, quoting: Any, end: str, tmp_path: Path) -> None:
    captions = ["a dog", f'a "big"{delimiter} {end}{end}brown dog', 'a 12" record', "a\u2028b\x0cc\x85d", "ä", '"']
    for header in (["path", "caption"], ["caption", "path"], ["id", "path", "caption", "n"]):
        file = io.StringIO()
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
        writer.writerow(header)
        for n, caption in enumerate(captions):
            writer.writerow({"path": f"{n}.jpg", "caption": caption}.get(name, n) for name in header)
        content = file.getvalue()
        for text in (content, "\ufeff" + content, content.rstrip("\r\n"), f"{end}{content}{end}{end}"):
            assert read(tmp_path, text)[:2] == (captions, [])


@pytest.mark.parametrize(
    "lines, captions, left_out",
    [
        (["0.jpg,a red, shiny car", "1.jpg,a dog"], ["a dog"], ["wrong_cell_count"]),
        (["0.jpg", "1.jpg,a dog", "2.jpg,a,"], ["a dog"], ["wrong_cell_count"] * 2),
        # An image's path begins a row, whatever its extension.
        (["0.jpg,good caption", "x.png", "1.jpg,b"], ["good caption", "b"], ["wrong_cell_count"]),
        (['0.jpg,"open', "x.PNG,a", '1.jpg,b"'], ['b"'], ["bad_quotes", "missing_file"]),
        # A stray quote costs its own row alone, wherever the next quote is.
        (['0.jpg,"Hello', "1.jpg,a dog", "2.jpg,a cat"], ["a dog", "a cat"], ["bad_quotes"]),
        (['0.jpg,"Hello', "1.jpg,a dog", '2.jpg,bye"'], ["a dog", 'bye"'], ["bad_quotes"]),
        (['0.jpg,"Hello', '1.jpg,"a, dog"', "2.jpg,a cat"], ["a, dog", "a cat"], ["bad_quotes"]),
        (['0.jpg,"Hello', '1.jpg,""', "2.jpg,a cat"], ["a cat"], ["bad_quotes", "missing_caption"]),
        (['0.jpg,"Hello, world', "1.jpg", '1.jpg,bye"'], ['bye"'], ["bad_quotes", "wrong_cell_count"]),
        (['0.jpg,"Stop" sign', '1.jpg,a 12" record'], ['a 12" record'], ["bad_quotes"]),
        (['0.jpg,"two', 'lines, one "" comma"', "1.jpg,a dog"], ['two\nlines, one " comma', "a dog"], []),
        # What a backslash escapes is no caption that anybody wrote.
        (['0.jpg,"a \\"STOP\\" sign, red"', "1.jpg,a dog"], ["a dog"], ["bad_quotes"]),
        (['0.jpg,"a sign \\"STOP\\", red"', "1.jpg,a dog"], ["a dog"], ["bad_quotes"]),
        (['0.jpg,"STOP \\"', '1.jpg,a \\"big\\" dog', "2.jpg,a dog\\", "3.jpg,ok"], ["ok"], ["bad_quotes"] * 3),
        (["0.jpg,\\N", "1.jpg,a\0dog", "2.jpg,a cat"], ["a cat"], ["missing_caption", "bad_caption"]),
    ],
)
def test_a_bad_row_costs_itself_alone(
    lines: list[str], captions: list[str], left_out: list[str], tmp_path: Path
) -> None:
    text = "".join(f"{line}\n" for line in ["path,caption", *lines])
    found, reasons, said = read(tmp_path, text)
    assert (found, sorted(reasons)) == (captions, sorted(left_out))
    assert said.startswith(f"{len(lines)} lines below the header: {len(captions) + len(left_out)} rows, ")


def test_escapes_in_a_tsv_are_left_out_too(tmp_path: Path) -> None:
    text = 'path\tcaption\n0.jpg\t"a \\"STOP\\" sign"\n1.jpg\ta dog\\\nand a cat\n2.jpg\ta\\\tb\n3.jpg\tfine\n'
    assert read(tmp_path, text)[:2] == (["fine"], ["bad_quotes"] + ["wrong_cell_count"] * 2)


@pytest.mark.parametrize("delimiter", ["\t", ","])
@pytest.mark.parametrize("caption_first", [False, True])
def test_a_caption_with_a_newline_outside_of_quotes_is_not_cut(
    delimiter: str, caption_first: bool, tmp_path: Path
) -> None:
    captions = ["a dog", "a cat\nand a mouse", "a car", "two\n\nor\nthree", "a boat", "six", "and\nthe end"]
    rows = [["path", "caption"], *([f"{n}.jpg", caption] for n, caption in enumerate(captions))]
    text = "".join(delimiter.join(row[::-1] if caption_first else row) + "\n" for row in rows)
    assert read(tmp_path, text)[:2] == (["a dog", "a car", "a boat", "six"], ["wrong_cell_count"] * 3)
    # A row that ends early is one of its own.
    assert read(tmp_path, "path,caption\n0.jpg,a\n1.jpg\n2.jpg,b\n")[:2] == (["a", "b"], ["wrong_cell_count"])


def test_every_line_is_accounted_for(tmp_path: Path) -> None:
    text = 'path,caption\n\n0.jpg,a dog\n   \n1.jpg,"a\n\ncat"\n2.jpg\n3.jpg,"open\n\n'
    found, reasons, said = read(tmp_path, text)
    assert found == ["a dog", "a\n\ncat"] and sorted(reasons) == ["bad_quotes", "wrong_cell_count"]
    assert said == "9 lines below the header: 4 rows, 2 lines that continue one, 3 blank lines"


def test_cells_are_as_long_as_they_are(tmp_path: Path) -> None:
    long = "x" * 200_000
    text = f'path,caption,html\n0.jpg,a,{long}\n1.jpg,"b, c","{long}\n{long}"\n2.jpg,{long},\n'
    assert read(tmp_path, text)[:2] == (["a", "b, c", long], [])


def test_headers_as_tools_write_them(tmp_path: Path) -> None:
    assert read(tmp_path, 'path, caption\n0.jpg, "a, dog"\n1.jpg, a cat\n')[:2] == (["a, dog", "a cat"], [])
    assert read(tmp_path, ",path,caption,n,n\n7,0.jpg,a,1,2\n")[:2] == (["a"], [])
    assert read(tmp_path, '"path";"text.en"\n"0.jpg";"a, b"\n', "path", "text.en")[:2] == (["a, b"], [])
    assert main(["csv", str(tmp_path / "t.csv"), "--out", str(tmp_path / "o"), "--caption_column", "text.en"]) == 0
    (tmp_path / "n.csv").write_text(",path,caption,n,n,score\n7,0.jpg,a,1,2,3\n")
    store = open_store(str(tmp_path))
    contents = csv_table(store, "n.csv", Columns("path", "caption"), Files(store), PackOptions())
    (row,) = contents.read(contents.splits["train"])
    assert isinstance(row, Sample) and json.loads(row.members["json"]) == {"score": 3}


@pytest.mark.parametrize(
    "content, said",
    [
        ("path,caption\n0.jpg,a\n".encode("utf-16"), "is UTF-16"),
        ("path,caption\n0.jpg,a\n".encode("utf-16-le"), "a header, as UTF-8 text"),
        (b"\x1f\x8b\x08\x00", "gzip-compressed: gunzip it first"),
        (POINTER, "a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (b"PK\x03\x04", "a ZIP archive or an Excel workbook"),
        (b"PAR1", "is Parquet"),
        (b"", "a header"),
        (b"\n \n", "a header"),
        (b"path,caption\n", "no row below its header"),
        (b"path,caption,caption\n0.jpg,a,b\n", "one column of that name, not several"),
        (b'{"file_name": "' + b"x" * 200_000 + b'"}', "image_column is 'path'"),
        (b"path;text\n0.jpg;a\n", "it should be a column of t.csv: path, text\n"),
    ],
)
def test_what_is_no_table_is_refused_in_one_sentence(content: bytes, said: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    assert main(["csv", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_process_begins_anywhere_and_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.packing.csv_table._ROWS_A_MARK", 7)
    kinds = ["plain", '"open', '"a\nb"', "a, b", 'ä 12" x', '"q ""r"""', '"s" t', "", "u"]
    lines = [f"{n % 9}.jpg,{kinds[n * n % 9]}\n" for n in range(200)]
    (tmp_path / "t.csv").write_text("\ufeffpath,caption\n" + "".join(lines))
    for n in range(9):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg(n))
    store = open_store(str(tmp_path))
    contents = csv_table(store, "t.csv", Columns("path", "caption"), Files(store), PackOptions(), lambda _: None)
    rows = contents.splits["train"]
    whole = list(contents.read(rows))
    assert len(whole) == len(rows) and {type(row) for row in whole} == {Sample, Skipped}
    for start in range(0, len(rows), 13):
        assert list(contents.read(rows[start : start + 5])) == whole[start : start + 5]
    for n, row in enumerate(whole):
        if isinstance(row, Skipped):  # names its line
            line = lines[int(row.row.split()[1].rstrip(":")) - 2]
            assert line.partition(",")[2].startswith(('"open', '"s" t', "a, b", "\n")), (n, row)


# --- Parquet ---


def rows_of(folder: Path, table: pa.Table, *columns: str, **options: Any) -> list[Sample | Skipped]:
    pq.write_table(table, folder / "a.parquet", **options)
    store = open_store(str(folder))
    columns = columns or ("image", "caption")
    contents = parquet_table(store, ["a.parquet"], Columns(*columns), Files(store), PackOptions())
    return list(contents.read(contents.splits["train"]))


def raw_text(*values: bytes) -> pa.Array:
    """Text that is not checked."""
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
    return pa.Array.from_buffers(
        pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    )


def test_other_columns_of_a_parquet_file_decide_nothing(tmp_path: Path) -> None:
    odd = {
        "zone": pa.array([1, None], pa.timestamp("ms", tz="Mars/Olympus_Mons")),
        "text": raw_text(b"caf\xe9", b"fine"),
        "half": pa.array([0.5, float("inf")], pa.float16()),
        "day": pa.array([10**6, None], pa.date32()).dictionary_encode(),
        "word": pa.array(["a", None]).dictionary_encode(),
        "big": pa.array([2**64 - 1, 0], pa.uint64()),
        "span": pa.array([1, 2], pa.duration("s")),
        "list": [[1], [2]],
        "a.b": [1, 2],
    }
    images = pa.array([jpeg(0), jpeg(1)])
    found = rows_of(tmp_path, pa.table({"image": images, "caption": ["a", "b"], **odd}))
    assert [isinstance(row, Sample) and row.members["txt"] for row in found] == [b"a", b"b"]
    values = [json.loads(row.members["json"]) for row in found if isinstance(row, Sample)]
    day = values[0].pop("day")
    assert day is None or day.startswith("4707-11-")
    assert values[1].pop("day") is None
    zone = "1970-01-01 00:00:00.001Z"
    assert values[0] == {"zone": zone, "text": "caf\ufffd", "half": 0.5, "word": "a", "big": 2**64 - 1, "a.b": 1}
    assert values[1] == {"zone": None, "text": "fine", "half": None, "word": None, "big": 0, "a.b": 2}


def test_a_corrupt_column_that_is_not_used_is_null(tmp_path: Path) -> None:
    table = pa.table({"image": [jpeg(n) for n in range(9)], "caption": [str(n) for n in range(9)], "score": range(9)})
    rows_of(tmp_path, table, row_group_size=3, use_dictionary=False, compression="none")
    path = tmp_path / "a.parquet"
    at = pq.ParquetFile(path).metadata.row_group(1).column(2).data_page_offset
    content = bytearray(path.read_bytes())
    content[at : at + 8] = b"\xff" * 8
    path.write_bytes(content)
    store = open_store(str(tmp_path))
    contents = parquet_table(store, ["a.parquet"], Columns("image", "caption"), Files(store), PackOptions())
    found = [row.members for row in contents.read(contents.splits["train"]) if isinstance(row, Sample)]
    assert [members["txt"] for members in found] == [b"%d" % n for n in range(9)]
    assert [members["jpg"] for members in found] == [jpeg(n) for n in range(9)]
    assert [json.loads(members["json"])["score"] for members in found] == [0, 1, 2, None, None, None, 6, 7, 8]


def test_used_columns_fail_alone_and_say_why(tmp_path: Path) -> None:
    captions = raw_text(b"a", b"caf\xe9", b"c", b"d\0")
    found = rows_of(tmp_path, pa.table({"image": [jpeg(0)] * 4, "caption": captions}))
    assert [row.reason if isinstance(row, Skipped) else row.key for row in found] == [
        "000000000",
        "bad_caption",
        "000000002",
        "bad_caption",
    ]
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    paths = raw_text(b"1.jpg", b"\xff.jpg")
    found = rows_of(tmp_path, pa.table({"image": paths, "caption": ["a", "b"]}))
    assert [row.reason if isinstance(row, Skipped) else row.key for row in found] == ["000000000-1", "missing_file"]
    # Beside an image's bytes its path is but a name.
    structs = pa.StructArray.from_arrays([pa.array([jpeg(0), jpeg(1)]), paths], ["bytes", "path"])
    found = rows_of(tmp_path, pa.table({"image": structs, "caption": ["a", "b"]}))
    assert [row.members["jpg"] for row in found if isinstance(row, Sample)] == [jpeg(0), jpeg(1)]


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.parquet").write_bytes(POINTER)
    assert main(["parquet", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]) == 2
    assert "should be a Parquet file: it is a Git LFS pointer" in capsys.readouterr().err
    (row,) = rows_of(tmp_path, pa.table({"image": [POINTER], "caption": ["a"]}))
    assert isinstance(row, Skipped) and row.reason == "other_format" and "a Git LFS pointer" in row.row


def test_double_and_dotted_names_in_parquet(tmp_path: Path, capsys: Any) -> None:
    images, captions = pa.array([jpeg(0), jpeg(1)]), pa.array(["a", "b"])
    twice = pa.Table.from_arrays([images, captions, captions, captions], ["image", "caption", "id", "id"])
    assert [row.members["txt"] for row in rows_of(tmp_path, twice) if isinstance(row, Sample)] == [b"a", b"b"]
    dotted = pa.Table.from_arrays([images, captions, captions], ["image.bytes", "text.en", "image"])
    found = rows_of(tmp_path, dotted, "image.bytes", "text.en")
    assert [dict(row.members) for row in found if isinstance(row, Sample)] == [
        {"jpg": jpeg(n), "txt": text, "json": b'{"image": "%s"}' % text} for n, text in enumerate([b"a", b"b"])
    ]
    pq.write_table(
        pa.Table.from_arrays([images, captions, captions], ["image", "caption", "caption"]), tmp_path / "d.parquet"
    )
    assert main(["parquet", str(tmp_path / "d.parquet"), "--out", str(tmp_path / "out")]) == 2
    assert "caption_column is 'caption': d.parquet should have one column of that name" in capsys.readouterr().err
