"""Bounds: a folder of the prompts' own scenes scores as they do, and by chance next to nothing."""

import pytest

from data.files import write_png
from data.packing.shapes import draw
from evaluation.geneval.summary import begin_folder, image_path, read_folder
from evaluation.proving import prompts as bounds_module
from evaluation.proving.detector import ShapeDetector
from evaluation.proving.prompts import bounds, proving_prompts, proving_scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every eighth prompt, each with a picture of the scene of the one before it."""
    root = tmp_path_factory.mktemp("bounds")
    chosen = [(it, of) for it, of in zip(proving_prompts(), proving_scenes(), strict=True) if of.task != "counting"]
    chosen = chosen[::8]
    begin_folder(root, [prompt for prompt, _ in chosen])
    for number in range(len(chosen)):
        write_png(image_path(root, number, 0), draw(chosen[number - 1][1], 32))
    return read_folder(root)


def test_the_bounds_are_of_the_scenes_and_of_the_images(folder):
    found = bounds(folder, ShapeDetector())
    # The images are wrong for their prompts, which is no matter to either bound.
    assert found["drawn_scenes"] > 0.97
    assert 0 < found["shuffled_prompts"] < 0.15


def test_prompts_from_elsewhere_have_no_scenes(folder):
    elsewhere = [type(it)(it.folder, {**it.metadata, "prompt": "a ring, perhaps"}, it.images) for it in folder]
    found = bounds(elsewhere, ShapeDetector())
    assert found["drawn_scenes"] is None and found["shuffled_prompts"] is not None


def test_one_prompt_has_no_other_to_be_judged_by(folder):
    assert bounds(folder[:1], ShapeDetector())["shuffled_prompts"] is None


def test_scenes_are_drawn_at_the_size_of_their_images(folder, monkeypatch):
    sides = []
    monkeypatch.setattr(bounds_module, "draw", lambda scene, side: sides.append(side) or draw(scene, side))
    bounds(folder[:3], ShapeDetector())
    assert sides == [32] * 3
