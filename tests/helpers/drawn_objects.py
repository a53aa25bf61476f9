"""Objects without an image, and a detector that finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.geneval.rules import Box, Detection, Image, Thresholds

BLANK: Image = np.zeros((64, 64, 3), np.uint8)


def thing(label: str, score: float = 0.95, box: Box = (0, 0, 10, 10)) -> Detection:
    """An object that fills its box in an image of 64 px."""
    mask = np.zeros(BLANK.shape[:2], bool)
    x0, y0, x1, y1 = map(int, box)
    mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return Detection(label, score, box, mask)


class FakeDetector:
    """Finds the same objects, of the same colors, in every image."""

    def __init__(self, detections: Sequence[Detection], colors: Sequence[str] = ()) -> None:
        self.thresholds = Thresholds()
        self.asked: list[list[Detection]] = []
        """The objects of each call of `colors`."""
        self._detections = list(detections)
        self._colors = {id(found): color for found, color in zip(detections, colors, strict=False)}

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "fake"}

    def detect(self, image: Image) -> list[Detection]:
        return list(self._detections)

    def colors(self, image: Image, objects: Sequence[Detection]) -> list[str]:
        self.asked.append(list(objects))
        return [self._colors[id(found)] for found in objects]
