"""GenEval's rules, case by case: on each limit, just past it, and what follows when one item fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from drawn_objects import BLANK, FakeDetector, thing
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.geneval.prompts import RELATIONS, Metadata
from evaluation.geneval.rules import Box, Detection, Thresholds, Verdict, counting, judge, of_class, relative_position


def asking(*include: dict[str, Any], exclude: tuple[str, int] | None = None, tag: str = "two_object") -> Metadata:
    asked = {"tag": tag, "include": list(include), "prompt": "a photo"}
    return {**asked, "exclude": [{"class": exclude[0], "count": exclude[1]}]} if exclude else asked


def item(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


def verdict(metadata: Metadata, objects: Sequence[Detection], colors: Sequence[str] = ()) -> Verdict:
    found = judge(metadata, BLANK, FakeDetector(objects, colors))
    assert found.correct == (found.reason == "")
    return found


# ---- what counts


@pytest.mark.parametrize(("tag", "least"), [("single_object", 0.3), ("color_attr", 0.3), ("counting", 0.9)])
def test_an_object_counts_above_the_threshold_of_its_task_and_not_at_it(tag: str, least: float) -> None:
    at, above = thing("dog", least), thing("dog", math.nextafter(least, 1))
    assert counting([at], tag, Thresholds()) == ()
    assert counting([at, above], tag, Thresholds()) == (above,)
    assert not verdict(asking(item("dog"), tag=tag), [at]).correct
    assert verdict(asking(item("dog"), tag=tag), [above]).correct


def test_of_each_class_the_sixteen_most_confident_count() -> None:
    dogs = [thing("dog", 0.5 + i / 100) for i in range(17)]
    cat = thing("cat", 0.4)
    counted = counting([cat, *dogs], "counting", Thresholds(counting=0.3))
    assert [it.score for it in counted] == [it.score for it in (*dogs[:0:-1], cat)]
    assert len(of_class(counted, "dog")) == 16
    assert len(of_class(counted, "cat")) == 1
    assert not verdict(asking(item("dog", 17)), dogs).correct
    assert verdict(asking(item("dog", 16)), dogs).correct
    assert verdict(asking(item("dog"), exclude=("dog", 17)), dogs).correct  # as the official code has it


def test_thresholds_are_the_detector_s() -> None:
    detector = FakeDetector([thing("dog", 0.5)])
    assert judge(asking(item("dog")), BLANK, detector).correct
    detector.thresholds = Thresholds(score=0.5)
    assert not judge(asking(item("dog")), BLANK, detector).correct
    # Squares of 10 px whose centres are 4 px apart: 0.1 of their extents is half of that, and too much.
    left = asking(item("cat"), item("dog", position=["left of", 0]))
    detector = FakeDetector([square("dog", 20, 20), square("cat", 24, 20)])
    assert not judge(left, BLANK, detector).correct
    detector.thresholds = Thresholds(position=0.09)
    assert judge(left, BLANK, detector).correct


def test_a_verdict_tells_of_all_that_counts_whatever_was_asked_for() -> None:
    cat, dog, faint = thing("cat", 0.4), thing("dog", 0.6), thing("dog", 0.2)
    assert verdict(asking(item("bird")), [faint, cat, dog]).used == (dog, cat)


# ---- include and exclude


def test_as_many_as_asked_for_or_more_are_right() -> None:
    two = asking(item("dog", 2))
    assert verdict(two, [thing("dog")] * 2).correct
    assert verdict(two, [thing("dog")] * 3).correct
    assert verdict(two, [thing("dog"), thing("cat")]).reason == "dog: 2 expected, 1 found"
    assert verdict(two, []).reason == "dog: 2 expected, 0 found"


def test_every_item_has_to_be_there_and_each_that_is_not_is_told() -> None:
    both = asking(item("dog"), item("cat"))
    assert verdict(both, [thing("cat"), thing("dog")]).correct
    assert verdict(both, [thing("dog")]).reason == "cat: 1 expected, 0 found"
    assert verdict(both, [thing("bird")]).reason == "dog: 1 expected, 0 found\ncat: 1 expected, 0 found"


def test_exclude_fails_at_its_count() -> None:
    two = asking(item("dog", 2), exclude=("dog", 3), tag="counting")
    assert verdict(two, [thing("dog")] * 2).correct
    assert verdict(two, [thing("dog")] * 3).reason == "dog: fewer than 3 expected, 3 found"
    assert verdict(two, [thing("dog")] * 5).reason == "dog: fewer than 3 expected, 5 found"
    assert verdict(two, [thing("dog")] * 2 + [thing("dog", 0.9)]).correct  # at the threshold of counting
    assert verdict(two, [thing("dog")] * 2 + [thing("cat")] * 3).correct


def test_exclude_is_looked_at_when_include_has_failed() -> None:
    asked = asking(item("dog"), exclude=("cat", 1))
    assert verdict(asked, [thing("cat")]).reason == "dog: 1 expected, 0 found\ncat: fewer than 1 expected, 1 found"


# ---- colour


def test_the_most_confident_have_to_have_the_colour() -> None:
    red = asking(item("dog", color="red"))
    sure, unsure = thing("dog", 0.8), thing("dog", 0.7)
    assert verdict(red, [unsure, sure], ["blue", "red"]).correct
    assert verdict(red, [unsure, sure], ["red", "blue"]).reason == "dog: 1 red expected, 1 blue found"


def test_fewer_of_the_colour_than_asked_for_fail() -> None:
    two = asking(item("dog", 2, color="red"))
    dogs = [thing("dog", 0.9), thing("dog", 0.8), thing("dog", 0.7)]
    assert verdict(two, dogs, ["red", "red", "blue"]).correct
    # The third is not looked at, though with it there would be two.
    assert verdict(two, dogs, ["red", "blue", "red"]).reason == "dog: 2 red expected, 1 red, 1 blue found"


def test_colours_are_asked_for_only_where_the_prompt_names_one_and_enough_were_found() -> None:
    dogs, cat = [thing("dog", 0.6), thing("dog", 0.7), thing("dog", 0.8)], thing("cat")
    detector = FakeDetector([*dogs, cat], ["red"] * 4)
    asked = asking(item("cat"), item("dog", 4, color="red"), item("dog", 2, color="red"))
    assert judge(asked, BLANK, detector).reason == "dog: 4 expected, 3 found"
    assert [[it.score for it in objects] for objects in detector.asked] == [[0.8, 0.7]]


# ---- position: objects are squares of 10 px, so a distance is reduced by 0.1 x (10 + 10) = 2 px


def square(label: str, x: float, y: float, score: float = 0.95) -> Detection:
    return thing(label, score, (x - 5, y - 5, x + 5, y + 5))


def test_every_object_found_has_to_be_there_seen_from_every_target() -> None:
    asked = asking(item("cat", 2), item("dog", 2, position=["left of", 0]))
    cats, dogs = [square("cat", 40, 30), square("cat", 50, 30)], [square("dog", 10, 30), square("dog", 20, 30)]
    assert verdict(asked, cats + dogs).correct
    wrong = "dog: left of the cat expected, right of found"
    assert verdict(asked, [*cats, dogs[0], square("dog", 60, 30)]).reason == wrong
    assert verdict(asked, [*dogs, cats[0], square("cat", 5, 30)]).reason == wrong
    nowhere = "dog: left of the cat expected, in no clear position to it found"
    assert verdict(asked, [*dogs, cats[0], square("cat", 20, 30)]).reason == nowhere


def test_only_the_most_confident_are_placed_and_placed_by() -> None:
    asked = asking(item("cat"), item("dog", position=["above", 0]))
    sure = [square("cat", 30, 40), square("dog", 30, 20)]
    assert verdict(asked, [*sure, square("cat", 30, 5, 0.5), square("dog", 30, 60, 0.5)]).correct
    assert not verdict(asked, [*sure, square("cat", 30, 5, 0.99)]).correct
    assert not verdict(asked, [*sure, square("dog", 30, 60, 0.99)]).correct


def test_diagonally_two_relations_hold() -> None:
    objects = [square("cat", 20, 20), square("dog", 40, 40)]
    for relation, right in zip(RELATIONS, (False, True, False, True), strict=True):
        found = verdict(asking(item("cat"), item("dog", position=[relation, 0])), objects)
        assert found.reason == ("" if right else f"dog: {relation} the cat expected, below and right of found")


def test_an_item_that_fails_is_no_target() -> None:
    beside = item("dog", position=["left of", 0])
    no_target = "dog: left of a cat expected, but there is no cat that is as asked for"
    dog, cat = square("dog", 10, 30), square("cat", 40, 30)
    assert verdict(asking(item("cat", 2), beside), [dog, cat]).reason == f"cat: 2 expected, 1 found\n{no_target}"
    assert (
        verdict(asking(item("cat", color="red"), beside), [dog, cat], ["red", "blue"]).reason
        == f"cat: 1 red expected, 1 blue found\n{no_target}"
    )
    # A third that is placed by the second, which is in the wrong place: as if the second were not there.
    chain = asking(item("cat"), item("dog", position=["right of", 0]), item("bird", position=["above", 1]))
    assert verdict(chain, [dog, cat, square("bird", 10, 10)]).reason == (
        "dog: right of the cat expected, left of found\n"
        "bird: above a dog expected, but there is no dog that is as asked for"
    )


def test_the_target_is_the_item_of_that_number() -> None:
    objects = [square("cat", 10, 30), square("dog", 30, 30), square("bird", 20, 30)]
    for target, right in enumerate((False, True)):
        asked = asking(item("cat"), item("dog"), item("bird", position=["left of", target]))
        assert verdict(asked, objects).correct == right


def test_too_few_or_a_wrong_colour_is_told_and_the_place_not_looked_at() -> None:
    asked = asking(item("cat"), item("dog", color="red", position=["left of", 0]))
    cat, dog = square("cat", 10, 30), square("dog", 40, 30)
    assert verdict(asked, [cat]).reason == "dog: 1 expected, 0 found"
    assert verdict(asked, [cat, dog], ["red", "blue"]).reason == "dog: 1 red expected, 1 blue found"
    assert verdict(asked, [cat, dog], ["red", "red"]).reason == "dog: left of the cat expected, right of found"


def around(x: float, y: float, width: float, height: float) -> Box:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


AT_ORIGIN = around(0, 0, 10, 10)


@pytest.mark.parametrize(
    ("dx", "dy", "relation"), [(-1, 0, "left of"), (1, 0, "right of"), (0, -1, "above"), (0, 1, "below")]
)
def test_on_an_axis_half_of_the_distance_has_to_be_left(dx: int, dy: int, relation: str) -> None:
    def at(distance: float) -> set[str]:
        return relative_position(around(dx * distance, dy * distance, 10, 10), AT_ORIGIN, 0.1)

    assert at(4) == set()  # (4 - 2) / 4 is 0.5
    assert at(4.001) == {relation}
    assert at(2) == at(1) == at(0) == set()


def test_off_the_axes_the_norm_is_that_of_both_and_each_axis_has_its_extents() -> None:
    # Centres are (4, 3) apart, 5 px: more than 2.5 must be left on an axis. Heights 1 + 1 leave 2.8 below.
    assert relative_position(around(4, 3, 8, 1), around(0, 0, 7, 1), 0.1) == {"below"}  # 4 - 0.1 x 15 = 2.5
    assert relative_position(around(4, 3, 7, 1), around(0, 0, 7, 1), 0.1) == {"right of", "below"}  # 2.6
    assert relative_position(around(4, 3, 7, 3), around(0, 0, 7, 2), 0.1) == {"right of"}  # 3 - 0.1 x 5 = 2.5
    assert relative_position(around(4, 3, 8, 3), around(0, 0, 7, 2), 0.1) == set()


def test_the_distance_divides_before_its_reduction() -> None:
    # 5 - 0.1 x 40 = 1 px is left, all of it to the right, but only a fifth of the distance.
    assert relative_position(around(5, 0, 20, 20), around(0, 0, 20, 20), 0.1) == set()


def test_less_than_a_thousandth_of_a_pixel_is_nowhere() -> None:
    assert relative_position(around(0.0009, 0, 2, 2), around(0, 0, 2, 2), 0) == set()
    assert relative_position(around(0.0011, 0, 2, 2), around(0, 0, 2, 2), 0) == {"right of"}


COORDINATE, EXTENT = st.integers(-40, 40), st.integers(1, 30)
BOX = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), COORDINATE, COORDINATE, EXTENT, EXTENT)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TURNED = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}


@settings(max_examples=300, deadline=None)
@given(BOX, BOX, st.sampled_from([0.0, 0.1, 0.25]))
def test_positions_turn_with_the_picture(a: Box, b: Box, share: float) -> None:
    relations = relative_position(a, b, share)
    assert relative_position(b, a, share) == {OPPOSITE[it] for it in relations}
    turned = [(y0, x0, y1, x1) for x0, y0, x1, y1 in (a, b)]
    assert relative_position(turned[0], turned[1], share) == {TURNED[it] for it in relations}
    moved = [(x0 + 7, y0 - 3, x1 + 7, y1 - 3) for x0, y0, x1, y1 in (a, b)]
    assert relative_position(moved[0], moved[1], share) == relations
    assert not any(OPPOSITE[it] in relations for it in relations)
    assert relations <= relative_position(a, b, 0)


@settings(max_examples=300, deadline=None)
@given(BOX, BOX)
def test_without_a_reduction_a_relation_is_an_angle_below_60_degrees(a: Box, b: Box) -> None:
    dx, dy = a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]
    degrees = math.degrees(math.atan2(dy, dx))
    # Twice the distances are whole numbers, so none lies at exactly 60 degrees.
    near = {
        name: abs((degrees - axis + 180) % 360 - 180) < 60
        for name, axis in (("right of", 0), ("below", 90), ("left of", 180), ("above", -90))
    }
    expected = {name for name, is_near in near.items() if is_near} if (dx, dy) != (0, 0) else set()
    assert relative_position(a, b, 0) == expected


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(BOX, min_size=2, max_size=6))
def test_the_order_in_which_a_detector_tells_means_nothing(random: Any, boxes: list[Box]) -> None:
    objects = [thing(("cat", "dog")[i % 2], 0.4 + i / 100, box) for i, box in enumerate(boxes)]
    colors = ["red" if i % 3 else "blue" for i in range(len(objects))]
    asked = asking(item("cat", 2, color="red"), item("dog", position=["left of", 0]), exclude=("dog", 3))
    shuffled = random.sample(list(zip(objects, colors, strict=True)), len(objects))
    again = judge(asked, BLANK, FakeDetector([it for it, _ in shuffled], [color for _, color in shuffled]))
    assert again == judge(asked, BLANK, FakeDetector(objects, colors))
