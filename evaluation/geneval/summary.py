"""GenEval's scores: the lines of results.jsonl, a line an image, and what they come to.

- A task's score is the mean over its images, the overall score the mean over the tasks that there are: whatever tags
  the lines have, as in the official code.
- The intervals are of the bootstrap: the prompts of each task are drawn anew, with replacement, a prompt with all its
  images. Images of a prompt succeed and fail together, so to draw images would make the intervals too narrow. They tell
  how far another set of prompts of the same kind could have moved the score; where a task's prompts all did equally
  well, that is no width at all.
- Draws are a function of (seed, task), and lines may come in any order.

Source: Ghosh et al., "GenEval" (2023), and its evaluation/summary_scores.py; the percentile bootstrap: Efron and
Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.randomness import key, uniform
from evaluation.geneval.prompts import TASKS, Metadata

Result = dict[str, Any]
"""A line of results.jsonl: filename, tag, prompt, correct, reason, and metadata and details as strings of JSON."""

RESAMPLES = 2000
_LEVEL = 0.95
_Floats = NDArray[np.float64]


def counted(metadata: Metadata, correct: bool) -> Result:
    """Of an image's line, what `summarise` reads."""
    return {"tag": metadata["tag"], "metadata": json.dumps(metadata), "correct": correct}


def summarise(results: Sequence[Result], seed: int = 0) -> dict[str, Any]:
    """The scores, as shares of 1, with intervals (low, high) of 95 %.

    Args:
        results: a line for each image.
        seed: of the bootstrap.

    Returns:
        "overall", "overall_interval"; "tasks": of each that there is "score", "interval", "prompts", "images";
        "absent_tasks": GenEval's that there are not; "correct_images"; "correct_prompts": with any image correct;
        "prompts"; "images"; "bootstrap": how the intervals were made. In JSON's types.

    Raises:
        UserError: there is no line.
    """
    if not results:
        raise UserError("there are no results to sum up: an image at least has to be scored")
    others = sorted({it["tag"] for it in results} - set(TASKS))
    # As in the official code, lines of equal metadata are of one prompt. Sorted, so that their order means nothing.
    outcomes: dict[str, dict[str, list[bool]]] = {task: defaultdict(list) for task in (*TASKS, *others)}
    for it in sorted(results, key=lambda it: it["metadata"]):
        outcomes[it["tag"]][it["metadata"]].append(it["correct"])
    tasks: dict[str, dict[str, Any]] = {}
    resampled: list[_Floats] = []
    for task, of_prompts in outcomes.items():
        if of_prompts:
            scores = bootstrap(list(of_prompts.values()), key(seed, "geneval", "bootstrap", task))
            resampled.append(scores)
            images = [correct for of_prompt in of_prompts.values() for correct in of_prompt]
            tasks[task] = {
                "score": _mean(images),
                "interval": interval(scores),
                "prompts": len(of_prompts),
                "images": len(images),
            }
    prompts = [any(of_prompt) for of_prompts in outcomes.values() for of_prompt in of_prompts.values()]
    return {
        "overall": _mean([task["score"] for task in tasks.values()]),
        "overall_interval": interval(np.mean(resampled, axis=0)),
        "tasks": tasks,
        "absent_tasks": [task for task in TASKS if task not in tasks],
        "correct_images": _mean([it["correct"] for it in results]),
        "correct_prompts": _mean(prompts),
        "prompts": len(prompts),
        "images": len(results),
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "level": _LEVEL, "unit": "prompts of a task"},
    }


def bootstrap(of_prompts: Sequence[Sequence[float]], key_: int) -> _Floats:
    """A task's score, (RESAMPLES,), each time with as many prompts, drawn with replacement.

    Args:
        of_prompts: each image's score, here whether it is correct, by prompts; none is empty.
    """
    correct = np.array([sum(of_prompt) for of_prompt in of_prompts])
    images = np.array([len(of_prompt) for of_prompt in of_prompts])
    n = len(images)
    drawn = (uniform(key_, np.arange(RESAMPLES * n)) * n).astype(np.int64).reshape(RESAMPLES, n)
    return np.asarray(correct[drawn].sum(1) / images[drawn].sum(1))


def interval(scores: _Floats) -> list[float]:
    """The middle 95 % of scores: their percentiles 2.5 and 97.5."""
    low, high = np.quantile(scores, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return [float(low), float(high)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
