"""Questions for a judge that runs elsewhere, and its answers: files of one JSON object a line.

The first line is a header: `judge` (null among the questions; the answers name who gave them) and the hashes of what
was asked about. Each other line is a question about a picture: `id`, `crop` (0 to 3: top left, top right, bottom left,
bottom right) and `proposition_id`; for the judge `image`, `box` (left, upper, right and lower edge in that file) and
`question`; and from it `answer`. Lines of answers may leave out what is for the judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import atomic_write, read_lines
from evaluation.dpg.grids import boxes
from evaluation.dpg.rules import Item

Answers = dict[str, list[dict[int, str]]]
"""By prompt, picture and question."""

_HASHES = ("table_sha256", "grids_sha256")


def write_questions(
    path: Path,
    header: Mapping[str, str],
    items: Sequence[Item],
    grids: Mapping[str, Path],
    resolution: int,
    pictures: int,
) -> int:
    """Write what a judge has to answer, and return how many questions that is.

    Args:
        header: hashes of the table and of the grids.
        items: what is asked.
        grids: the images, by the prompts' ids.
        resolution: side of one picture in pixels.
        pictures: of a prompt.
    """
    lines = [
        {
            "id": item.id,
            "crop": crop,
            "proposition_id": question.number,
            "image": str(grids[item.id].absolute()),
            "box": box,
            "question": question.text,
        }
        for item in items
        for crop, box in enumerate(boxes(resolution, pictures))
        for question in item.questions
    ]
    try:
        atomic_write(path, (f"{json.dumps(line)}\n".encode() for line in [{"judge": None, **header}, *lines]))
    except OSError as error:
        raise UserError(f"--write-questions {path} cannot be written: {error.strerror}") from error
    return len(lines)


def read_answers(path: Path, header: Mapping[str, str], items: Sequence[Item], pictures: int) -> tuple[str, Answers]:
    """Who answered, and what.

    Raises:
        UserError: a line is malformed, the answers are to other questions or pictures, one stands there twice, or not
            all are there.
    """
    wanted = [(item.id, crop, it.number) for item in items for crop in range(pictures) for it in item.questions]
    asked, found = set(wanted), dict[tuple[str, int, int], tuple[int, str]]()
    lines = read_lines(path, f"--answers {path}") or [""]
    judge = _read_header(path, lines[0], header)
    for number, text in enumerate(lines[1:], 2):
        line = _parse(path, number, text)
        place = (line.get("id"), line.get("crop"), line.get("proposition_id"))
        if (
            not isinstance(place[0], str)
            or type(place[1]) is not int
            or type(place[2]) is not int
            or place not in asked
        ):
            told = "id {!r}, crop {!r}, proposition_id {!r}".format(*place)
            raise UserError(f"--answers {path}: line {number}: nobody asked {told}")
        if not isinstance(line.get("answer"), str):
            raise UserError(f'--answers {path}: line {number}: answer must be a string, such as "yes"')
        if place in found:
            raise UserError(
                f"--answers {path}: line {number} answers what line {found[place][0]} does: keep one of them"
            )
        found[place] = (number, line["answer"])
    missing = [place for place in wanted if place not in found]
    if missing:
        first = "id {}, crop {}, proposition_id {}".format(*missing[0])
        raise UserError(f"--answers {path}: {len(missing)} of {len(wanted)} answers are missing, the first {first}")
    answers: Answers = {item.id: [{} for _ in range(pictures)] for item in items}
    for (name, crop, question), (_, answer) in found.items():
        answers[name][crop][question] = answer
    return judge, answers


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--answers {path}: line {number} is not JSON: {error}") from error
    if not isinstance(line, dict):
        raise UserError(f"--answers {path}: line {number} must be an object")
    return line


def _read_header(path: Path, text: str, header: Mapping[str, str]) -> str:
    line = _parse(path, 1, text)
    judge = line.get("judge")
    if not isinstance(judge, str) or not judge:
        raise UserError(f"--answers {path}: line 1 must be the questions' first line with the judge's name as judge")
    for name in _HASHES:
        if line.get(name) != header[name]:
            raise UserError(
                f"--answers {path}: {name} differs, so these answers are to other questions or pictures: write the "
                "questions anew with --write-questions and have them answered"
            )
    return judge
