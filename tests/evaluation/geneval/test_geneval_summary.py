"""GenEval's scores worked by hand, and intervals against what theory says of them."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from data.errors import UserError
from evaluation.geneval.prompts import TASKS
from evaluation.geneval.summary import Result, summarize
from evaluation.stats import bootstrap


def lines(task: str, *of_prompts: str) -> list[Result]:
    """Results by prompts, an image a letter: "+--+" is a prompt of four images, two of them correct."""
    found = []
    for number, images in enumerate(of_prompts):
        metadata = json.dumps({"tag": task, "include": [], "prompt": f"{task} {number}"})
        found += [{"tag": task, "metadata": metadata, "correct": image == "+"} for image in images]
    return found


def test_tasks_are_means_over_images_and_the_overall_score_the_mean_over_tasks() -> None:
    summary = summarize(lines("colors", "+", "---") + lines("counting", "++++", "++--", "----"))
    assert summary["tasks"]["colors"]["score"] == 1 / 4  # not 1 / 2, the mean over prompts
    assert summary["tasks"]["counting"]["score"] == 1 / 2
    assert summary["overall"] == 3 / 8
    assert summary["correct_images"] == 7 / 16
    assert summary["correct_prompts"] == 3 / 5
    assert (summary["images"], summary["prompts"]) == (16, 5)
    sizes = {task: (told["prompts"], told["images"]) for task, told in summary["tasks"].items()}
    assert sizes == {"counting": (3, 12), "colors": (2, 4)}
    assert json.loads(json.dumps(summary)) == summary


def test_absent_tasks_are_told_and_left_out_of_the_mean() -> None:
    summary = summarize(lines("position", "+-"))
    assert list(summary["tasks"]) == ["position"]
    assert summary["absent_tasks"] == [task for task in TASKS if task != "position"]
    assert summary["overall"] == 1 / 2
    assert summarize([it for task in TASKS for it in lines(task, "+-")])["absent_tasks"] == []


def test_any_tag_is_a_task() -> None:
    summary = summarize(lines("shading", "+-") + lines("colors", "++"))
    assert {task: it["score"] for task, it in summary["tasks"].items()} == {"colors": 1.0, "shading": 0.5}
    assert summary["overall"] == 0.75 and "shading" not in summary["absent_tasks"]


def test_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no results"):
        summarize([])


def test_a_prompt_is_resampled_with_all_its_images() -> None:
    resampled = bootstrap([[True] * 3, [False]], key_=1)
    values, counts = np.unique(resampled, return_counts=True)
    assert values.tolist() == [0, 0.75, 1]
    assert np.abs(counts / len(resampled) - [0.25, 0.5, 0.25]).max() < 0.05
    # Each prompt does as well as any other: no draw of prompts changes the score.
    assert summarize(lines("colors", *["+--+"] * 20))["tasks"]["colors"]["interval"] == [0.5, 0.5]


def half_width(interval: list[float]) -> float:
    return (interval[1] - interval[0]) / 2


def test_intervals_are_as_wide_as_the_binomial_law_says() -> None:
    p, n = 0.3, 100
    outcomes = ["++++" if i < p * n else "----" for i in range(n)]
    summary = summarize([it for task in TASKS for it in lines(task, *outcomes)])
    expected = 1.96 * math.sqrt(p * (1 - p) / n)
    for told in summary["tasks"].values():
        assert half_width(told["interval"]) == pytest.approx(expected, rel=0.15)
        assert told["interval"][0] < p < told["interval"][1]
    # The tasks are resampled independently, though their outcomes are the same.
    assert half_width(summary["overall_interval"]) == pytest.approx(expected / math.sqrt(6), rel=0.15)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    p, n, trials = 0.6, 60, 300
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(trials):
        outcomes = ["++" if good else "--" for good in rng.random(n) < p]
        low, high = summarize(lines("colors", *outcomes), seed=trial)["overall_interval"]
        held += low <= p <= high
    assert 0.90 <= held / trials <= 0.98


def test_draws_depend_on_the_seed_and_not_on_the_order_of_lines_or_on_other_tasks() -> None:
    rng = random.Random(0)
    colors = lines("colors", *("".join(rng.choice("+-") for _ in range(4)) for _ in range(50)))
    summary = summarize(colors)
    shuffled = rng.sample(colors, len(colors))
    assert summarize(shuffled) == summary
    assert summarize(colors, seed=1)["overall_interval"] != summary["overall_interval"]
    both = summarize(lines("counting", "+-", "--", "++") + colors)
    assert both["tasks"]["colors"] == summary["tasks"]["colors"]
