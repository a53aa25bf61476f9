"""GenEval's rules: whether an image shows what its prompt asks for, from the objects that a detector finds.

- Objects count by confidence alone, each class for itself; no overlap is removed.
- An item of "include" asks for so many of a class, and looks at so many of the most confident: their colours, and
  where they are. More than are asked for do no harm, except by "exclude".
- An item that fails cannot be the target of a later item's position; that later item then fails, too.

Every decision is that of the official code; the reasons are worded anew. Scores agree, reasons do not.

Source: Ghosh et al., "GenEval" (2023), section 3, and its evaluation/evaluate_images.py.

What GenEval's rules know of an image: the objects that a detector found in it, and their colours.

Images are uint8 (H, W, 3). Lengths are pixels, x to the right and y down; a box is (x0, y0, x1, y1), its last row and
column included in the sense of x1 = largest x + 1.
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


_LEAST_PX = 1e-3
"""Nearer to each other than this after the reduction, two objects are in no position."""
_COSINE = 0.5
"""A relation holds above this share of the distance: within 60 degrees of its axis, for objects without extent."""


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one image."""

    correct: bool
    reason: str
    """Why not, a line for each item that fails; empty: it is correct."""
    used: tuple[Detection, ...]
    """All objects that count, of every class, the most confident first."""


def judge(metadata: Metadata, image: Image, detector: Detector) -> Verdict:
    """Judge an image by its prompt.

    Args:
        metadata: the prompt, as `prompts.read` checks it.
    """
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
    """The objects that count for a task: above its threshold, of each class the most confident; these come first."""
    least = thresholds.counting if task == "counting" else thresholds.score
    seen: Counter[str] = Counter()
    counted = []
    for it in sorted(detections, key=lambda it: it.score, reverse=True):
        if it.score > least and seen[it.label] < thresholds.most:
            seen[it.label] += 1
            counted.append(it)
    return tuple(counted)


def of_class(detections: Sequence[Detection], label: str) -> list[Detection]:
    """Those of one class, in the order given."""
    return [it for it in detections if it.label == label]


def relative_position(a: Box, b: Box, share: float) -> set[str]:
    """Where `a` is, seen from `b`: none, one or (about diagonally) two of `prompts.RELATIONS`.

    On each axis the distance of the centres is reduced by `share` of the two extents' sum, down to 0. What is left must
    be more than half of the whole distance.
    """
    dx, dy = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
    extents = ((a[i + 2] - a[i]) + (b[i + 2] - b[i]) for i in (0, 1))
    x, y = (math.copysign(max(abs(d) - share * extent, 0.0), d) for d, extent in zip((dx, dy), extents, strict=True))
    if max(abs(x), abs(y)) < _LEAST_PX:
        return set()
    # By the distance before its reduction: objects that are large for their distance are nowhere.
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
    told = ", ".join(f"{count} {color}" for color, count in Counter(colors).most_common())
    return f"{item['class']}: {item['count']} {item['color']} expected, {told} found"


def _elsewhere(
    item: Metadata, found: Sequence[Detection], target: str, targets: Sequence[Detection] | None, share: float
) -> str | None:
    relation = item["position"][0]
    if targets is None:
        return f"{item['class']}: {relation} a {target} expected, but there is no {target} that is as asked for"
    for it in found:
        for other in targets:
            relations = relative_position(it.box, other.box, share)
            if relation not in relations:
                told = " and ".join(sorted(relations)) or "in no clear position to it"
                return f"{item['class']}: {relation} the {target} expected, {told} found"
    return None
