"""Questions to a judge that runs elsewhere, and what its file of answers may get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dpg_copy import write_copy

from data.errors import UserError
from evaluation.dpg.judge import read_answers, write_questions
from evaluation.dpg.rules import Benchmark, read

HASHES = {"table_sha256": "t", "grids_sha256": "g"}


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    return read(write_copy(tmp_path / "copy"))


@pytest.fixture
def lines(tmp_path: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    """The questions about two pictures each, at 16 px."""
    grids = {name: tmp_path / f"{name}.png" for name in ("cat1", "dog2")}
    path = tmp_path / "questions.jsonl"
    assert write_questions(path, HASHES, benchmark.items, grids, 16, 2) == 14
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(lines: list[dict[str, Any]], judge: str | None = "a judge") -> list[dict[str, Any]]:
    """Each with an answer that tells what it is to."""
    return [
        lines[0] | {"judge": judge},
        *({**line, "answer": f"{line['crop']} {line['question']}"} for line in lines[1:]),
    ]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_what_a_judge_is_told(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    assert lines[0] == {"judge": None, **HASHES}
    assert lines[1 + 8 + 3 + 1] == {
        "id": "dog2", "crop": 1, "proposition_id": 2, "image": str(tmp_path / "dog2.png"), "box": [16, 0, 32, 16],
        "question": "Is the dog on the left?",
    }  # fmt: skip


def test_answers_in_any_order_without_what_was_for_the_judge(
    tmp_path: Path, benchmark: Benchmark, lines: list[dict[str, Any]]
) -> None:
    head, *rest = answer(lines)
    short = [{name: line[name] for name in ("id", "crop", "proposition_id", "answer")} for line in reversed(rest)]
    judge, found = read_answers(write(tmp_path / "a.jsonl", [head, *short]), HASHES, benchmark.items, 2)
    assert judge == "a judge"
    assert found == {
        item.id: [{it.number: f"{crop} {it.text}" for it in item.questions} for crop in range(2)]
        for item in benchmark.items
    }


def test_odd_characters_end_no_line(tmp_path: Path, benchmark: Benchmark, lines: list[dict[str, Any]]) -> None:
    told = answer(lines)
    told[3]["answer"] = "no\u2028way"
    written = [json.dumps(line, ensure_ascii=False) for line in told]
    _, found = read_answers(write(tmp_path / "a.jsonl", written), HASHES, benchmark.items, 2)
    assert found["cat1"][0][3] == "no\u2028way"


def spoil(lines: list[Any], line: int, **fields: Any) -> list[Any]:
    return [it | fields if n == line else it for n, it in enumerate(lines, 1)]


@pytest.mark.parametrize(
    ("line", "fields", "message"),
    [
        (1, {"judge": None}, "line 1 must be the questions' first line with the judge's name as judge"),
        (1, {"judge": ""}, "line 1 must be the questions' first line"),
        (1, {"grids_sha256": "other"}, "grids_sha256 differs, so these answers are to other .*--write_questions"),
        (1, {"table_sha256": "other"}, "table_sha256 differs"),
        (4, {"answer": True}, 'line 4: answer must be a string, such as "yes"'),
        (4, {"crop": 2}, "line 4: nobody asked id 'cat1', crop 2, proposition_id 3"),
        (4, {"crop": False}, "line 4: nobody asked id 'cat1', crop False"),
        (4, {"id": ["cat1"]}, r"line 4: nobody asked id \['cat1'\]"),
        (4, {"proposition_id": "3"}, "line 4: nobody asked id 'cat1', crop 0, proposition_id '3'"),
        (4, {"proposition_id": 2}, "line 4 answers what line 3 does: keep one of them"),
    ],
)
def test_a_line_that_is_wrong(
    tmp_path: Path, benchmark: Benchmark, lines: list[dict[str, Any]], line: int, fields: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", spoil(answer(lines), line, **fields))
    with pytest.raises(UserError, match=message):
        read_answers(path, HASHES, benchmark.items, 2)


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 3 is not JSON"), ("[]", "line 3 must be an object"), ("", "line 3 is not JSON")]
)
def test_a_line_that_is_none(
    tmp_path: Path, benchmark: Benchmark, lines: list[dict[str, Any]], line: str, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", [*answer(lines)[:2], line, *answer(lines)[3:]])
    with pytest.raises(UserError, match=message):
        read_answers(path, HASHES, benchmark.items, 2)


def test_answers_are_lines_of_utf_8(tmp_path: Path, benchmark: Benchmark, lines: list[dict[str, Any]]) -> None:
    path = write(tmp_path / "a.jsonl", answer(lines))
    plain = read_answers(path, HASHES, benchmark.items, 2)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\n \n")
    assert read_answers(path, HASHES, benchmark.items, 2) == plain


def test_missing_answers_are_counted(tmp_path: Path, benchmark: Benchmark, lines: list[dict[str, Any]]) -> None:
    told = answer(lines)
    path = write(tmp_path / "a.jsonl", told[:5] + told[7:])
    with pytest.raises(UserError, match="2 of 14 answers are missing, the first id cat1, crop 1, proposition_id 1"):
        read_answers(path, HASHES, benchmark.items, 2)
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        read_answers(tmp_path / "nowhere", HASHES, benchmark.items, 2)
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_answers(write(path, []), HASHES, benchmark.items, 2)


def test_questions_that_cannot_be_written(tmp_path: Path, benchmark: Benchmark) -> None:
    grids = {"cat1": tmp_path, "dog2": tmp_path}
    with pytest.raises(UserError, match="--write_questions .* cannot be written: No such file"):
        write_questions(tmp_path / "no" / "q.jsonl", HASHES, benchmark.items, grids, 16, 2)
