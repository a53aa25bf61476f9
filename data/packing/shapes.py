"""Compositional scenes with exact ground truth: shapes on a plain ground, captions in GenEval's grammar.

- `scene(seed, index)` is a pure function and knows no pixels; `draw(scene, size)` is pure too.
- GenEval's six tasks are equally frequent: every six consecutive indices hold each of them once.
- A caption names only what is asked for. Where it names no color, the image has one all the same, and the ground truth
  records it.
- The layout is nearly fixed (a 2 x 2 grid with jitter), so a small model learns it in minutes. Where the caption does
  not place two objects, the first one stands on the left: GenEval does not score that, and the model need not guess.
- Two things can be held out of training: scenes, at indices of their own, and captions, by their hash, wherever they
  occur. Of the 16,248 captions, 8 are of a single object and 64 of a color; what such a caption names is in others too.

Lengths are fractions of the image's side, x to the right and y down, (0, 0) the upper left corner.

Source: Ghosh et al., "GenEval" (2023), and its prompts/create_prompts.py and evaluate_images.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data.packing.spec import DatasetSpec, EachItem, Sample, check, check_common, make_sample
from data.randomness import key, permutation, uniform

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}

# All are of GenEval's ten. The nearest two of these nine, the background included, are 47 apart in CIELAB.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 20, 35),
    "orange": (255, 145, 0),
    "yellow": (255, 235, 30),
    "green": (20, 150, 50),
    "blue": (20, 90, 225),
    "purple": (125, 20, 125),
    "pink": (255, 140, 200),
    "black": (20, 20, 20),
}
COLORS = tuple(PALETTE)
BACKGROUND = (208, 208, 208)

# Held-out scenes are the same generator's at other indices, so no training set of any size can reach them.
HELDOUT_START = 10**9

_SINGLE_SIDES = (0.36, 0.50)
_SIDES = (0.28, 0.36)
_SINGLE_JITTER = 0.12
_JITTER = 0.025  # along a row or column of objects: at least 0.46 - 2 * 0.025 - 0.36 = 0.05 stays between two
_FREE_JITTER = 0.08  # across the axis on which two objects are lined up
_LOW, _HIGH = 0.27, 0.73
_DRAWS = 32  # random numbers reserved for a scene
_OVERSAMPLING = 8


@dataclass(frozen=True)
class Group:
    """What one noun phrase of a caption asks for. `color` is None if the caption names none."""

    count: int
    shape: str
    color: str | None


@dataclass(frozen=True)
class Object:
    """One drawn shape. `center` is the middle of its bounding box, `side` that box's longer side."""

    shape: str
    color: str
    center: tuple[float, float]
    side: float
    group: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The tight bounding box (x0, y0, x1, y1)."""
        (x, y), (w, h) = self.center, extent(self.shape)
        return (x - w * self.side / 2, y - h * self.side / 2, x + w * self.side / 2, y + h * self.side / 2)


@dataclass(frozen=True)
class Scene:
    """A caption and its objects. `relation` is the position of groups[0] relative to groups[1]."""

    seed: int
    index: int
    task: str
    groups: tuple[Group, ...]
    relation: str | None
    objects: tuple[Object, ...]

    @property
    def caption(self) -> str:
        joint = f" {self.relation} " if self.relation else " and "
        return "a photo of " + joint.join(map(phrase, self.groups))

    def truth(self) -> dict[str, Any]:
        """The ground truth in the .json member; `group` is the noun phrase that an object belongs to."""
        objects = [
            {"shape": o.shape, "color": o.color, "box": [round(v, 5) for v in o.box], "group": o.group}
            for o in self.objects
        ]
        return {"task": self.task, "objects": objects, "seed": self.seed, "index": self.index}


def phrase(group: Group) -> str:
    """A noun phrase: "an orange circle", "three crosses". Article and plural as GenEval forms them."""
    words = f"{group.color} {group.shape}" if group.color else group.shape
    if group.count == 1:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{NUMBERS[group.count]} {words}{'es' if words.endswith('s') else 's'}"


def scene(seed: int, index: int) -> Scene:
    """The scene of this seed and index (0 <= index < 2**59); it depends on nothing else."""
    tasks = permutation(key(seed, "shapes", "tasks", index // len(TASKS)), len(TASKS))
    task = TASKS[tasks[index % len(TASKS)]]
    u = iter(uniform(key(seed, "shapes", "scene"), index * _DRAWS + np.arange(_DRAWS)).tolist())

    shapes, colors = _pick_two(u, SHAPES), _pick_two(u, COLORS)
    named = {"colors": True, "color_attr": True, "single_object": False, "two_object": False}.get(task)
    if named is None:
        named = next(u) < 0.5
    count = 2 + int(3 * next(u)) if task == "counting" else 1
    relation = RELATIONS[int(4 * next(u))] if task == "position" else None
    pairs = list(zip(shapes, colors, strict=True))
    if task in ("single_object", "counting", "colors"):
        pairs = pairs[:1]
    groups = tuple(Group(count, shape, color if named else None) for shape, color in pairs)

    drawn = [(n, shape, color) for n, (shape, color) in enumerate(pairs) for _ in range(count)]
    places = _places(u, len(drawn), relation)
    low, high = _SINGLE_SIDES if len(drawn) == 1 else _SIDES
    objects = tuple(
        Object(shape, color, place, low + (high - low) * next(u), n)
        for (n, shape, color), place in zip(drawn, places, strict=True)
    )
    return Scene(seed, index, task, groups, relation, objects)


def _pick_two(u: Iterator[float], names: tuple[str, ...]) -> tuple[str, str]:
    """Pick two different names, every ordered pair equally likely."""
    first, step = int(len(names) * next(u)), 1 + int((len(names) - 1) * next(u))
    return names[first], names[(first + step) % len(names)]


def _places(u: Iterator[float], n: int, relation: str | None) -> list[tuple[float, float]]:
    """Place the centres of n objects, in the order in which the caption names them."""
    mid, jitter = 0.5, (_JITTER, _JITTER)
    if n == 1:
        grid, jitter = [(mid, mid)], (_SINGLE_JITTER, _SINGLE_JITTER)
    elif relation in ("above", "below"):
        grid, jitter = [(mid, _LOW), (mid, _HIGH)], (_FREE_JITTER, _JITTER)
    elif n == 2:
        grid, jitter = [(_LOW, mid), (_HIGH, mid)], (_JITTER, _FREE_JITTER)
    else:
        last = [(mid, _HIGH)] if n == 3 else [(_LOW, _HIGH), (_HIGH, _HIGH)]
        grid = [(_LOW, _LOW), (_HIGH, _LOW), *last]
    if relation in ("right of", "below"):
        grid.reverse()
    return [(x + jitter[0] * (2 * next(u) - 1), y + jitter[1] * (2 * next(u) - 1)) for x, y in grid]


def draw(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Draw a scene, uint8 (size, size, 3) RGB, with anti-aliased edges."""
    image = np.empty((size, size, 3), np.uint8)
    image[:] = BACKGROUND
    for obj in scene.objects:
        rows, columns, coverage = cover(obj, size)
        patch = image[rows, columns]
        alpha = coverage[..., None].astype(np.float32) / 255
        image[rows, columns] = np.rint(patch + alpha * (np.array(PALETTE[obj.color], np.float32) - patch))
    return image


def cover(obj: Object, size: int) -> tuple[slice, slice, NDArray[np.uint8]]:
    """The pixels an object covers: its rows, its columns, and the covered share of each pixel, 0 to 255."""
    x0, y0, x1, y1 = (v * size for v in obj.box)
    left, top = max(int(x0) - 1, 0), max(int(y0) - 1, 0)
    width, height = min(int(x1) + 2, size) - left, min(int(y1) + 2, size) - top
    fine = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING), np.uint8)
    shift = np.array([obj.center[0] * size - left, obj.center[1] * size - top])
    # fillPoly has pixel centres at integers, and takes fixed-point numbers with four fractional bits.
    contours = [((c * (obj.side * size) + shift) * _OVERSAMPLING - 0.5) * 16 for c in outline(obj.shape)]
    cv2.fillPoly(fine, [np.rint(c).astype(np.int32) for c in contours], 255, shift=4)
    coverage = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return slice(top, top + height), slice(left, left + width), coverage.astype(np.uint8, copy=False)


def caption_is_held_out(caption: str, share: float, seed: int) -> bool:
    """Whether training never sees this caption ("a photo of ..."), as about `share` of all captions.

    The captions held out at a smaller share are among them. `seed` is that of `dataset_spec`.
    """
    return float(uniform(key(seed, "shapes", "heldout captions", caption), 0)) < share


def dataset_spec(
    count: int, size: int = 64, heldout: float = 0.05, seed: int = 0, heldout_captions: float = 0.0
) -> DatasetSpec:
    """Describe the scenes to pack; raises UserError if an argument is out of range.

    Args:
        count: scenes, the held-out ones included.
        size: side of the images in pixels, 8 to 4096.
        heldout: share of the scenes held out, at reserved indices, 0 <= heldout < 1.
        seed: decides the scenes, and which captions are held out.
        heldout_captions: share of the captions, 0 to 0.5, that training never sees; it has other scenes in their place,
            and the held-out scenes have all captions.
    """
    check_common(size, heldout)
    check(0 <= heldout_captions <= 0.5, "heldout_captions", heldout_captions, "a share between 0 and 0.5")
    # Where scenes are skipped, training needs more indices, and each is listed in memory.
    most = HELDOUT_START // 100 if heldout_captions else HELDOUT_START
    check(1 <= count <= most, "count", count, f"between 1 and {most}")
    kept = round(count * heldout)
    arguments = {"count": count, "size": size, "heldout": heldout, "seed": seed}
    train: Sequence[int] = range(count - kept)
    if heldout_captions:  # 0 is not an argument, so that earlier packs stay valid
        arguments["heldout_captions"] = heldout_captions
        train = _with_other_captions(count - kept, heldout_captions, seed)
    return DatasetSpec(
        name="shapes",
        about={"licence": "CC0-1.0", "credit": "drawn by data/packing/shapes.py"},
        arguments=arguments,
        splits={"train": train, "heldout": range(HELDOUT_START, HELDOUT_START + kept)},
        read=EachItem(partial(_sample, seed=seed, size=size)),
    )


def _with_other_captions(count: int, share: float, seed: int) -> array[int]:
    """The first `count` indices whose captions are not held out."""
    good = (i for i in range(HELDOUT_START) if not caption_is_held_out(scene(seed, i).caption, share, seed))
    return array("q", islice(good, count))


def _sample(index: int, seed: int, size: int) -> Sample:
    drawn = scene(seed, index)
    return make_sample(f"scene-{index:010d}", draw(drawn, size), drawn.caption, drawn.truth())


# --- the shapes: polygons, filled even-odd ---


def _arc(radius: float, start: float, stop: float, n: int = 96) -> NDArray[np.float64]:
    """n points of a circle about the origin; angles in turns, 0 at the right, clockwise on the screen."""
    angle = 2 * np.pi * np.linspace(start, stop, n)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star() -> NDArray[np.float64]:
    points = _arc(1.0, -0.25, 0.65, 10)
    points[1::2] *= 0.40
    return points


def _cross(arm: float = 0.30) -> NDArray[np.float64]:
    quarter = np.array([(-arm, -1), (arm, -1), (arm, -arm)])
    turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, n) for n in range(4)])


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * np.pi, 96)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1)


def _crescent() -> NDArray[np.float64]:
    # Both circles pass through the horns: at 0.098 turns of the outer one, 0.154 of the bite.
    bite = _arc(0.70, 0.846, 0.154) + np.array([0.42, 0.0])
    return np.concatenate([_arc(1.0, 0.098, 0.902), bite])


_CONTOURS: dict[str, list[NDArray[np.float64]]] = {
    "circle": [_arc(1.0, 0, 1)],
    "square": [np.array([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)])],
    "triangle": [np.array([(0.0, -0.9), (1, 0.9), (-1, 0.9)])],
    "star": [_star()],
    "cross": [_cross()],
    "heart": [_heart()],
    "ring": [_arc(1.0, 0, 1), _arc(0.55, 0, 1)],
    "crescent": [_crescent()],
}
SHAPES = tuple(_CONTOURS)


@cache
def outline(shape: str) -> list[NDArray[np.float64]]:
    """The shape's contours, with the bounding box centred on the origin and its longer side 1."""
    points = np.concatenate(_CONTOURS[shape])
    low, high = points.min(axis=0), points.max(axis=0)
    return [(contour - (low + high) / 2) / (high - low).max() for contour in _CONTOURS[shape]]


@cache
def extent(shape: str) -> tuple[float, float]:
    """Width and height of the outline; the larger one is 1."""
    points = np.concatenate(outline(shape))
    width, height = np.ptp(points, axis=0)
    return float(width), float(height)
