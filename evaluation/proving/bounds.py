"""What scores of drawn shapes are to be read against: the best that can be had, and chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.packing.shapes import draw
from evaluation.geneval.detection import Detection, Detector, Image
from evaluation.geneval.folder import Prompted, read_image
from evaluation.geneval.prompts import Metadata
from evaluation.geneval.rules import judge
from evaluation.geneval.summary import counted, summarise
from evaluation.proving.prompts import proving_scenes, shuffled

_SHUFFLES = 10


class _Seen:
    """A detector's answers on one image, so that many prompts can be judged by it for the price of one."""

    def __init__(self, detector: Detector, image: Image) -> None:
        self.thresholds, self.classes, self.identity = detector.thresholds, detector.classes, detector.identity
        self._objects = detector.detect(image)
        colors = detector.colors(image, self._objects)
        self._color_of = {id(it): color for it, color in zip(self._objects, colors, strict=True)}

    def detect(self, image: Image) -> list[Detection]:
        return self._objects

    def colors(self, image: Image, objects: Sequence[Detection]) -> list[str]:
        return [self._color_of[id(it)] for it in objects]


def bounds(prompted: Sequence[Prompted], detector: Detector) -> dict[str, Any]:
    """Overall scores beside that of a folder of images.

    Returns:
        "drawn_scenes": of the prompts' own scenes, drawn at the images' size: what a perfect model would have; None
        where a prompt is none of the proving ground's.
        "shuffled_prompts": of the same images judged by other prompts: chance, the mean over ten shuffles.
    """
    sides = {read_image(it.images[0]).shape[:2] for it in prompted}
    return {
        "drawn_scenes": _of_scenes([it.metadata for it in prompted], max(sides), detector),
        "shuffled_prompts": _by_chance(prompted, detector),
    }


def _of_scenes(prompts: Sequence[Metadata], size: tuple[int, ...], detector: Detector) -> float | None:
    scenes = {it.caption: it for it in proving_scenes()}
    if any(it["prompt"] not in scenes for it in prompts) or len(set(size)) > 1:
        return None
    return _overall([(it, draw(scenes[it["prompt"]], size[0])) for it in prompts], detector)


def _overall(asked: Sequence[tuple[Metadata, Image]], detector: Detector) -> float:
    overall: float = summarise([counted(it, judge(it, image, detector).correct) for it, image in asked])["overall"]
    return overall


def _by_chance(prompted: Sequence[Prompted], detector: Detector) -> float:
    images = [[read_image(path) for path in it.images] for it in prompted]
    seen = [[_Seen(detector, image) for image in of_prompt] for of_prompt in images]
    found = []
    for seed in range(_SHUFFLES):
        others = shuffled([it.metadata for it in prompted], seed)
        results = [
            counted(other, judge(other, image, eyes).correct)
            for other, of_prompt, eyes_of_prompt in zip(others, images, seen, strict=True)
            for image, eyes in zip(of_prompt, eyes_of_prompt, strict=True)
        ]
        found.append(summarise(results)["overall"])
    return float(np.mean(found))
