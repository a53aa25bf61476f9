"""A detector of drawn shapes (data/packing/shapes.py) in rendered and generated images. It learns nothing.

1. Segmentation: a pixel belongs to the ground or to one of eight colours, by the nearest in CIELAB of the nine palette
   colours and of the blends of ground and colour that an object's edge consists of.
2. Objects: connected pixels of one colour, unless they are too small or too large for an object of these scenes.
3. Coverage: how far a pixel is on the way from the ground's colour to the object's, both as measured in the image, so
   that a slightly different shade costs nothing.
4. Shape: each of the eight is rendered with the object's area and centre of gravity, then moved and scaled in small
   steps to where the two coverages agree best. The score is the best shape's intersection over union.

The score says how good a shape is, not how sharp its edge or how noisy the image. So coverages are compared smoothed,
and shapes are rendered with soft edges, too. Objects must not touch others of their own colour; they may touch others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.packing.shapes import BACKGROUND, COLORS, PALETTE, SHAPES, Object, cover
from evaluation.geneval.rules import Detection, Image, Thresholds

ACCEPTED = 0.86
"""Least agreement of an object with its shape. Rendered scenes, blurred by half a pixel of 32 and with noise, are above
0.88; circles and squares, the two shapes most alike, agree up to 0.87. tests/benchmarks/shape_detector.py has more."""

_SMALLEST, _LARGEST = 0.015, 0.4
"""Share of the image that an object covers; in rendered scenes 0.025 to 0.25."""
_FAINTEST = 20.0
"""Least distance of an object from the ground in RGB of 0 to 255; pink, the nearest colour, is 83 away."""
_LEAST_GROUND = 0.25
"""Least share of ground in an image to measure its colour; rendered scenes have 0.48."""
_BLUR = 0.02
"""Deviation of the Gaussian that smooths coverages, as a share of the image's side: 0.64 pixels of 32."""
_STEPS = 128
"""Sides and centres are multiples of the image's side over this: a quarter pixel of 32."""
_SOFT = (0, 1 / 64)
"""Deviations of the Gaussians that also smooth rendered edges: none, and half a pixel of 32."""
_MOST_MOVES = 8
"""Most steps of its side, centre or edge that a shape is moved from its first place."""
_REFINED = 3
"""How many shapes, the best at their first places, are moved and scaled."""
_OFF_COLOR = 0.25
"""A pixel's distance from the way between ground and object, as a share of that way, that counts as noise."""

Floats = NDArray[np.float32]


class ShapeDetector:
    """A `Detector` of the eight shapes, whose labels are their names, and of the eight colours of the palette.

    Images are squares; it is tested at sides of 32 pixels and more. An object is found once, as the shape that it
    agrees with best.
    """

    def __init__(self) -> None:
        self.thresholds = Thresholds(score=ACCEPTED, counting=ACCEPTED)
        self.classes = SHAPES

    @property
    def identity(self) -> dict[str, Any]:
        """Its name and constants."""
        return {
            "name": "shapes",
            "accepted": ACCEPTED,
            "area": [_SMALLEST, _LARGEST],
            "faintest": _FAINTEST,
            "least_ground": _LEAST_GROUND,
            "blur": _BLUR,
            "soft": list(_SOFT),
            "steps": _STEPS,
            "most_moves": _MOST_MOVES,
            "refined": _REFINED,
            "off_color": _OFF_COLOR,
        }

    def detect(self, image: Image) -> list[Detection]:
        """Every object, however badly it agrees; boxes are those of the best shapes, in fractions of pixels.

        Raises:
            UserError: the image is not square.
        """
        height, width = image.shape[:2]
        if height != width:
            raise UserError(
                f"the detector shapes finds objects in squares, not in {height} x {width} pixels: generate squares"
            )
        labels = segment(image)
        pixels, ground = image.astype(np.float32), ground_color(image, labels)
        masks = components(labels)
        taken = np.any([np.zeros(labels.shape, np.bool_), *masks], axis=0)
        found = []
        for mask in masks:
            color = ink(pixels[mask], ground)
            if np.linalg.norm(color - ground) < _FAINTEST:
                continue
            near = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
            covered = coverage(pixels, color, ground)
            agreement, shape = best_shape(np.where(mask | (near & ~taken), covered, np.float32(0)))
            x0, y0, x1, y1 = (length * len(image) for length in shape.box)
            found.append(Detection(shape.shape, agreement, (x0, y0, x1, y1), mask))
        return found

    def colors(self, image: Image, objects: Sequence[Detection]) -> list[str]:
        """The palette's colour nearest in CIELAB to each object's."""
        pixels, ground = image.astype(np.float32), ground_color(image, segment(image))
        palette = lab(np.asarray([*PALETTE.values()]))
        inks = (ink(pixels[found.mask], ground) for found in objects)
        return [COLORS[int(np.linalg.norm(palette - lab(color[None]), axis=1).argmin())] for color in inks]


# --- objects and their colours ---


def lab(rgb: NDArray[np.generic]) -> Floats:
    """CIELAB of colours (N, 3) of 0 to 255."""
    return np.asarray(cv2.cvtColor(np.asarray(rgb, np.float32)[None] / 255, cv2.COLOR_RGB2Lab)[0])


@cache
def _blends() -> tuple[Floats, NDArray[np.intp]]:
    """Colours of pixels covered by tenths, in CIELAB, (81, 3), and their labels: 0 the ground, n + 1 color n."""
    ground, palette = np.asarray(BACKGROUND, np.float32), np.asarray([*PALETTE.values()], np.float32)
    shares = np.arange(1, 11) / np.float32(10)
    blends = ground + shares[None, :, None] * (palette - ground)[:, None]
    names = (np.arange(len(palette)) + 1)[:, None] * (shares >= 0.5)
    return lab(np.concatenate([ground[None], blends.reshape(-1, 3)])), np.concatenate([[0], names.ravel()])


def segment(image: Image) -> NDArray[np.intp]:
    """The label of each pixel, (H, W): 0 for the ground, n + 1 for color n of the palette."""
    blends, names = _blends()
    squares = np.square(blends).sum(1) - 2 * lab(image.reshape(-1, 3)) @ blends.T  # less the pixel's own square
    return np.asarray(names[squares.argmin(1)].reshape(image.shape[:2]))


def ground_color(image: Image, labels: NDArray[np.intp]) -> Floats:
    """The ground's colour (3,): the median of its pixels, or the palette's if these are few."""
    ground = labels == 0
    measured = np.median(image[ground], axis=0) if ground.mean() > _LEAST_GROUND else BACKGROUND
    return np.asarray(measured, np.float32)


def components(labels: NDArray[np.intp]) -> list[NDArray[np.bool_]]:
    """The masks of connected pixels (8 neighbours) of one colour that have the size of an object."""
    found = []
    for label in np.unique(labels[labels > 0]):
        _, parts, stats, _ = cv2.connectedComponentsWithStats((labels == label).astype(np.uint8), connectivity=8)
        shares = stats[:, cv2.CC_STAT_AREA] / labels.size
        found += [parts == n for n in range(1, len(stats)) if _SMALLEST <= shares[n] <= _LARGEST]
    return found


def ink(pixels: Floats, ground: Floats) -> Floats:
    """The colour (3,) of an object with these pixels (N, 3): the mean of those without ground mixed in."""
    distance = np.linalg.norm(pixels - ground, axis=1)
    return np.asarray(pixels[distance >= 0.8 * np.quantile(distance, 0.9)].mean(0))


def coverage(pixels: Floats, color: Floats, ground: Floats) -> Floats:
    """How much of each pixel (H, W, 3) the colour covers, 0 to 1; less if it is no blend of colour and ground."""
    way = color - ground
    square = float(way @ way)
    along = (pixels - ground) @ way / square
    off = np.linalg.norm(pixels - ground - along[..., None] * way, axis=-1) / math.sqrt(square)
    return np.asarray(np.clip(along - np.maximum(off - _OFF_COLOR, 0), 0, 1), np.float32)


# --- shapes ---

Place = tuple[int, int, int, int]
"""How a shape is rendered: its side and the x and y of its centre, in steps, and the number of its soft edge."""
_MOVES = [tuple(d if i == n else 0 for i in range(4)) for n in range(4) for d in (-1, 1)]


def best_shape(covered: Floats) -> tuple[float, Object]:
    """The best agreement of a shape with a coverage (H, W), 0 to 1, and that shape; its lengths are shares of H."""
    match = _Match(covered)
    starts = [(match.agreement(shape, place), shape, place) for shape, place in match.first_places()]
    best = max(match.climbed(*start) for start in sorted(starts, reverse=True)[:_REFINED])
    agreement, shape, (side, x, y, _) = best
    return agreement, Object(shape, COLORS[0], (x / _STEPS, y / _STEPS), side / _STEPS, 0)


class _Match:
    """A coverage that shapes are compared with."""

    def __init__(self, covered: Floats) -> None:
        self._size = len(covered)
        self._step = self._size / _STEPS
        self._area, self._x, self._y = _area_and_centre(covered)
        self._padded = np.pad(_smoothed(covered, self._size), self._size)

    def first_places(self) -> list[tuple[str, Place]]:
        """For every shape, the place where it has the coverage's area and centre of gravity."""
        found = []
        for shape in SHAPES:
            area, x, y = _unit_moments(shape)
            side = math.sqrt(self._area / area)
            side, x, y = (round(v / self._step) for v in (side, self._x - x * side, self._y - y * side))
            found.append((shape, (side, x, y, 0)))
        return found

    def agreement(self, shape: str, place: Place) -> float:
        """Intersection over union of the two coverages, smoothed."""
        side, x, y = (n * self._step for n in place[:3])
        drawn = _template(shape, self._size, side, x % 1, y % 1, place[3])
        half = len(drawn) // 2
        left, top = self._size + math.floor(x) - half, self._size + math.floor(y) - half
        window = self._padded[top : top + 2 * half, left : left + 2 * half]
        both = float(np.minimum(window, drawn).sum())
        return both / (self._area + float(drawn.sum()) - both)

    def climbed(self, agreement: float, shape: str, place: Place) -> tuple[float, str, Place]:
        """Hill climbing: the best shape after moves of one step each, as long as these help."""
        for _ in range(_MOST_MOVES):
            side, x, y, soft = place
            moved = [(side + a, x + b, y + c, soft + d) for a, b, c, d in _MOVES if 0 <= soft + d < len(_SOFT)]
            best, where = max((self.agreement(shape, to), to) for to in moved)
            if best <= agreement:
                break
            agreement, place = best, where
        return agreement, shape, place


def _smoothed(covered: Floats, size: int, soft: int = 0) -> Floats:
    deviation = math.hypot(_BLUR, _SOFT[soft]) * size
    return np.asarray(cv2.GaussianBlur(covered, (0, 0), deviation, borderType=cv2.BORDER_CONSTANT))


def _area_and_centre(covered: Floats) -> tuple[float, float, float]:
    """Area and centre of gravity (x, y), in pixels."""
    area = float(covered.sum())
    y, x = (np.arange(n, dtype=np.float32) + 0.5 for n in covered.shape)
    return area, float(covered.sum(0) @ x) / area, float(covered.sum(1) @ y) / area


def _drawn(shape: str, n: int, x: float, y: float, side: float) -> Floats:
    """The coverage (n, n) of a shape; lengths are pixels."""
    rows, columns, covered = cover(Object(shape, COLORS[0], (x / n, y / n), side / n, 0), n)
    whole = np.zeros((n, n), np.float32)
    whole[rows, columns] = covered / np.float32(255)
    return whole


@cache
def _unit_moments(shape: str) -> tuple[float, float, float]:
    """Area and centre of gravity of a shape whose box's longer side is 1 and centre (0, 0)."""
    n, side = 256, 192
    area, x, y = _area_and_centre(_drawn(shape, n, n / 2, n / 2, side))
    return area / side**2, (x - n / 2) / side, (y - n / 2) / side


@lru_cache(maxsize=1 << 14)
def _template(shape: str, size: int, side: float, x: float, y: float, soft: int) -> Floats:
    """A smoothed shape for an image of `size`, its centre (x, y), 0 to 1, from the middle of an even square."""
    half = math.ceil(side / 2 + 3 * math.hypot(_BLUR, _SOFT[soft]) * size) + 1
    return _smoothed(_drawn(shape, 2 * half, half + x, half + y, side), size, soft)
