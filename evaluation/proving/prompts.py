"""GenEval's six tasks on drawn shapes, in GenEval's form, so that GenEval's rules judge them.

Captions are those of held-out scenes (data/packing/shapes.py), each once: the grammar is the training set's, and a
share of the captions themselves may have been held out of it. Where a caption names colours the rules ask for them,
in "counting" and "position", too: that is more than GenEval asks there.

What scores of drawn shapes are to be read against: the best that can be had, and chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from data.packing.contents import check
from data.packing.shapes import HELDOUT_START, Scene, caption_is_held_out, draw, scene
from data.randomness import key, permutation
from evaluation.geneval.prompts import TASKS, Metadata
from evaluation.geneval.rules import Detection, Detector, Image, judge
from evaluation.geneval.summary import PromptImages, Result, counted, read_image, summarize

_MOST = 3000
_LOOKED_AT = 24
"""Scenes for each prompt; with fewer some of the 64 captions of the task "colors" might not come up."""


def proving_prompts(count: int = 552, seed: int = 0, heldout_captions: float = 0.1) -> list[Metadata]:
    """Make prompts, the same for the same arguments, in the order of GenEval's tasks.

    Tasks have equally many, as far as they have captions: "single_object" has 8, "two_object" 56, "colors" 64,
    "counting" 216. Of 552, "counting" has 142, "position" and "color_attr" 141.

    Args:
        count: of prompts, all tasks together, 6 to 3000.
        seed: of the packed scenes, as given to `launch/pack.py shapes`.
        heldout_captions: the share of captions that these lack, given there, too.

    Returns:
        GenEval's dictionaries, with "heldout": whether training never saw the caption.

    Raises:
        UserError: a count outside its range.
    """
    return [
        {**metadata(it), "heldout": caption_is_held_out(it.caption, heldout_captions, seed)}
        for it in proving_scenes(count, seed)
    ]


@cache
def proving_scenes(count: int = 552, seed: int = 0) -> tuple[Scene, ...]:
    """The scenes whose captions `proving_prompts` has, in its order: drawn, they are what a perfect model makes.

    Raises:
        UserError: a count outside its range.
    """
    check(len(TASKS) <= count <= _MOST, "count", count, f"between {len(TASKS)} and {_MOST}")
    found: dict[str, dict[str, Scene]] = {task: {} for task in TASKS}
    for index in range(HELDOUT_START, HELDOUT_START + _LOOKED_AT * count):
        it = scene(seed, index)
        found[it.task].setdefault(it.caption, it)
    rounds = zip_longest(*(of_task.values() for of_task in found.values()))
    taken = islice((it for one_each in rounds for it in one_each if it), count)
    return tuple(sorted(taken, key=lambda it: TASKS.index(it.task)))


def metadata(scene: Scene) -> Metadata:
    """What a scene's caption asks for, as a line of GenEval's prompts."""
    include: list[Metadata] = [
        {"class": group.shape, "count": group.count, **({"color": group.color} if group.color else {})}
        for group in scene.groups
    ]
    if scene.relation:  # what the other is placed by comes first
        include = [include[1], {**include[0], "position": [scene.relation, 0]}]
    more = [{"class": group.shape, "count": group.count + 1} for group in scene.groups]
    exclude = {"exclude": more} if scene.task == "counting" else {}
    return {"tag": scene.task, "include": include, **exclude, "prompt": scene.caption}


def shuffled(prompts: Sequence[Metadata], seed: int = 0) -> list[Metadata]:
    """For each prompt another one to judge its images by: what they score then is chance.

    Every prompt is used once, none for its own images: each takes the next one on a random round through all of them.
    So a task's chance is that of its prompts on images of any task, in the shares that tasks have among the prompts.
    Single objects are so few that one seed's overall score is chance's only to 0.02: average over ten.
    """
    assert len(prompts) > 1
    order = permutation(key(seed, "proving", "shuffled"), len(prompts)).tolist()
    others = dict(zip(order, order[1:] + order[:1], strict=True))
    return [prompts[others[n]] for n in range(len(prompts))]


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


def bounds(prompted: Sequence[PromptImages], detector: Detector) -> dict[str, Any]:
    """Overall scores beside that of a folder of images.

    Returns:
        "drawn_scenes": of the prompts' own scenes, drawn at the images' size: what a perfect model would have; None
        where a prompt is none of the proving ground's.
        "shuffled_prompts": of the same images judged by other prompts: chance, the mean over ten shuffles; None where
        there is one prompt alone.
    """
    return {"drawn_scenes": _of_scenes(prompted, detector), "shuffled_prompts": _by_chance(prompted, detector)}


def _of_scenes(prompted: Sequence[PromptImages], detector: Detector) -> float | None:
    scenes = {it.caption: it for it in proving_scenes()}
    results = []
    for it in prompted:
        if it.metadata["prompt"] not in scenes:
            return None
        image = draw(scenes[it.metadata["prompt"]], len(read_image(it.images[0])))
        results.append(counted(it.metadata, judge(it.metadata, image, detector).correct))
    return _overall(results)


def _by_chance(prompted: Sequence[PromptImages], detector: Detector) -> float | None:
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
    overall: float = summarize(results)["overall"]
    return overall
