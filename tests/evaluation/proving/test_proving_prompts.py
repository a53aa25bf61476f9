"""GenEval's tasks on shapes: the form is GenEval's, the captions are the training set's, drawn scenes score 1."""

import itertools
import json
from collections import Counter

import pytest

from data.errors import UserError
from data.packing import shapes
from data.packing.shapes import COLORS, SHAPES, Group, Scene, caption_is_held_out, draw
from evaluation.geneval import prompts as geneval
from evaluation.geneval.rules import judge
from evaluation.proving.detector import ShapeDetector
from evaluation.proving.prompts import metadata, proving_prompts, proving_scenes, shuffled

PROMPTS = proving_prompts()


def of(task, *groups, relation=None):
    return metadata(Scene(0, 0, task, tuple(Group(*group) for group in groups), relation, ()))


def test_every_task_has_genevals_form():
    assert of("single_object", (1, "ring", None)) == {
        "tag": "single_object",
        "include": [{"class": "ring", "count": 1}],
        "prompt": "a photo of a ring",
    }
    assert of("two_object", (1, "ring", None), (1, "star", None)) == {
        "tag": "two_object",
        "include": [{"class": "ring", "count": 1}, {"class": "star", "count": 1}],
        "prompt": "a photo of a ring and a star",
    }
    assert of("counting", (3, "cross", "pink")) == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3, "color": "pink"}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three pink crosses",
    }
    assert of("colors", (1, "heart", "orange")) == {
        "tag": "colors",
        "include": [{"class": "heart", "count": 1, "color": "orange"}],
        "prompt": "a photo of an orange heart",
    }
    # The object of reference comes first, the one that the caption names first points to it.
    assert of("position", (1, "ring", "red"), (1, "star", "blue"), relation="above") == {
        "tag": "position",
        "include": [
            {"class": "star", "count": 1, "color": "blue"},
            {"class": "ring", "count": 1, "color": "red", "position": ["above", 0]},
        ],
        "prompt": "a photo of a red ring above a blue star",
    }
    assert of("color_attr", (1, "ring", "red"), (1, "star", "blue")) == {
        "tag": "color_attr",
        "include": [{"class": "ring", "count": 1, "color": "red"}, {"class": "star", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red ring and a blue star",
    }


def test_genevals_reader_takes_them(tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes(geneval.to_lines(PROMPTS))
    assert geneval.read(tmp_path / "prompts.jsonl") == PROMPTS


def test_captions_are_distinct_and_tasks_equal_as_far_as_captions_allow():
    assert len({it["prompt"] for it in PROMPTS}) == len(PROMPTS) == 552
    tasks = {"single_object": 8, "two_object": 56, "counting": 142, "colors": 64, "position": 141, "color_attr": 141}
    assert Counter(it["tag"] for it in PROMPTS) == tasks
    assert [task for task, _ in itertools.groupby(it["tag"] for it in PROMPTS)] == list(geneval.TASKS)
    assert Counter(it["tag"] for it in proving_prompts(48)) == dict.fromkeys(geneval.TASKS, 8)
    # All there are: none is missing by chance.
    assert {it["prompt"] for it in PROMPTS if it["tag"] == "colors"} == {
        f"a photo of {shapes.phrase(Group(1, shape, color))}" for shape in SHAPES for color in COLORS
    }


def test_they_are_a_function_of_their_arguments():
    assert proving_prompts() == PROMPTS
    other = proving_prompts(seed=1)
    assert len({it["prompt"] for it in other} - {it["prompt"] for it in PROMPTS}) > 200
    unaware = proving_prompts(heldout_captions=0)
    assert [it["prompt"] for it in unaware] == [it["prompt"] for it in PROMPTS]
    assert not any(it["heldout"] for it in unaware)


@pytest.mark.parametrize("count", [5, 3001])
def test_a_wrong_count_is_told(count):
    with pytest.raises(UserError, match=f"count is {count}: it should be between 6 and 3000"):
        proving_prompts(count)


def test_held_out_are_those_that_the_packer_leaves_out():
    assert [it["heldout"] for it in PROMPTS] == [caption_is_held_out(it["prompt"], 0.1, 0) for it in PROMPTS]
    assert 0.06 < sum(it["heldout"] for it in PROMPTS) / len(PROMPTS) < 0.14
    contents = shapes.dataset_spec(4000, heldout_captions=0.1)
    trained = {shapes.scene(0, index).caption for index in contents.splits["train"]}
    assert not trained & {it["prompt"] for it in PROMPTS if it["heldout"]}
    few = [it for it in PROMPTS if it["tag"] in ("single_object", "two_object", "colors")]
    assert {it["prompt"] for it in few} - trained == {it["prompt"] for it in few if it["heldout"]}


class Once(ShapeDetector):
    """Finds what it found before in the same picture."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def detect(self, image):
        if id(image) not in self.found:
            self.found[id(image)] = super().detect(image)
        return self.found[id(image)]


def test_drawn_scenes_score_one_and_shuffled_prompts_chance():
    detector, prompts = Once(), proving_prompts(600)
    images = [draw(it, 32) for it in proving_scenes(600)]
    right = [judge(prompt, image, detector).correct for prompt, image in zip(prompts, images, strict=True)]
    assert sum(right) >= 0.99 * 600
    by_task = {task: [] for task in geneval.TASKS}
    for seed in range(10):
        for other, image in zip(shuffled(prompts, seed), images, strict=True):
            by_task[other["tag"]].append(judge(other, image, detector).correct)
    chance = {task: sum(rights) / len(rights) for task, rights in by_task.items()}
    assert 0.01 < sum(chance.values()) / 6 < 0.07
    # A picture has one or two of eight shapes; by chance they are seldom where and as they should be.
    assert 0.1 < chance["single_object"] < 0.35 and max(chance["position"], chance["color_attr"]) < 0.01


def test_shuffled_prompts_are_the_same_and_none_is_in_its_place():
    others = shuffled(PROMPTS)
    lines = [json.dumps(it) for it in PROMPTS]
    assert sorted(map(json.dumps, others)) == sorted(lines)
    assert all(json.dumps(other) != line for other, line in zip(others, lines, strict=True))
    assert shuffled(PROMPTS) == others != shuffled(PROMPTS, seed=1)
    # They change their task as often as two prompts at random differ in it.
    kept = sum(a["tag"] == b["tag"] for a, b in zip(others, PROMPTS, strict=True)) / len(PROMPTS)
    assert 0.15 < kept < 0.28
    assert shuffled(PROMPTS[:2]) == PROMPTS[1::-1]
