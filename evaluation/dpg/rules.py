"""DPG-Bench's rules: from the answers about a prompt's pictures to its score, and from all prompts to the table.

- A question scores 1 if its answer is "yes", else 0, and 0 if any question that it depends on scores 0, so that zeros
  run down whole chains: without a dog there is no collar, nor the collar's colour.
- A picture's score is the mean over its questions, a prompt's the mean over its pictures, the total the mean over the
  prompts, times 100. A category's is the mean over all its questions about all pictures, as they count in the total.

`parity` counts as the official code does, whose numbers differ in four ways (one process of it is meant: several mix up
their categories, since each goes through them in an order of its own that no seed holds; the total is not touched):

- The first row of the questions is skipped (benchmark.py). Where another depends on it, its prompt falls out.
- Categories are counted on the last picture alone and before anything is zeroed, not on the total's footing.
- What fails falls out of the mean: it is neither 0 nor an error. We list it.
- Questions are zeroed in the file's order, so that one that stands above its parent misses what zeroes the parent.

Source: Hu et al., "ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment" (2024), and its
dpg_bench/compute_dpg_bench.py; Cho et al., "Davidsonian Scene Graph" (2024), for the dependencies.

The user's copy of DPG-Bench: `prompts/<id>.txt` and `dpg_bench.csv`, as the folder dpg_bench of ELLA's repository.

A row of the table is a question about a prompt. Read are its columns item_id, proposition_id, dependency (numbers with
commas between them, 0 for none), tuple (whose words before the bracket are the category) and question_natural_language;
the prompts are those of the files.
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
from numpy.typing import NDArray

from data.errors import UserError
from data.files import decode_text, read_lines
from data.listing import excluded
from data.randomness import key

Result = dict[str, Any]
"""One prompt's line of results.jsonl: id, prompt, score and images (0 to 1), and its questions, of each what is asked
and, by picture, the answers and the scores before and after zeroing."""

PROMPTS_SHA256 = "e1e089ca304591daec49055baff1eecc7fdbff932fa4a818a51bf4bb6543e980"
"""Of the benchmark's 1065 prompts as published, as `benchmark.Benchmark` has it."""
MPLUG = "damo/mplug_visual-question-answering_coco_large_en"
"""The benchmark's judge, by its name on ModelScope."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Question:
    """What is asked of a picture.

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

    The official code takes "yes" alone. Its judge answers so; chat models write "Yes.", too.
    """
    return answer.strip().removesuffix(".").lower() == "yes"


def is_no(answer: str) -> bool:
    """Whether an answer is "no", in the same sense; what is neither counts as no, but tells of a judge out of place."""
    return answer.strip().removesuffix(".").lower() == "no"


def zeroing_order(item: Item, parity: bool = False) -> list[int]:
    """The numbers of a prompt's questions, parents before children; in parity, as they stand.

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
        return list(TopologicalSorter({it.number: it.parents for it in item.questions}).static_order())
    except CycleError as error:
        round_trip = ", ".join(map(str, error.args[1]))
        raise UserError(f"{item.id}: questions {round_trip} depend on each other in a circle") from error


def zeroed(item: Item, scores: Mapping[int, int], parity: bool = False) -> dict[int, int]:
    """A picture's scores by question, with those zeroed that depend on one at zero."""
    parents = {question.number: question.parents for question in item.questions}
    after = dict(scores)
    for number in zeroing_order(item, parity):
        if any(after[parent] == 0 for parent in parents[number]):
            after[number] = 0
    return after


def score(item: Item, answers: Sequence[Mapping[int, str]], parity: bool = False) -> Result:
    """A prompt's result.

    Args:
        answers: for each picture, the answer to each question by its number.

    Raises:
        UserError: see `zeroing_order`.
    """
    before = [{it.number: int(is_yes(answered[it.number])) for it in item.questions} for answered in answers]
    after = [zeroed(item, scores, parity) for scores in before]
    images = [sum(scores.values()) / len(scores) for scores in after]
    questions = [
        {
            "proposition_id": it.number,
            "dependency": list(it.parents),
            "category": it.category,
            "question": it.text,
            "answers": [answered[it.number] for answered in answers],
            "before": [scores[it.number] for scores in before],
            "after": [scores[it.number] for scores in after],
        }
        for it in item.questions
    ]
    mean = sum(images) / len(images)
    return {"id": item.id, "prompt": item.prompt, "score": mean, "images": images, "questions": questions}


def _interval(resampled: NDArray[np.float64]) -> list[float]:
    """Where the middle 95 % lie."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return [float(low), float(high)]


def summarise(results: Sequence[Result], parity: bool = False, seed: int = 0) -> dict[str, Any]:
    """The table of all prompts, in percent, with 95 % intervals of the bootstrap over prompts.

    Returns:
        `total` and its `interval`; `prompts`; how many `answers` are `yes`, `no` and `other`; and for each category, in
        `broad` and `detailed`, its `score`, `interval` and `questions`, the answers that were counted.
    """
    count = len(results)
    drawn = np.random.default_rng(key(seed, "dpg", "bootstrap")).multinomial(count, [1 / count] * count, _RESAMPLES)
    scores = np.array([result["score"] for result in results])
    cells: dict[str, dict[str, NDArray[np.float64]]] = {"broad": {}, "detailed": {}}
    for n, result in enumerate(results):
        for question in result["questions"]:
            counted = question["before"][-1:] if parity else question["after"]
            category = question["category"]
            for level, name in (("broad", category.split("-")[0].strip()), ("detailed", category)):
                cells[level].setdefault(name, np.zeros((2, count)))[:, n] += (sum(counted), len(counted))

    def cell(sums: NDArray[np.float64]) -> dict[str, Any]:
        right, asked = sums @ drawn.T  # a resample may hold no prompt that asks for the category
        interval = _interval(100 * right[asked > 0] / asked[asked > 0])
        return {
            "score": float(100 * sums[0].sum() / sums[1].sum()),
            "interval": interval,
            "questions": int(sums[1].sum()),
        }

    answers = [answer for result in results for question in result["questions"] for answer in question["answers"]]
    told = {"yes": sum(map(is_yes, answers)), "no": sum(map(is_no, answers))}
    return {
        "total": float(100 * scores.mean()),
        "interval": _interval(100 * (drawn @ scores) / count),
        "prompts": count,
        "answers": told | {"other": len(answers) - sum(told.values())},
        **{level: {name: cell(sums) for name, sums in sorted(named.items())} for level, named in cells.items()},
    }


def title(judge_name: str, scored: int, prompts: int, prompts_sha256: str) -> str:
    """What a score may be called: the benchmark's name is for its own judge on all of its own prompts.

    Args:
        judge_name: who answered.
        scored: prompts in the mean.
        prompts: prompts of the user's copy.
        prompts_sha256: of that.
    """
    published = prompts_sha256 == PROMPTS_SHA256
    name = f"DPG questions{'' if published else ' about other prompts'}, judged by {judge_name}"
    if published and judge_name == MPLUG:
        name = "DPG-Bench"
    return name if published and scored == prompts else f"{name}, {scored} of {prompts} prompts"


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
