"""What scores of drawn shapes are to be read against: the best that can be had, and chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.packing.shapes import draw
from evaluation.geneval.detection import Detection, Detector, Image
from evaluation.geneval.folder import Prompted, read_image
from evaluation.geneval.rules import judge
from evaluation.geneval.summary import Result, counted, summarise
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
        "shuffled_prompts": of the same images judged by other prompts: chance, the mean over ten shuffles; None where
        there is one prompt alone.
    """
    return {"drawn_scenes": _of_scenes(prompted, detector), "shuffled_prompts": _by_chance(prompted, detector)}


def _of_scenes(prompted: Sequence[Prompted], detector: Detector) -> float | None:
    scenes = {it.caption: it for it in proving_scenes()}
    results = []
    for it in prompted:
        if it.metadata["prompt"] not in scenes:
            return None
        image = draw(scenes[it.metadata["prompt"]], len(read_image(it.images[0])))
        results.append(counted(it.metadata, judge(it.metadata, image, detector).correct))
    return _overall(results)


def _by_chance(prompted: Sequence[Prompted], detector: Detector) -> float | None:
    if len(prompted) == 1:
        return None
    shuffles = [shuffled([it.metadata for it in prompted], seed) for seed in range(_SHUFFLES)]
    results: list[list[Result]] = [[] for _ in shuffles]
    for number, it in enumerate(prompted):
        for image in map(read_image, it.images):
            seen = _Seen(detector, image)
            for of_shuffle, asked in zip(results, shuffles, strict=True):
                of_shuffle.append(counted(asked[number], judge(asked[number], image, seen).correct))
    return float(np.mean([_overall(of_shuffle) for of_shuffle in results]))


def _overall(results: Sequence[Result]) -> float:
    overall: float = summarise(results)["overall"]
    return overall
