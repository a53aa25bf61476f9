"""The proving ground's detector: drawn scenes are read exactly, what is no shape is not taken for one."""

from collections import Counter

import cv2
import numpy as np
import pytest
from spoiled_shapes import disturbed, drawn, spoiled_pictures

from data.errors import UserError
from data.packing.shapes import BACKGROUND, COLORS, HELDOUT_START, PALETTE, SHAPES, Object, Scene, draw, scene
from evaluation.proving import detector as shapes_detector
from evaluation.proving.detector import ShapeDetector

DETECTOR = ShapeDetector()
LEAST = DETECTOR.thresholds.score
RED, BLUE, PINK = (PALETTE[name] for name in ("red", "blue", "pink"))


def accepted(image):
    return [it for it in DETECTOR.detect(image) if it.score > LEAST]


def of_objects(*objects):
    return draw(Scene(0, 0, "", (), None, objects), 32)


def ground(size=32):
    return np.full((size, size, 3), BACKGROUND, np.uint8)


def read_exactly(it, image, size):
    """Whether the objects found are those drawn: shapes, colours, and boxes within a pixel of 32."""
    found = accepted(image)
    told = sorted(zip(((d.label, d.box) for d in found), DETECTOR.colors(image, found), strict=True))
    asked = sorted(((o.shape, o.box), o.color) for o in it.objects)
    if [(label, color) for (label, _), color in told] != [(shape, color) for (shape, _), color in asked]:
        return False
    return all(min(away(d, o, size) for d in found if d.label == o.shape) < 1 / 32 for o in it.objects)


def away(detection, obj, size):
    return np.abs(np.array(detection.box) / size - np.array(obj.box)).max()


@pytest.mark.parametrize(
    "size, count, blur, noise",
    [(32, 2000, 0, 0), (32, 500, 0.5, 0), (32, 500, 0, 6), (32, 2000, 0.5, 6), (64, 200, 0, 0), (64, 200, 0.5, 6)],
)
def test_drawn_scenes_are_read_exactly(size, count, blur, noise):
    """Blurred by so many pixels, with noise of so many levels; all four for 2,000 scenes are a benchmark."""
    rng = np.random.default_rng(0)
    right = []
    for index in range(count):
        it = scene(1, HELDOUT_START + index)
        right.append(read_exactly(it, disturbed(draw(it, size), rng, blur, noise), size))
    assert np.mean(right) >= 0.99


def test_soft_edges_are_forgiven():
    rng = np.random.default_rng(0)
    scenes = [scene(1, HELDOUT_START + index) for index in range(300)]
    assert np.mean([read_exactly(it, disturbed(draw(it, 32), rng, 0.7, 0), 32) for it in scenes]) > 0.96


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_most_like_itself_by_far(shape, monkeypatch):
    images = [of_objects(Object(shape, "blue", (0.5, 0.48), side, 0)) for side in (0.28, 0.32, 0.36, 0.5)]
    own = [DETECTOR.detect(image)[0].score for image in images]
    monkeypatch.setattr(shapes_detector, "SHAPES", tuple(name for name in SHAPES if name != shape))
    others = [DETECTOR.detect(image)[0].score for image in images]
    assert min(own) > 0.9 and max(others) < 0.88 and np.min(np.subtract(own, others)) > 0.07


@pytest.fixture(scope="module")
def spoiled():
    return spoiled_pictures(100)


@pytest.mark.parametrize(
    "kind, most",
    [
        ("half", 4),
        ("a third missing", 4),
        ("a quarter missing", 4),
        ("mean of two", 16),
        ("two, half overlapping", 4),
        ("two, hardly overlapping", 4),
        ("stretched 1.4", 1),
        ("stretched 1.6", 0),
        ("turned by 45 degrees", 1),
        ("upside down", 0),
        ("blob", 12),
    ],
)
def test_spoiled_shapes_are_refused(spoiled, kind, most):
    """At most so many of 100 are accepted as anything: what is cut off a triangle may leave one, stars may not meet."""
    assert sum(bool(accepted(image)) for image, _ in spoiled[kind]) <= most


@pytest.mark.parametrize("kind, least", [("unsteady by 0.25 px", 98), ("unsteady by 0.5 px", 80)])
def test_an_unsteady_hand_is_forgiven(spoiled, kind, least):
    assert sum([it.label for it in accepted(image)] == [shape] for image, shape in spoiled[kind]) >= least


def test_a_circle_half_of_which_is_missing_is_none():
    image = of_objects(Object("circle", "red", (0.5, 0.5), 0.4, 0))
    for half in (np.s_[:16], np.s_[16:], np.s_[:, :16], np.s_[:, 16:]):
        cut = image.copy()
        cut[half] = BACKGROUND
        assert [it.label for it in accepted(image)] == ["circle"] and not accepted(cut)


def test_a_circle_of_two_colours_is_none():
    image = of_objects(Object("circle", "red", (0.5, 0.5), 0.4, 0))
    blue = of_objects(Object("circle", "blue", (0.5, 0.5), 0.4, 0))
    image[:, 16:] = blue[:, 16:]
    assert len(DETECTOR.detect(image)) == 2 and not accepted(image)


def test_pixels_of_other_colours_count_against_an_object():
    """Black ones lie far on the way from the ground to red, but beside it."""
    image = of_objects(Object("circle", "red", (0.5, 0.5), 0.45, 0))
    peppered = image.copy()
    peppered[10:22:2, 10:22:2] = PALETTE["black"]
    before, after = (DETECTOR.detect(it)[0].score for it in (image, peppered))
    assert before > 0.95 and after < before - 0.07


def test_a_ring_whose_hole_has_a_colour_is_no_circle():
    ring = Object("ring", "green", (0.5, 0.5), 0.5, 0)
    found = accepted(of_objects(Object("circle", "black", (0.5, 0.5), 0.26, 0), ring))
    assert sorted(it.label for it in found) == ["circle", "ring"]


def test_shapes_of_one_colour_that_touch_are_none_and_of_two_colours_they_are_two():
    left, right = (Object("square", "red", (x, 0.5), 0.3, 0) for x in (0.345, 0.655))
    assert not accepted(of_objects(left, right))
    right = Object("square", "blue", right.center, right.side, 1)
    assert [it.label for it in accepted(of_objects(left, right))] == ["square", "square"]


@pytest.mark.parametrize("size", [32, 64])
def test_what_is_no_picture_of_anything_has_no_objects(size):
    rng = np.random.default_rng(0)
    assert DETECTOR.detect(ground(size)) == []
    for color in PALETTE.values():
        assert DETECTOR.detect(np.full((size, size, 3), color, np.uint8)) == []
    for _ in range(50):
        assert not accepted(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        assert not accepted(disturbed(ground(size), rng, 0, 30))


def test_what_hardly_shows_is_no_object():
    pale = ground()
    pale[:] = 170, 124, 170
    faint = drawn("circle", (0.5, 0.5), 0.4)
    for contrast, labels in ((9, []), (60, ["circle"])):
        amount = cv2.resize(faint, (32, 32), interpolation=cv2.INTER_AREA)[..., None] * (0.4, 1, 0.4) * contrast
        image = np.uint8(np.rint(pale - amount))
        assert shapes_detector.segment(image)[16, 16] == 1 + COLORS.index("purple")
        assert [it.label for it in accepted(image)] == labels


def test_specks_are_no_objects_and_change_none():
    it = scene(1, HELDOUT_START)
    image = draw(it, 32)
    image[0:3, 0:3] = PALETTE["black"]
    assert read_exactly(it, image, 32)


@pytest.mark.parametrize("color", COLORS)
def test_colours_are_named_in_other_shades_and_on_other_ground(color):
    image = of_objects(*(Object(shape, color, (0.5, 0.5), 0.4, 0) for shape in ("ring",))).astype(np.float32)
    shaded = np.uint8(np.clip(image * 0.93 + 4, 0, 255))
    for each in (np.uint8(image), shaded):
        found = accepted(each)
        assert [it.label for it in found] == ["ring"] and DETECTOR.colors(each, found) == [color]


def test_an_objects_mask_are_its_pixels_and_its_box_is_finer_than_they():
    obj = Object("square", "blue", (0.52, 0.49), 0.4, 0)
    found = DETECTOR.detect(of_objects(obj))[0]
    y, x = np.nonzero(found.mask)
    assert found.mask.shape == (32, 32) and found.mask.dtype == bool
    assert np.abs(np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) - np.array(obj.box) * 32).max() <= 0.6
    assert np.abs(np.array(found.box) - np.array(obj.box) * 32).max() <= 0.3


def test_the_same_threshold_for_all_tasks_and_it_is_published():
    assert DETECTOR.thresholds.counting == LEAST == DETECTOR.identity["accepted"] == 0.86


def test_counter_of_all_pairs():
    """Every shape in every colour, alone."""
    told = Counter()
    for shape in SHAPES:
        for color in COLORS:
            image = of_objects(Object(shape, color, (0.47, 0.55), 0.42, 0))
            found = accepted(image)
            told[tuple(it.label for it in found) == (shape,) and DETECTOR.colors(image, found) == [color]] += 1
    assert told == {True: 64}


def test_pictures_that_are_no_squares_are_refused():
    with pytest.raises(UserError, match="in squares, not in 32 x 64 pixels"):
        ShapeDetector().detect(np.full((32, 64, 3), BACKGROUND, np.uint8))
