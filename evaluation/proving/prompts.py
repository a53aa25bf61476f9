"""The proving ground's prompts: GenEval's six tasks on drawn shapes, in GenEval's form, and bounds for the scores.

Captions are those of held-out scenes (data/packing/shapes.py), each once: the grammar is the training set's, and a
share of the captions may have been held out of it. Where a caption names colours the rules ask for them, also in
"counting" and "position", where GenEval does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from data.packing.shapes import HELDOUT_START, Scene, caption_is_held_out, draw, scene
from data.packing.spec import check
from data.randomness import key, permutation
from evaluation.geneval.prompts import TASKS, Metadata
from evaluation.geneval.rules import Detection, Detector, Image, judge
from evaluation.geneval.summary import PromptImages, Result, counted, read_image, summarize

_MOST = 3000
_SCENES_PER_PROMPT = 24
"""With fewer, some of the 64 captions of the task "colors" might not occur."""


def proving_prompts(count: int = 552, seed: int = 0, heldout_captions: float = 0.1) -> list[Metadata]:
    """GenEval's dictionaries, a function of the arguments, with "heldout": whether training never saw the caption.

    They come in the order of GenEval's tasks, which have equally many as far as they have captions: "single_object" has
    8, "two_object" 56, "colors" 64, "counting" 216. Of 552, "counting" has 142, "position" and "color_attr" 141.

    Args:
        count: of prompts, all tasks together, 6 to 3000.
        seed, heldout_captions: as given to `launch/pack.py shapes`.

    Raises:
        UserError: a count outside its range.
    """
    return [
        {**metadata(found), "heldout": caption_is_held_out(found.caption, heldout_captions, seed)}
        for found in proving_scenes(count, seed)
    ]


@cache
def proving_scenes(count: int = 552, seed: int = 0) -> tuple[Scene, ...]:
    """The scenes of `proving_prompts`, in its order; rendered, they are what a perfect model generates."""
    check(len(TASKS) <= count <= _MOST, "count", count, f"between {len(TASKS)} and {_MOST}")
    found: dict[str, dict[str, Scene]] = {task: {} for task in TASKS}
    for index in range(HELDOUT_START, HELDOUT_START + _SCENES_PER_PROMPT * count):
        made = scene(seed, index)
        found[made.task].setdefault(made.caption, made)
    rounds = zip_longest(*(of_task.values() for of_task in found.values()))
    taken = islice((made for one_each in rounds for made in one_each if made), count)
    return tuple(sorted(taken, key=lambda made: TASKS.index(made.task)))


def metadata(scene: Scene) -> Metadata:
    """What a scene's caption asks for, as a line of GenEval's prompts."""
    include: list[Metadata] = [
        {"class": group.shape, "count": group.count, **({"color": group.color} if group.color else {})}
        for group in scene.groups
    ]
    if scene.relation:  # the reference object comes first
        include = [include[1], {**include[0], "position": [scene.relation, 0]}]
    more = [{"class": group.shape, "count": group.count + 1} for group in scene.groups]
    exclude = {"exclude": more} if scene.task == "counting" else {}
    return {"tag": scene.task, "include": include, **exclude, "prompt": scene.caption}


def shuffled(prompts: Sequence[Metadata], seed: int = 0) -> list[Metadata]:
    """For each prompt another one to judge its images by, which gives the score of chance.

    Every prompt is used once, none for its own images. So a task's chance score is that of its prompts on images of any
    task, in the shares that tasks have among the prompts. Single objects are so few that one seed's overall score is
    chance's only to 0.02: average over ten.
    """
    assert len(prompts) > 1
    order = permutation(key(seed, "proving", "shuffled"), len(prompts)).tolist()
    others = dict(zip(order, order[1:] + order[:1], strict=True))
    return [prompts[others[n]] for n in range(len(prompts))]


_SHUFFLES = 10


class _CachedDetector:
    """A detector's answers on one image, computed once for many prompts."""

    def __init__(self, detector: Detector, image: Image) -> None:
        self.thresholds, self.classes, self.identity = detector.thresholds, detector.classes, detector.identity
        self._objects = detector.detect(image)
        colors = detector.colors(image, self._objects)
        self._color_of = {id(found): color for found, color in zip(self._objects, colors, strict=True)}

    def detect(self, image: Image) -> list[Detection]:
        return self._objects

    def colors(self, image: Image, objects: Sequence[Detection]) -> list[str]:
        return [self._color_of[id(found)] for found in objects]


def bounds(prompts: Sequence[PromptImages], detector: Detector) -> dict[str, Any]:
    """Overall scores that bound the score of a folder of images.

    Returns:
        "drawn_scenes": the prompts' own scenes, rendered at the images' size, as a perfect model would generate them;
        None if a prompt is none of the proving ground's.
        "shuffled_prompts": chance, the same images judged by other prompts, the mean over ten shuffles; None if there
        is only one prompt.
    """
    return {"drawn_scenes": _of_scenes(prompts, detector), "shuffled_prompts": _by_chance(prompts, detector)}


def _of_scenes(prompts: Sequence[PromptImages], detector: Detector) -> float | None:
    scenes = {scene.caption: scene for scene in proving_scenes()}
    results = []
    for prompt in prompts:
        if prompt.metadata["prompt"] not in scenes:
            return None
        image = draw(scenes[prompt.metadata["prompt"]], len(read_image(prompt.images[0])))
        results.append(counted(prompt.metadata, judge(prompt.metadata, image, detector).correct))
    return _overall(results)


def _by_chance(prompts: Sequence[PromptImages], detector: Detector) -> float | None:
    if len(prompts) == 1:
        return None
    shuffles = [shuffled([prompt.metadata for prompt in prompts], seed) for seed in range(_SHUFFLES)]
    results: list[list[Result]] = [[] for _ in shuffles]
    for number, prompt in enumerate(prompts):
        for image in map(read_image, prompt.images):
            seen = _CachedDetector(detector, image)
            for of_shuffle, asked in zip(results, shuffles, strict=True):
                of_shuffle.append(counted(asked[number], judge(asked[number], image, seen).correct))
    return float(np.mean([_overall(of_shuffle) for of_shuffle in results]))


def _overall(results: Sequence[Result]) -> float:
    overall: float = summarize(results)["overall"]
    return overall
