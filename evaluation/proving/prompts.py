"""GenEval's six tasks on drawn shapes, in GenEval's form, so that GenEval's rules judge them.

Captions are those of held-out scenes (data/packing/shapes.py), each once: the grammar is the training set's, and a
share of the captions themselves may have been held out of it. Where a caption names colours the rules ask for them,
in "counting" and "position", too: that is more than GenEval asks there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice, zip_longest

from data.packing.contents import check
from data.packing.shapes import HELDOUT_START, Scene, caption_is_held_out, scene
from data.randomness import key, permutation
from evaluation.geneval.prompts import TASKS, Metadata

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
