"""A copy of DPG-Bench as it is read: whole, by the official code's reading, and with its rows spoilt."""

from __future__ import annotations

from pathlib import Path

import pytest
from dpg_copy import CAT, DOG, HEADER, ROWS, write_copy

from data.errors import UserError
from evaluation.dpg.rules import Question, read, zeroing_order

Row = tuple[str, ...]


def changed(row: int, **fields: str) -> list[Row]:
    """The rows with one changed."""
    rows = [dict(zip(HEADER, it, strict=True)) for it in ROWS]
    rows[row] |= fields
    return [tuple(it.values()) for it in rows]


def test_prompts_and_questions(tmp_path: Path) -> None:
    found = read(write_copy(tmp_path / "copy"))
    assert [(it.id, it.prompt, len(it.questions)) for it in found.items] == [("cat1", CAT, 4), ("dog2", DOG, 3)]
    assert found.items[0].questions[0] == Question(1, "Is there a cat?", "entity - whole", ())
    assert found.items[0].questions[3].category == "global -"
    assert found.items[1].questions[1] == Question(2, "Is the dog on the left?", "relation - spatial", (1, 3))


def test_hashes_tell_of_what_changed(tmp_path: Path) -> None:
    first, again = (read(write_copy(tmp_path / name)) for name in "ab")
    assert first == again
    other = read(write_copy(tmp_path / "c", changed(3, question_natural_language="Is it a drawing?")))
    assert other.prompts_sha256 == first.prompts_sha256 and other.table_sha256 != first.table_sha256
    (tmp_path / "a" / "prompts" / "._dog2.txt").write_bytes(b"\0\5\x16\7\xff")  # what a Mac leaves is no prompt
    assert read(tmp_path / "a") == first
    (tmp_path / "a" / "prompts" / "dog2.txt").write_text("another dog")
    other = read(tmp_path / "a")
    assert other.prompts_sha256 != first.prompts_sha256 and other.table_sha256 == first.table_sha256


def test_in_parity_the_first_row_is_skipped_and_its_children_have_no_parent(tmp_path: Path) -> None:
    cat, dog = read(write_copy(tmp_path / "copy"), parity=True).items
    assert [it.number for it in cat.questions] == [2, 3, 4]
    assert [it.number for it in dog.questions] == [1, 2, 3]
    with pytest.raises(UserError, match="cat1: question 2 depends on question 1, which is not there"):
        zeroing_order(cat, parity=True)
    alone = read(write_copy(tmp_path / "alone", ROWS[:1] + ROWS[4:]), parity=True)
    assert alone.items[0].questions == ()


def test_in_parity_the_last_of_two_counts(tmp_path: Path) -> None:
    twice = changed(2, proposition_id="2", question_natural_language="Is it red all over?", dependency="0")
    with pytest.raises(UserError, match="line 4: proposition_id 2 of cat1 is there twice"):
        read(write_copy(tmp_path / "copy", twice))
    cat = read(tmp_path / "copy", parity=True).items[0]
    assert [(it.number, it.text) for it in cat.questions] == [(2, "Is it red all over?"), (4, "Is it a photo?")]


def test_rows_apart_belong_together_but_in_parity(tmp_path: Path) -> None:
    rows = [*ROWS[:3], *ROWS[4:], ROWS[3]]
    assert [it.number for it in read(write_copy(tmp_path / "copy", rows)).items[0].questions] == [1, 2, 3, 4]
    assert [it.number for it in read(tmp_path / "copy", parity=True).items[0].questions] == [4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"proposition_id": "two"}, "line 3: proposition_id 'two' must be a number from 1"),
        ({"proposition_id": "0"}, "line 3: proposition_id '0' must be a number from 1"),
        ({"dependency": ""}, "line 3: dependency '' must be numbers with commas between them, 0 for none"),
        ({"dependency": "1;2"}, "line 3: dependency '1;2' must be numbers"),
        ({"tuple": " (cat)"}, "line 3: tuple is empty"),
        ({"question_natural_language": " "}, "line 3: question_natural_language is empty"),
        (
            {"dependency": "9"},
            "cat1: question 2 depends on question 9, which is not there: correct its rows, or .*--parity",
        ),
        ({"dependency": "3"}, "cat1: questions .* depend on each other in a circle"),
        ({"dependency": "2"}, "cat1: questions 2, 2 depend on each other in a circle"),
    ],
)
def test_a_row_that_is_malformed(tmp_path: Path, fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write_copy(tmp_path / "copy", changed(1, **fields)))


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    rows = changed(0, text="a prompt\nof two lines")
    with pytest.raises(UserError, match="line 4: proposition_id"):
        read(write_copy(tmp_path / "copy", [rows[0], *changed(1, proposition_id="x")[1:]]))


def test_a_row_of_the_wrong_length(tmp_path: Path) -> None:
    for name, row, wrong in (("few", ROWS[1][:-1], "few"), ("many", (*ROWS[1], "more"), "many")):
        with pytest.raises(UserError, match=f"line 3: too {wrong} fields, there are 9"):
            read(write_copy(tmp_path / name, [ROWS[0], row, *ROWS[2:]]))


def test_files_are_utf_8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    plain = read(write_copy(tmp_path / "copy"))
    for path in (tmp_path / "copy" / "dpg_bench.csv", tmp_path / "copy" / "prompts" / "cat1.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\n" * (path.suffix == ".txt"))
    assert read(tmp_path / "copy").items == plain.items
    (tmp_path / "copy" / "prompts" / "cat1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="cat1.txt: should be UTF-8, but byte 3 is 0xe9"):
        read(tmp_path / "copy")


def test_a_table_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: there is no column dependency"):
        read(write_copy(tmp_path / "copy", header=tuple(it.replace("dependency", "parents") for it in HEADER)))
    table = tmp_path / "copy" / "dpg_bench.csv"
    table.write_text(",".join(HEADER) + '\ncat1,"never closed\n')
    with pytest.raises(UserError, match="line 2: unexpected end of data"):
        read(tmp_path / "copy")
    table.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="dpg_bench.csv: is UTF-16"):
        read(tmp_path / "copy")
    table.unlink()
    with pytest.raises(UserError, match="dpg_bench.csv: cannot be read: .*No such file"):
        read(tmp_path / "copy")


@pytest.mark.parametrize("parity", [False, True])
def test_prompts_and_questions_that_do_not_match(tmp_path: Path, parity: bool) -> None:
    with pytest.raises(UserError, match="asks nothing about 1 of the prompts, such as prompts/dog2.txt"):
        read(write_copy(tmp_path / "copy", ROWS[:4]), parity)
    (tmp_path / "copy" / "prompts" / "dog2.txt").unlink()
    (tmp_path / "copy" / "prompts" / "cat1.txt").rename(tmp_path / "copy" / "prompts" / "cat3.txt")
    with pytest.raises(UserError, match="asks nothing about 1 of the prompts, such as prompts/cat3.txt"):
        read(tmp_path / "copy", parity)
    (tmp_path / "copy" / "prompts" / "cat3.txt").rename(tmp_path / "copy" / "prompts" / "cat1.txt")
    write_copy(tmp_path / "other")
    (tmp_path / "other" / "prompts" / "cat1.txt").unlink()
    with pytest.raises(UserError, match="has no prompts/cat1.txt, one of 1 that dpg_bench.csv asks about"):
        read(tmp_path / "other", parity)


def test_prompts_that_are_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prompt: --benchmark is the folder with"):
        read(tmp_path)
    (write_copy(tmp_path / "copy") / "prompts" / "cat1.txt").write_text("\n")
    with pytest.raises(UserError, match="cat1.txt is empty"):
        read(tmp_path / "copy")
