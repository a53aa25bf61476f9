"""GenEval's rules: whether an image shows what its prompt asks for, from the objects that a detector finds.

- Objects count by confidence alone, each class for itself; overlapping objects are all kept.
- An item of "include" asks for a number of objects of a class, and looks at that many of the most confident: their
  colours, and where they are. More objects than that are an error only by "exclude".
- An item that fails cannot be the target of a later item's position; that later item then fails, too.

Every decision is that of the official code; the reasons have other words. Images are uint8 (H, W, 3). Lengths are
pixels, x to the right and y down; a box is (x0, y0, x1, y1), with x1 and y1 one beyond the last pixel.

Source: Ghosh et al., "GenEval" (2023), section 3, and its evaluation/evaluate_images.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evaluation.geneval.prompts import Metadata

Image = NDArray[np.uint8]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """An object that was found.

    Attributes:
        label: its class, as prompts name it.
        score: confidence, 0 to 1.
        mask: (H, W), the pixels that it covers.
    """

    label: str
    score: float
    box: Box
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Thresholds:
    """Which detections count, and what counts as a position; the defaults are GenEval's.

    Attributes:
        score: least confidence of a detection, exclusive.
        counting: the same for prompts of the task "counting".
        most: how many of a class count, the most confident.
        position: how far two objects must be apart on an axis for a position on it, as a share of their extents' sum.
    """

    score: float = 0.3
    counting: float = 0.9
    most: int = 16
    position: float = 0.1


class Detector(Protocol):
    """Finds objects and names colours."""

    thresholds: Thresholds
    classes: tuple[str, ...]
    """All classes that it can find, as prompts name them."""

    @property
    def identity(self) -> dict[str, Any]:
        """Names, settings and hashes of weights, in JSON's types."""

    def detect(self, image: Image) -> list[Detection]:
        """All objects, down to low confidence, in any order."""

    def colors(self, image: Image, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object, one of GenEval's ten names."""


_LEAST_PX = 1e-3
"""After the reduction, two objects nearer than this have no position."""
_COSINE = 0.5
"""A relation holds above this share of the distance: within 60 degrees of its axis, for objects without extent."""


@dataclass(frozen=True)
class Verdict:
    """The rules' verdict on an image.

    Attributes:
        reason: a line for each item that fails; empty if the image is correct.
        used: all objects that count, of every class, the most confident first.
    """

    correct: bool
    reason: str
    used: tuple[Detection, ...]


def judge(metadata: Metadata, image: Image, detector: Detector) -> Verdict:
    """Judge an image by its prompt, which `prompts.read` has checked."""
    used = counting(detector.detect(image), metadata["tag"], detector.thresholds)
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for item in metadata.get("include", []):
        found = of_class(used, item["class"])[: item["count"]]
        reason = _too_few(item, found)
        if not reason and item.get("color"):
            reason = _other_colors(item, detector.colors(image, found))
        if not reason and item.get("position"):
            target = metadata["include"][item["position"][1]]["class"]
            reason = _elsewhere(item, found, target, matched[item["position"][1]], detector.thresholds.position)
        matched.append(None if reason else found)
        reasons += [reason] if reason else []
    for item in metadata.get("exclude", []):
        count = len(of_class(used, item["class"]))
        if count >= item["count"]:
            reasons.append(f"{item['class']}: fewer than {item['count']} expected, {count} found")
    return Verdict(not reasons, "\n".join(reasons), used)


def counting(detections: Sequence[Detection], task: str, thresholds: Thresholds) -> tuple[Detection, ...]:
    """The objects that count for a task, the most confident first."""
    least = thresholds.counting if task == "counting" else thresholds.score
    seen: Counter[str] = Counter()
    counted = []
    for found in sorted(detections, key=lambda found: found.score, reverse=True):
        if found.score > least and seen[found.label] < thresholds.most:
            seen[found.label] += 1
            counted.append(found)
    return tuple(counted)


def of_class(detections: Sequence[Detection], label: str) -> list[Detection]:
    """Those of one class, in the order given."""
    return [found for found in detections if found.label == label]


def relative_position(a: Box, b: Box, share: float) -> set[str]:
    """Where `a` is, seen from `b`: none, one or (near the diagonals) two of `prompts.RELATIONS`.

    On each axis the distance of the centres is reduced by `share` of the two extents' sum, down to 0. The rest must be
    more than half of the whole distance.
    """
    dx, dy = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
    extents = ((a[i + 2] - a[i]) + (b[i + 2] - b[i]) for i in (0, 1))
    x, y = (math.copysign(max(abs(d) - share * extent, 0.0), d) for d, extent in zip((dx, dy), extents, strict=True))
    if max(abs(x), abs(y)) < _LEAST_PX:
        return set()
    # By the distance before the reduction, so that objects that are large for their distance have no position.
    x, y = x / math.hypot(dx, dy), y / math.hypot(dx, dy)
    holds = {"left of": x < -_COSINE, "right of": x > _COSINE, "above": y < -_COSINE, "below": y > _COSINE}
    return {relation for relation, is_so in holds.items() if is_so}


def _too_few(item: Metadata, found: Sequence[Detection]) -> str | None:
    if len(found) >= item["count"]:
        return None
    return f"{item['class']}: {item['count']} expected, {len(found)} found"


def _other_colors(item: Metadata, colors: Sequence[str]) -> str | None:
    if colors.count(item["color"]) >= item["count"]:
        return None
    words = ", ".join(f"{count} {color}" for color, count in Counter(colors).most_common())
    return f"{item['class']}: {item['count']} {item['color']} expected, {words} found"


def _elsewhere(
    item: Metadata, found: Sequence[Detection], target: str, targets: Sequence[Detection] | None, share: float
) -> str | None:
    relation = item["position"][0]
    if targets is None:
        return f"{item['class']}: {relation} a {target} expected, but there is no {target} that is as asked for"
    for detection in found:
        for other in targets:
            relations = relative_position(detection.box, other.box, share)
            if relation not in relations:
                words = " and ".join(sorted(relations)) or "in no clear position to it"
                return f"{item['class']}: {relation} the {target} expected, {words} found"
    return None
