"""What GenEval's rules know of an image: the objects that a detector found in it, and their colours.

Images are uint8 (H, W, 3). Lengths are pixels, x to the right and y down; a box is (x0, y0, x1, y1), its last row and
column included in the sense of x1 = largest x + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One object that was found."""

    label: str
    """Its class, as prompts name it."""
    score: float
    """Confidence, 0 to 1."""
    box: Box
    mask: NDArray[np.bool_]
    """(H, W): the pixels it covers."""


@dataclass(frozen=True)
class Thresholds:
    """Which detections count, and what counts as a position; the defaults are GenEval's."""

    score: float = 0.3
    """A detection counts above this confidence."""
    counting: float = 0.9
    """The same for prompts of the task "counting"."""
    most: int = 16
    """Of a class the most confident this many count."""
    position: float = 0.1
    """Share of the two objects' extents by which they must be apart on an axis for it to say anything."""


class Detector(Protocol):
    """Finds objects and names colours."""

    thresholds: Thresholds
    classes: tuple[str, ...]
    """All that it can find, by the names that prompts have for it."""

    @property
    def identity(self) -> dict[str, Any]:
        """What it is, for the summary, in JSON's types: names, settings, hashes of weights."""

    def detect(self, image: Image) -> list[Detection]:
        """All that may be objects, down to low confidence, in any order."""

    def colors(self, image: Image, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object, one of GenEval's ten names."""
