"""Scenes: captions agree with the ground truth and the ground truth with the pixels."""

import re
from collections import Counter

import cv2
import numpy as np
import pytest

from data.packing import shapes
from data.packing.shapes import BACKGROUND, COLORS, HELDOUT_START, PALETTE, SHAPES, TASKS, Scene, cover, draw, scene

SCENES = [scene(7, index) for index in range(900)]
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
PLURALS = {"crosses": "cross"} | {f"{s}s": s for s in SHAPES if s != "cross"}


def parse(caption):
    """The caption read back, by other means than those that wrote it: [(count, color, shape)], relation."""
    rest = caption.removeprefix("a photo of ")
    assert rest != caption
    first, joint, second = re.fullmatch(r"(.+?)(?: (and|left of|right of|above|below) (.+))?", rest).groups()
    found = []
    for words in filter(None, (first, second)):
        number, *color, noun = words.split()
        count = NUMBERS[number]
        assert (number == "an") == (count == 1 and (color or [noun])[0][0] in "aeiou")
        assert len(color) <= 1
        found.append((count, color[0] if color else None, noun if count == 1 else PLURALS[noun]))
    return found, joint


def one_by_one(it: Scene, size: int):
    """The mask of each object drawn alone: every pixel it touches at all."""
    masks = []
    for obj in it.objects:
        mask = np.zeros((size, size), np.uint8)
        rows, columns, coverage = cover(obj, size)
        mask[rows, columns] = coverage > 0
        masks.append(mask)
    return masks


def test_eight_and_eight_and_the_colours_lie_apart():
    assert len(SHAPES) == len(COLORS) == 8
    swatches = np.float32([*PALETTE.values(), BACKGROUND])[None] / 255
    lab = cv2.cvtColor(swatches, cv2.COLOR_RGB2Lab)[0]
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distance[~np.eye(9, dtype=bool)].min() > 45


def test_captions_agree_with_the_objects():
    for it in SCENES:
        phrases, joint = parse(it.caption)
        assert Counter(o.shape for o in it.objects) == Counter({s: n for n, _, s in phrases})
        for _, color, shape in phrases:
            colors = {o.color for o in it.objects if o.shape == shape}
            assert len(colors) == 1 and (color is None or colors == {color}), it.caption
        if len(phrases) == 2:
            assert phrases[0][2] != phrases[1][2] and it.objects[0].color != it.objects[1].color
        groups = [g for g, (count, _, _) in enumerate(phrases) for _ in range(count)]
        assert [o["group"] for o in it.truth()["objects"]] == groups
        assert joint in ((None,) if len(phrases) == 1 else ("and", it.relation))


def test_every_task_asks_what_its_name_says():
    for it in SCENES:
        phrases, joint = parse(it.caption)
        named = [color is not None for _, color, _ in phrases]
        counts = [count for count, _, _ in phrases]
        expected = {
            "single_object": counts == [1] and named == [False],
            "colors": counts == [1] and named == [True],
            "two_object": counts == [1, 1] and joint == "and" and not any(named),
            "color_attr": counts == [1, 1] and joint == "and" and all(named),
            "counting": len(counts) == 1 and 2 <= counts[0] <= 4,
            "position": counts == [1, 1] and joint not in ("and", None) and len(set(named)) == 1,
        }
        assert [task for task, holds in expected.items() if holds] == [it.task], it.caption


def test_tasks_come_equally_often_in_no_fixed_order():
    assert Counter(it.task for it in SCENES) == dict.fromkeys(TASKS, 150)
    assert len({tuple(it.task for it in SCENES[i : i + 6]) for i in range(0, 900, 6)}) > 50


def test_all_shapes_colours_numbers_and_relations_come_up():
    assert len({(o.shape, o.color) for it in SCENES for o in it.objects}) == len(SHAPES) * len(COLORS)
    assert {it.relation for it in SCENES} == {None, "left of", "right of", "above", "below"}
    assert {len(it.objects) for it in SCENES} == {1, 2, 3, 4}
    named = [it.groups[0].color is not None for it in SCENES if it.task in ("position", "counting")]
    assert 0.4 < np.mean(named) < 0.6


def geneval_relations(a, b):
    """evaluate_images.relative_position of GenEval: where a is, seen from b; boxes (x0, y0, x1, y1)."""
    boxes = np.array([a, b]).reshape(2, 2, 2)
    center_a, center_b = boxes.mean(axis=1)
    dim_a, dim_b = np.abs(np.diff(boxes, axis=1))[:, 0, :]
    offset = center_a - center_b
    revised = np.maximum(np.abs(offset) - 0.1 * (dim_a + dim_b), 0) * np.sign(offset)
    dx, dy = revised / np.linalg.norm(offset)
    held = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {name for name, amount in held.items() if amount > 0.5}, max(held.values())


def test_positions_hold_by_genevals_rule_with_a_margin():
    placed = [it for it in SCENES if it.relation]
    assert len(placed) == 150
    for it in placed:
        held, amount = geneval_relations(it.objects[0].box, it.objects[1].box)
        assert held == {it.relation} and amount > 0.6, it.caption
        assert it.objects[0].shape == parse(it.caption)[0][0][2]


@pytest.mark.parametrize("size", [32, 64])
def test_objects_neither_touch_nor_leave_the_frame(size):
    for it in SCENES[:400]:
        masks = one_by_one(it, size)
        # A ring of one pixel more around an object touches no other: there is clear ground between them.
        grown = [cv2.dilate(m, np.ones((3, 3), np.uint8)) for m in masks]
        for n, mask in enumerate(grown):
            assert not any((mask & other).any() for m, other in enumerate(masks) if m != n), it.caption
            assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()), it.caption


def test_boxes_are_those_of_the_pixels():
    size = 256
    for it in SCENES[:60]:
        for obj, mask in zip(it.objects, one_by_one(it, size), strict=True):
            y, x = np.nonzero(mask)
            seen = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert np.abs(seen - np.array(obj.box) * size).max() <= 1.2
            assert max(obj.box[2] - obj.box[0], obj.box[3] - obj.box[1]) == pytest.approx(obj.side)


@pytest.mark.parametrize("size", [32, 64, 256])
def test_pixels_have_the_palettes_colours(size):
    for it in SCENES[:60]:
        image, masks = draw(it, size), one_by_one(it, size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        for obj in it.objects:
            rows, columns, coverage = cover(obj, size)
            solid = coverage == 255
            assert solid.sum() > 0.2 * (coverage > 0).sum()
            assert (image[rows, columns][solid] == PALETTE[obj.color]).all()
            if obj.shape not in ("ring", "crescent"):
                x, y = (int(v * size) for v in obj.center)
                assert tuple(image[y, x]) == PALETTE[obj.color]
        assert (image[sum(masks) == 0] == BACKGROUND).all()


def test_areas_are_those_of_the_shapes():
    disc = np.pi / 4
    areas = {"circle": disc, "square": 1.0, "triangle": 0.45, "ring": disc * (1 - 0.55**2), "cross": 0.51}
    for shape, area in areas.items():
        covered = cover(shapes.Object(shape, "red", (0.5, 0.5), 0.5, 0), 512)[2].sum() / 255 / 256**2
        assert covered == pytest.approx(area, rel=0.02), shape


def test_a_scene_is_a_function_of_seed_and_index():
    again = [scene(7, index) for index in reversed(range(900))][::-1]
    assert again == SCENES
    assert sum(scene(8, i).objects == SCENES[i].objects for i in range(100)) == 0
    assert len({it.objects for it in SCENES}) == len(SCENES)
    assert (draw(SCENES[3], 64) == draw(again[3], 64)).all()
    heldout = {scene(7, HELDOUT_START + i).objects for i in range(100)}
    assert not heldout & {it.objects for it in SCENES}


def test_phrases():
    assert shapes.phrase(shapes.Group(1, "circle", "orange")) == "an orange circle"
    assert shapes.phrase(shapes.Group(1, "circle", None)) == "a circle"
    assert shapes.phrase(shapes.Group(3, "cross", None)) == "three crosses"
    assert shapes.phrase(shapes.Group(2, "star", "red")) == "two red stars"
