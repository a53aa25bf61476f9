"""The user's copy of DPG-Bench: `prompts/<id>.txt` and `dpg_bench.csv`, as the folder dpg_bench of ELLA's repository.

A row of the table is a question about a prompt. Read are its columns item_id, proposition_id, dependency (numbers with
commas between them, 0 for none), tuple (whose words before the bracket are the category) and question_natural_language;
the prompts are those of the files.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from data.files import decode_text, read_lines
from data.listing import excluded
from evaluation.dpg.rules import Item, Question, zeroing_order

TABLE = "dpg_bench.csv"
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
"""Those that are read."""


@dataclass(frozen=True)
class Benchmark:
    """Prompts and questions.

    Attributes:
        items: in the order of their ids.
        table_sha256: of the table's bytes.
        prompts_sha256: of all ids and prompts.
    """

    items: tuple[Item, ...]
    table_sha256: str
    prompts_sha256: str


def read(folder: Path, parity: bool = False) -> Benchmark:
    """Read a copy.

    Args:
        parity: read the table as the official code does: without its first row, and of what stands twice the last. Such
            a prompt may be left with questions that depend on nothing that is there, or with none.

    Raises:
        UserError: it is not whole, or a row is malformed; without parity, also where dependencies lead nowhere.
    """
    prompts = _read_prompts(folder / "prompts")
    table = folder / TABLE
    try:
        content = table.read_bytes()
    except OSError as error:
        raise UserError(f"{table} cannot be read: {error.strerror}") from error
    questions = _read_questions(table, decode_text(content, str(table)), parity)
    _check_alike(folder, prompts, questions)
    items = tuple(Item(name, prompt, tuple(questions[name].values())) for name, prompt in sorted(prompts.items()))
    if not parity:
        for item in items:
            _check_dependencies(table, item)
    together = "".join(f"{item.id}\0{item.prompt}\0" for item in items).encode()
    return Benchmark(items, hashlib.sha256(content).hexdigest(), hashlib.sha256(together).hexdigest())


def _read_prompts(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.glob("*.txt") if not excluded(path.name)]
    prompts = {path.stem: "\n".join(read_lines(path)).strip() for path in paths}
    if not prompts:
        raise UserError(f"{folder} holds no prompt: --benchmark is the folder with prompts/<id>.txt and {TABLE}")
    empty = sorted(name for name, prompt in prompts.items() if not prompt)
    if empty:
        raise UserError(f"{folder / empty[0]}.txt is empty")
    return prompts


def _read_questions(table: Path, text: str, parity: bool) -> dict[str, dict[int, Question]]:
    """By prompt and number."""
    found: dict[str, dict[int, Question]] = {}
    above = ""
    for line, row in _rows(table, text):
        name, question = row["item_id"], _question(table, line, row)
        if parity and not found:
            found[name] = {}
            continue
        if parity and name != above:
            found[name] = {}
        here = found.setdefault(name, {})
        if question.number in here and not parity:
            raise UserError(f"{table}: line {line}: proposition_id {question.number} of {name} stands there twice")
        here[question.number] = question
        above = name
    return found


def _rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with the lines that they end in."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{table}: line 1: there is no column {missing[0]}")
        for row in reader:
            if None in row or None in row.values():
                wrong = "too many" if None in row else "too few"
                raise UserError(
                    f"{table}: line {reader.line_num}: {wrong} fields, there are {len(reader.fieldnames or ())}"
                )
            yield reader.line_num, row
    except csv.Error as error:
        # The reader counts the lines of whole rows: this one begins on the next.
        raise UserError(f"{table}: line {reader.line_num + 1}: {error}") from error


def _question(table: Path, line: int, row: dict[str, str]) -> Question:
    number, dependency = row["proposition_id"].strip(), row["dependency"]
    if not number.isdecimal() or number == "0":
        raise UserError(f"{table}: line {line}: proposition_id '{number}' must be a number from 1")
    parents = [parent.strip() for parent in dependency.split(",")]
    if not all(parent.isdecimal() for parent in parents):
        raise UserError(
            f"{table}: line {line}: dependency '{dependency}' must be numbers with commas between them, 0 for none"
        )
    category, text = row["tuple"].split("(")[0].strip(), row["question_natural_language"].strip()
    for column, value in (("item_id", row["item_id"]), ("tuple", category), (COLUMNS[-1], text)):
        if not value:
            raise UserError(f"{table}: line {line}: {column} is empty")
    return Question(int(number), text, category, tuple(int(parent) for parent in parents if int(parent)))


def _check_alike(folder: Path, prompts: Iterable[str], asked: Iterable[str]) -> None:
    silent, nameless = sorted(set(prompts) - set(asked)), sorted(set(asked) - set(prompts))
    if silent:
        raise UserError(
            f"{folder / TABLE} asks nothing about {len(silent)} of the prompts, such as prompts/{silent[0]}.txt"
        )
    if nameless:
        raise UserError(f"{folder} has no prompts/{nameless[0]}.txt, one of {len(nameless)} that {TABLE} asks about")


def _check_dependencies(table: Path, item: Item) -> None:
    try:
        zeroing_order(item)
    except UserError as error:
        raise UserError(f"{table}: {error}: mend its rows, or count with --parity as the official code does") from error
