"""Is a difference between two GenEval scores more than chance?

Two intervals that overlap do not answer that: both models met the same prompts, so most of each interval, which
prompts happen to be hard, is common to both and cancels in the difference. So the difference itself is resampled: the
same prompts, drawn with replacement within their tasks, for both (the paired bootstrap; Efron and Tibshirani 1993,
chapter 13; Koehn 2004 for scores of models). It speaks of these weights. Whether a recipe is better than another is a
question about training runs, and Welch's t over seeds answers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Result = Mapping[str, Any]  # a line of results.jsonl; `tag`, `prompt` and `correct` count here
_Counts = dict[tuple[str, str], npt.NDArray[np.int64]]  # by task and prompt: images that are correct, images

_FEWEST_PROMPTS = 10
"""Below that a task's resampled mean varies over a tenth less than the mean does."""


class Incomparable(Exception):
    """Why two scores cannot be held against each other, in half a sentence."""


@dataclass(frozen=True)
class Difference:
    """Of two scores, the second less the first, with its 95 % interval."""

    value: float
    interval: tuple[float, float]

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        low, high = self.interval
        return low > 0 or high < 0


@dataclass(frozen=True)
class Paired:
    """Differences between two models on the same prompts."""

    overall: Difference
    tasks: dict[str, Difference]
    prompts: int


def paired_bootstrap(first: Sequence[Result], second: Sequence[Result], resamples: int = 10_000) -> Paired:
    """How much better the second model's images are, by percentiles of the paired bootstrap over prompts.

    Images of the same task and prompt belong together, also where a list has a prompt twice. A task's score is the
    mean over its images, the overall score the mean over the tasks.

    Raises:
        Incomparable: a line lacks a field, the prompts are not the same, or a task has fewer than 10.
    """
    a, b = _counts(first), _counts(second)
    if alone := len(a.keys() ^ b.keys()):
        raise Incomparable(f"{alone} of {len(a.keys() | b.keys())} prompts are in one of them alone")
    if not a:
        raise Incomparable("there are no results")
    tasks: dict[str, Difference] = {}
    random = np.random.default_rng(0)
    total = np.zeros(resamples)
    for task in sorted({task for task, _ in a}):
        # In one order, so that what is drawn does not hang on that of the file.
        prompts = sorted(key for key in a if key[0] == task)
        if len(prompts) < _FEWEST_PROMPTS:
            raise Incomparable(f"{task} has {len(prompts)} different prompts, which is too few")
        counts = np.stack([[a[key], b[key]] for key in prompts])  # (prompts, model, correct or all)
        draws = random.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), resamples)
        difference = _gain(np.tensordot(draws, counts, 1))
        tasks[task] = _difference(float(_gain(counts.sum(0))), difference)
        total += difference
    value = sum(it.value for it in tasks.values()) / len(tasks)
    return Paired(_difference(value, total / len(tasks)), tasks, len(a))


def _counts(results: Sequence[Result]) -> _Counts:
    counts: _Counts = {}
    for line in results:
        missing = [name for name in ("tag", "prompt", "correct") if name not in line]
        if missing:
            raise Incomparable(f"a line of results.jsonl has no {missing[0]!r}")
        of = counts.setdefault((line["tag"], line["prompt"]), np.zeros(2, np.int64))
        of += [bool(line["correct"]), 1]
    return counts


def _gain(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(..., model, correct or all) to the second model's score less the first's."""
    scores = counts[..., 0] / counts[..., 1]
    return np.asarray(scores[..., 1] - scores[..., 0])


def _difference(value: float, resampled: npt.NDArray[np.float64]) -> Difference:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Difference(value, (float(low), float(high)))


def over_seeds(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The difference of two recipes' mean scores, one score a training run, with Welch's 95 % interval.

    Raises:
        Incomparable: a recipe has a single run, or neither has any spread.
    """
    if min(len(first), len(second)) < 2:
        raise Incomparable("a recipe has a single run")
    if np.ptp(first) == np.ptp(second) == 0:
        raise Incomparable("the seeds have no spread")
    # Not scipy's t-test, which warns of seeds that came to the same score.
    value = float(np.mean(second) - np.mean(first))
    a, b = (np.var(it, ddof=1) / len(it) for it in (first, second))
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    low, high = stats.t.interval(0.95, freedom, value, np.sqrt(a + b))
    return Difference(value, (float(low), float(high)))
