"""The paired bootstrap: values worked by hand, an independent resampling, and what it must refuse."""

from __future__ import annotations

import numpy as np
import pytest
from made_runs import results

from evaluation.stats import Incomparable, over_seeds, paired_bootstrap


def right(rate: np.ndarray, rng: np.random.Generator) -> list[list[bool]]:
    """Four images a prompt, each correct at the prompt's rate."""
    return [[bool(it) for it in row] for row in rng.uniform(size=(len(rate), 4)) < rate[:, None]]


def test_the_differences_are_those_of_the_scores() -> None:
    a = results("colors", [[True, False]] * 10) + results("counting", [[False, False]] * 20)
    b = results("colors", [[True, True]] * 10) + results("counting", [[False, True]] * 5 + [[False, False]] * 15)
    found = paired_bootstrap(a, b)
    assert found.tasks["colors"].value == 0.5
    assert found.tasks["counting"].value == 0.125
    assert found.overall.value == 0.3125  # the mean of the tasks, not of the prompts
    assert found.prompts == 30
    assert paired_bootstrap(b, a).overall.value == -0.3125


def test_the_interval_is_that_of_resampled_prompts() -> None:
    rng = np.random.default_rng(1)
    a, b = right(rng.uniform(size=60), rng), right(rng.uniform(size=60), rng)
    gains = np.array(b).mean(1) - np.array(a).mean(1)
    drawn = gains[rng.integers(60, size=(40_000, 60))].mean(1)
    expected = np.percentile(drawn, [2.5, 97.5])
    found = paired_bootstrap(results("colors", a), results("colors", b)).overall
    np.testing.assert_allclose(found.interval, expected, atol=0.005)


def test_pairs_see_what_overlapping_intervals_hide() -> None:
    """Five of 90 prompts are gained and none is lost."""
    hopeless = [[False] * 4] * 45 + [[True] * 4] * 45
    gained = [[True] * 4] * 5 + hopeless[5:]
    found = paired_bootstrap(results("colors", hopeless), results("colors", gained)).overall
    assert found.significant and found.interval[1] < 0.12
    assert paired_bootstrap(results("colors", gained), results("colors", hopeless)).overall.significant  # a loss
    half_width = 1.96 * np.sqrt(0.25 / 90)  # of either score by itself
    assert 0.5 + half_width > 0.5 + found.value - half_width  # they overlap


def test_chance_is_called_significant_one_time_in_twenty() -> None:
    rng = np.random.default_rng(0)
    rate = rng.uniform(size=60)
    called = 0
    for _ in range(300):
        a, b = (results("colors", right(rate, rng)) for _ in range(2))
        called += paired_bootstrap(a, b, resamples=400).overall.significant
    assert 0.02 < called / 300 < 0.09


def test_a_model_does_not_differ_from_itself() -> None:
    same = results("colors", [[True, False]] * 20)
    assert paired_bootstrap(same, same).overall.interval == (0, 0)
    assert not paired_bootstrap(same, same).overall.significant


def test_neither_the_order_of_lines_nor_of_files_counts() -> None:
    rng = np.random.default_rng(0)
    a, b = (results("colors", right(rng.uniform(size=40), rng)) for _ in range(2))
    assert paired_bootstrap(a[::-1], b) == paired_bootstrap(a, b)
    one_way, other_way = paired_bootstrap(a, b).overall.interval, paired_bootstrap(b, a).overall.interval
    np.testing.assert_allclose(one_way, [-other_way[1], -other_way[0]])


def test_images_of_one_prompt_belong_together() -> None:
    """Sixteen images of a prompt say less than sixteen prompts: the interval keeps its width."""
    rng = np.random.default_rng(0)
    a, b = (np.array(right(rng.uniform(size=40), rng)) for _ in range(2))
    few, many = (
        paired_bootstrap(results("colors", x), results("colors", y))
        for x, y in ((a, b), (a.repeat(4, 1), b.repeat(4, 1)))
    )
    np.testing.assert_allclose(few.overall.interval, many.overall.interval)


def test_what_cannot_be_said() -> None:
    ten = results("colors", [[True]] * 10)
    with pytest.raises(Incomparable, match="2 of 11 prompts are in one of them alone"):
        paired_bootstrap(ten, [*ten[1:], {**ten[0], "prompt": "another"}])
    with pytest.raises(Incomparable, match="20 of 20 prompts"):
        paired_bootstrap(ten, [{**line, "tag": "counting"} for line in ten])
    with pytest.raises(Incomparable, match="counting has 9 different prompts"):
        paired_bootstrap(*[ten + results("counting", [[True]] * 9)] * 2)
    with pytest.raises(Incomparable, match="no 'correct'"):
        paired_bootstrap(ten, [{"tag": "colors", "prompt": "x"}])
    with pytest.raises(Incomparable, match="no results"):
        paired_bootstrap([], [])


@pytest.mark.parametrize(
    ("first", "second", "t", "deviation"),
    [
        ([0, 1, 2], [2, 3, 4], 2.7764, np.sqrt(2 / 3)),  # equal spreads: 4 degrees of freedom
        ([1, 1, 1], [1, 3, 5], 4.3027, np.sqrt(4 / 3)),  # one has none: 2, where Student's t has 4
    ],
)
def test_welch_by_tables(first: list[float], second: list[float], t: float, deviation: float) -> None:
    found = over_seeds(first, second)
    assert found.value == 2 and not found.significant
    np.testing.assert_allclose(found.interval, [2 - t * deviation, 2 + t * deviation], atol=1e-4)
    assert over_seeds(first, [it + 10 for it in second]).significant


def test_seeds_that_say_nothing() -> None:
    with pytest.raises(Incomparable, match="single run"):
        over_seeds([0.5], [0.6, 0.7])
    with pytest.raises(Incomparable, match="no spread"):
        over_seeds([0.5, 0.5], [0.6, 0.6])
