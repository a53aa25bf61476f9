"""DPG-Bench's rules, worked by hand, as they should be and as the official code has them."""

from __future__ import annotations

import pytest

from data.errors import UserError
from evaluation.dpg.rules import (
    MPLUG,
    PROMPTS_SHA256,
    Item,
    Question,
    Result,
    is_yes,
    score,
    summarize,
    title,
    zeroed,
    zeroing_order,
)


def item(*parents: tuple[int, ...], categories: tuple[str, ...] = (), name: str = "x") -> Item:
    """Questions 1, 2, ... with these parents."""
    categories = categories or ("entity - whole",) * len(parents)
    questions = enumerate(zip(parents, categories, strict=True), 1)
    return Item(name, "a prompt", tuple(Question(n, f"{n}?", kind, them) for n, (them, kind) in questions))


def answers(*pictures: str) -> list[dict[int, str]]:
    """Of each picture a word of y and n, by question."""
    return [{n: {"y": "yes", "n": "no"}[it] for n, it in enumerate(picture, 1)} for picture in pictures]


CHAIN = item((), (1,), (2,), (), categories=("entity - whole", "attribute - color", "attribute - color", "global -"))
PICTURES = ("nyyy", "yyyy", "ynyn", "yyny")


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        ("yes", True),
        (" Yes.\n", True),
        ("YES", True),
        ("no", False),
        ("yes it is", False),
        ("", False),
        ("eyes", False),
    ],
)
def test_only_yes_counts(answer: str, counts: bool) -> None:
    assert is_yes(answer) is counts


def test_zeros_run_down_the_chain() -> None:
    assert zeroed(CHAIN, {1: 0, 2: 1, 3: 1, 4: 1}) == {1: 0, 2: 0, 3: 0, 4: 1}
    assert zeroed(CHAIN, {1: 1, 2: 0, 3: 1, 4: 0}) == {1: 1, 2: 0, 3: 0, 4: 0}
    assert zeroed(CHAIN, {1: 1, 2: 1, 3: 1, 4: 0}) == {1: 1, 2: 1, 3: 1, 4: 0}


def test_one_parent_of_several_is_enough() -> None:
    both = item((), (), (1, 2))
    assert zeroed(both, {1: 1, 2: 0, 3: 1})[3] == 0
    assert zeroed(both, {1: 0, 2: 1, 3: 1})[3] == 0
    assert zeroed(both, {1: 1, 2: 1, 3: 1})[3] == 1


def test_a_question_above_its_parent_misses_what_zeroes_it_in_parity_alone() -> None:
    upwards = item((2,), (3,), ())
    assert zeroed(upwards, {1: 1, 2: 1, 3: 0}) == {1: 0, 2: 0, 3: 0}
    assert zeroed(upwards, {1: 1, 2: 1, 3: 0}, parity=True) == {1: 1, 2: 0, 3: 0}
    downwards = {1: 0, 2: 1, 3: 1, 4: 1}
    assert zeroed(CHAIN, downwards, parity=True) == zeroed(CHAIN, downwards)


def test_a_circle_is_refused_but_in_parity() -> None:
    circle = item((3,), (1,), (2,))
    with pytest.raises(UserError, match="x: questions .* depend on each other in a circle"):
        zeroing_order(circle)
    assert zeroing_order(circle, parity=True) == [1, 2, 3]
    assert zeroed(circle, {1: 1, 2: 1, 3: 0}, parity=True) == {1: 0, 2: 0, 3: 0}


@pytest.mark.parametrize("parity", [False, True])
def test_a_parent_that_is_not_there_and_no_question_at_all(parity: bool) -> None:
    with pytest.raises(UserError, match="x: question 2 depends on question 7, which is not there"):
        zeroing_order(item((), (7,)), parity)
    with pytest.raises(UserError, match="x has no question"):
        zeroing_order(item(), parity)


def test_a_prompt_worked_by_hand() -> None:
    result = score(CHAIN, answers(*PICTURES))
    assert result["images"] == [0.25, 1.0, 0.25, 0.75]
    assert result["score"] == 0.5625
    assert [it["before"] for it in result["questions"]] == [[0, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert [it["after"] for it in result["questions"]] == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1]]
    assert result["questions"][2]["answers"] == ["yes", "yes", "yes", "no"]
    assert result["questions"][2]["dependency"] == [2]


def test_categories_have_the_totals_footing_and_in_parity_the_last_pictures_before_zeroing() -> None:
    other = item((), (1,), categories=("entity - whole", "attribute - color"), name="y")
    results = [score(CHAIN, answers(*PICTURES)), score(other, answers("yy", "ny", "nn", "ny"))]
    table = summarize(results)
    # The other prompt: entity 1, 0, 0, 0; colour 1, 0, 0, 0 after zeroing.
    assert {name: cell["score"] for name, cell in table["broad"].items()} == {
        "attribute": 100 * (1 + 2 + 1) / 12, "entity": 100 * (3 + 1) / 8, "global": 75.0
    }  # fmt: skip
    assert {name: cell["questions"] for name, cell in table["detailed"].items()} == {
        "attribute - color": 12, "entity - whole": 8, "global -": 4
    }  # fmt: skip
    assert table["total"] == pytest.approx(100 * (0.5625 + (1 + 0 + 0 + 0) / 4) / 2)
    assert table["answers"] == {"yes": 12 + 4, "no": 4 + 4, "other": 0}
    same_total = summarize(results, parity=True)
    assert same_total["total"] == table["total"]
    # The last pictures: yyny and ny, none of them zeroed.
    assert {name: cell["score"] for name, cell in same_total["broad"].items()} == {
        "attribute": pytest.approx(100 * (1 + 0 + 1) / 3), "entity": 50.0, "global": 100.0
    }  # fmt: skip


def results_of(scores: list[int], category: str = "entity - whole") -> list[Result]:
    return [score(item((), categories=(category,)), answers("y" if right else "n")) for right in scores]


def test_intervals_are_those_of_a_mean_over_prompts() -> None:
    low, high = summarize(results_of([0, 1] * 200))["interval"]
    half = 100 * 1.96 * 0.5 / 400**0.5
    assert (low, high) == (pytest.approx(50 - half, abs=0.7), pytest.approx(50 + half, abs=0.7))
    assert summarize(results_of([0, 1]))["interval"] == [0, 100]
    assert summarize(results_of([1] * 9))["interval"] == [100, 100]


def test_a_category_is_resampled_by_prompts_too_and_none_without_it_counts() -> None:
    table = summarize([*results_of([0, 1] * 50), *results_of([1], "global -")])
    assert table["broad"]["entity"]["interval"] == pytest.approx([40.2, 59.8], abs=1.5)
    assert table["broad"]["global"] == {"score": 100, "interval": [100, 100], "questions": 1}


def test_answers_that_are_neither_yes_nor_no_are_counted() -> None:
    odd = score(item((), ()), [{1: "Yes, a dog", 2: "No."}])
    assert odd["score"] == 0
    assert summarize([odd])["answers"] == {"yes": 0, "no": 1, "other": 1}


def test_only_the_official_judge_on_all_published_prompts_makes_it_dpg_bench() -> None:
    assert title(MPLUG, 1065, 1065, PROMPTS_SHA256) == "DPG-Bench"
    assert title(MPLUG, 1064, 1065, PROMPTS_SHA256) == "DPG-Bench, 1064 of 1065 prompts"
    assert title("a/judge", 1065, 1065, PROMPTS_SHA256) == "DPG questions, judged by a/judge"
    assert title("a/judge", 7, 1065, PROMPTS_SHA256) == "DPG questions, judged by a/judge, 7 of 1065 prompts"
    # As many, but in other words.
    others = f"DPG questions about other prompts, judged by {MPLUG}, 1065 of 1065 prompts"
    assert title(MPLUG, 1065, 1065, "0" * 64) == others
