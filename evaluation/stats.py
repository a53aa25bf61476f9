"""The bootstrap of all scores, the paired bootstrap of two models, and Welch's interval over training runs.

Whole groups are resampled (a prompt with all its images), since images of one prompt succeed and fail together. To
resample images would make the intervals too narrow.

Two intervals that overlap do not say whether a difference is more than chance. Both models met the same prompts, so
most of each interval, which prompts happen to be hard, is common to both and cancels in the difference. So the
difference itself is resampled. It speaks of these weights; whether one recipe is better than another is a question
about training runs, which Welch's t over seeds answers.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13; Koehn (2004) for pairs of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from data.randomness import uniform

Floats = NDArray[np.float64]
Result = Mapping[str, Any]
"""A line of results.jsonl, of which `tag`, `prompt` and `correct` are read."""

RESAMPLES = 2000
LEVEL = 0.95
_FEWEST_PROMPTS = 10
"""With fewer, a task's resampled mean varies over a tenth less than the mean does."""


def interval(resampled: Floats) -> tuple[float, float]:
    """The middle 95 %: percentiles 2.5 and 97.5."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(groups: Sequence[Sequence[float]], key_: int) -> Floats:
    """The mean over all values, (RESAMPLES,), each time over as many groups, which are resampled with replacement.

    A function of the key and the groups in their order; none is empty.
    """
    sums, counts = np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])
    n = len(groups)
    chosen = (uniform(key_, np.arange(RESAMPLES * n)) * n).astype(np.int64).reshape(RESAMPLES, n)
    return np.asarray(sums[chosen].sum(1) / counts[chosen].sum(1))


def resample_counts(random: np.random.Generator, count: int, resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """How often each of `count` groups is in each resample, (resamples, count)."""
    return random.multinomial(count, np.full(count, 1 / count), resamples)


class Incomparable(Exception):
    """Why two scores cannot be compared, in half a sentence."""


@dataclass(frozen=True)
class Difference:
    """The second score less the first, with its 95 % interval."""

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
    """How much better the second model's images are, by the paired bootstrap over prompts within their tasks.

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
        prompts = sorted(key for key in a if key[0] == task)  # whatever the order of the file
        if len(prompts) < _FEWEST_PROMPTS:
            raise Incomparable(f"{task} has {len(prompts)} different prompts, which is too few")
        counts = np.stack([[a[key], b[key]] for key in prompts])  # (prompts, model, correct or all)
        difference = _gain(np.tensordot(resample_counts(random, len(prompts), resamples), counts, 1))
        tasks[task] = Difference(float(_gain(counts.sum(0))), interval(difference))
        total += difference
    value = sum(task.value for task in tasks.values()) / len(tasks)
    return Paired(Difference(value, interval(total / len(tasks))), tasks, len(a))


def _counts(results: Sequence[Result]) -> dict[tuple[str, str], NDArray[np.int64]]:
    """By task and prompt, how many images are correct, and how many there are."""
    counts: dict[tuple[str, str], NDArray[np.int64]] = {}
    for line in results:
        missing = [name for name in ("tag", "prompt", "correct") if name not in line]
        if missing:
            raise Incomparable(f"a line of results.jsonl has no {missing[0]!r}")
        of_prompt = counts.setdefault((line["tag"], line["prompt"]), np.zeros(2, np.int64))
        of_prompt += [bool(line["correct"]), 1]
    return counts


def _gain(counts: NDArray[np.int64]) -> Floats:
    """(..., model, correct or all) to the second model's score less the first's."""
    scores = counts[..., 0] / counts[..., 1]
    return np.asarray(scores[..., 1] - scores[..., 0])


def over_seeds(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The difference of two recipes' mean scores, one score a training run, with Welch's 95 % interval.

    Raises:
        Incomparable: a recipe has a single run, or neither has any spread.
    """
    if min(len(first), len(second)) < 2:
        raise Incomparable("a recipe has a single run")
    if np.ptp(first) == np.ptp(second) == 0:
        raise Incomparable("the seeds have no spread")
    # scipy.stats.ttest_ind would warn of seeds that came to the same score.
    a, b = (np.var(scores, ddof=1) / len(scores) for scores in (first, second))
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    value = float(np.mean(second) - np.mean(first))
    low, high = stats.t.interval(LEVEL, freedom, value, np.sqrt(a + b))
    return Difference(value, (float(low), float(high)))
