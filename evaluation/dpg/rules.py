"""DPG-Bench: its prompts and questions, and the rules from answers to scores.

- A question scores 1 if its answer is "yes", else 0, and 0 if any question that it depends on scores 0, so that zeros
  run down whole chains: without a dog there is no collar, nor the collar's colour.
- An image's score is the mean over its questions, a prompt's the mean over its images, the total the mean over the
  prompts, times 100. A category's is the mean over all its questions about all images, as they count in the total.

`parity` counts as the official code does, whose numbers differ in four ways (as one process of it counts: several mix
up their categories, since each goes through them in an order of its own that no seed fixes; the total is the same):

- The first row of the questions is skipped (benchmark.py). Where another depends on it, its prompt drops out.
- Categories are counted on the last image alone and before anything is zeroed, unlike the total.
- What fails drops out of the mean: it is neither 0 nor an error. We list it.
- Questions are zeroed in the file's order, so that one that stands above its parent misses what zeroes the parent.

A copy of the benchmark is the folder dpg_bench of ELLA's repository: `prompts/<id>.txt` and `dpg_bench.csv`. A row of
the table is a question about a prompt. Its columns item_id, proposition_id, dependency (numbers with commas between
them, 0 for none), tuple (whose words before the bracket are the category) and question_natural_language are read; the
prompts are those of the files.

Source: Hu et al., "ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment" (2024), and its
dpg_bench/compute_dpg_bench.py; Cho et al., "Davidsonian Scene Graph" (2024), for the dependencies.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.files import decode_text, name_in_errors, read_lines
from data.listing import excluded
from data.randomness import key
from evaluation.stats import Floats, interval, resample_counts

Result = dict[str, Any]
"""A prompt's line of results.jsonl: id, prompt, score and images (0 to 1), and its questions, each with what is asked
and, by image, the answers and the scores before and after zeroing."""

PROMPTS_SHA256 = "e1e089ca304591daec49055baff1eecc7fdbff932fa4a818a51bf4bb6543e980"
"""Of the benchmark's 1065 prompts as published, see `Benchmark`."""
MPLUG = "damo/mplug_visual-question-answering_coco_large_en"
"""The benchmark's judge, by its name on ModelScope."""


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
        number: within its prompt, from 1.
        text: the question.
        category: broad and detailed, such as "entity - whole".
        parents: numbers of the questions that must be answered with yes for this one to count.
    """

    number: int
    text: str
    category: str
    parents: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A prompt and its questions, in the file's order."""

    id: str
    prompt: str
    questions: tuple[Question, ...]


def is_yes(answer: str) -> bool:
    """Whether an answer is "yes", whatever its case, the space around it and a full stop behind it.

    The official code takes "yes" alone, as its judge answers; chat models also write "Yes.".
    """
    return answer.strip().removesuffix(".").lower() == "yes"


def is_no(answer: str) -> bool:
    """Whether an answer is "no", in the same sense. What is neither counts as no, but is a sign of an unfit judge."""
    return answer.strip().removesuffix(".").lower() == "no"


def zeroing_order(item: Item, parity: bool = False) -> list[int]:
    """The numbers of a prompt's questions, parents before children; in parity, in the file's order.

    Raises:
        UserError: there are none, one depends on a question that is not there or, without parity, on itself.
    """
    known = [question.number for question in item.questions]
    if not known:
        raise UserError(f"{item.id} has no question")
    for question in item.questions:
        for parent in question.parents:
            if parent not in known:
                raise UserError(
                    f"{item.id}: question {question.number} depends on question {parent}, which is not there"
                )
    if parity:
        return known
    try:
        return list(TopologicalSorter({asked.number: asked.parents for asked in item.questions}).static_order())
    except CycleError as error:
        round_trip = ", ".join(map(str, error.args[1]))
        raise UserError(f"{item.id}: questions {round_trip} depend on each other in a circle") from error


def zeroed(item: Item, scores: Mapping[int, int], parity: bool = False) -> dict[int, int]:
    """An image's scores by question, where those that depend on a question at zero are zero."""
    parents = {question.number: question.parents for question in item.questions}
    after = dict(scores)
    for number in zeroing_order(item, parity):
        if any(after[parent] == 0 for parent in parents[number]):
            after[number] = 0
    return after


def score(item: Item, answers: Sequence[Mapping[int, str]], parity: bool = False) -> Result:
    """A prompt's result from the answers about each of its images, by the questions' numbers.

    Raises:
        UserError: see `zeroing_order`.
    """
    numbers = [question.number for question in item.questions]
    before = [{number: int(is_yes(answered[number])) for number in numbers} for answered in answers]
    after = [zeroed(item, scores, parity) for scores in before]
    images = [sum(scores.values()) / len(scores) for scores in after]
    questions = [
        {
            "proposition_id": asked.number,
            "dependency": list(asked.parents),
            "category": asked.category,
            "question": asked.text,
            "answers": [answered[asked.number] for answered in answers],
            "before": [scores[asked.number] for scores in before],
            "after": [scores[asked.number] for scores in after],
        }
        for asked in item.questions
    ]
    mean = sum(images) / len(images)
    return {"id": item.id, "prompt": item.prompt, "score": mean, "images": images, "questions": questions}


def summarize(results: Sequence[Result], parity: bool = False, seed: int = 0) -> dict[str, Any]:
    """The scores of all prompts, in percent, with 95 % intervals of the bootstrap over prompts.

    Returns:
        `total` and its `interval`; `prompts`; how many `answers` are `yes`, `no` and `other`; and for each category, in
        `broad` and `detailed`, its `score`, `interval` and `questions`, the answers that were counted.
    """
    count = len(results)
    weights = resample_counts(np.random.default_rng(key(seed, "dpg", "bootstrap")), count)
    scores = np.array([result["score"] for result in results])
    cells: dict[str, dict[str, Floats]] = {"broad": {}, "detailed": {}}
    for n, result in enumerate(results):
        for question in result["questions"]:
            counted = question["before"][-1:] if parity else question["after"]
            category = question["category"]
            for level, name in (("broad", category.split("-")[0].strip()), ("detailed", category)):
                cells[level].setdefault(name, np.zeros((2, count)))[:, n] += (sum(counted), len(counted))

    def cell(sums: Floats) -> dict[str, Any]:
        right, asked = sums @ weights.T  # a resample may hold no prompt that asks for the category
        return {
            "score": float(100 * sums[0].sum() / sums[1].sum()),
            "interval": list(interval(100 * right[asked > 0] / asked[asked > 0])),
            "questions": int(sums[1].sum()),
        }

    answers = [answer for result in results for question in result["questions"] for answer in question["answers"]]
    counts = {"yes": sum(map(is_yes, answers)), "no": sum(map(is_no, answers))}
    return {
        "total": float(100 * scores.mean()),
        "interval": list(interval(100 * (weights @ scores) / count)),
        "prompts": count,
        "answers": counts | {"other": len(answers) - sum(counts.values())},
        **{level: {name: cell(sums) for name, sums in sorted(named.items())} for level, named in cells.items()},
    }


def title(judge_name: str, scored: int, prompts: int, prompts_sha256: str) -> str:
    """The name of a score: the benchmark's own only for its own judge on all of its own prompts.

    Args:
        scored: prompts in the mean, of all `prompts` of the copy.
    """
    published = prompts_sha256 == PROMPTS_SHA256
    name = f"DPG questions{'' if published else ' about other prompts'}, judged by {judge_name}"
    if published and judge_name == MPLUG:
        name = "DPG-Bench"
    return name if published and scored == prompts else f"{name}, {scored} of {prompts} prompts"


TABLE = "dpg_bench.csv"
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
"""The columns that are read."""


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
    """Read a copy of the benchmark.

    Args:
        parity: read the table as the official code does: without its first row, and of rows of the same number the
            last. A prompt may be left with questions that depend on nothing that is there, or with none.

    Raises:
        UserError: a file is missing or a row is malformed; without parity, also where dependencies lead nowhere.
    """
    prompts = _read_prompts(folder / "prompts")
    table = folder / TABLE
    with name_in_errors(str(table), "read"):
        content = table.read_bytes()
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
            raise UserError(f"{table}: line {line}: proposition_id {question.number} of {name} is there twice")
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
        # The reader has counted the lines of whole rows: the malformed one begins on the next.
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
        raise UserError(
            f"{table}: {error}: correct its rows, or count with --parity as the official code does"
        ) from error
