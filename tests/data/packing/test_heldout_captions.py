"""Captions held out of training: never there, wherever they come up, and nothing that they name is."""

import itertools
import json
import tarfile

import pytest

from data.errors import UserError
from data.packing.shapes import COLORS, RELATIONS, SHAPES, Group, Scene, caption_is_held_out, dataset_spec, scene
from launch.pack import main

COUNT, SHARE = 6000, 0.1
HELD_OUT = dataset_spec(COUNT, heldout_captions=SHARE)


def all_captions():
    def caption(task, *groups, relation=None):
        return Scene(0, 0, task, groups, relation, ()).caption

    for shape, color, count in itertools.product(SHAPES, (None, *COLORS), (1, 2, 3, 4)):
        yield caption("", Group(count, shape, color))
    for (a, b), named in itertools.product(itertools.permutations(SHAPES, 2), (False, True)):
        for c, d in itertools.permutations(COLORS, 2) if named else [(None, None)]:
            for relation in (None, *RELATIONS):
                yield caption("", Group(1, a, c), Group(1, b, d), relation=relation)


def test_the_share_is_that_of_all_captions():
    captions = set(all_captions())
    assert len(captions) == 16248
    assert {scene(0, index).caption for index in range(1000)} <= captions
    held_out = {share: {it for it in captions if caption_is_held_out(it, share, 0)} for share in (0, 0.1, 0.2)}
    assert not held_out[0] and held_out[0.1] < held_out[0.2]
    assert len(held_out[0.1]) / 16248 == pytest.approx(0.1, abs=0.01)
    assert len(held_out[0.2]) / 16248 == pytest.approx(0.2, abs=0.01)
    other = {it for it in captions if caption_is_held_out(it, 0.1, 1)}
    assert len(other & held_out[0.1]) < 0.2 * len(other)


def test_training_passes_over_them_and_is_as_long_as_without():
    train = HELD_OUT.splits["train"]
    passed = [caption_is_held_out(scene(0, index).caption, SHARE, 0) for index in range(train[-1] + 1)]
    assert list(train) == [index for index, is_so in enumerate(passed) if not is_so]
    assert len(train) == len(dataset_spec(COUNT).splits["train"]) == 0.95 * COUNT < train[-1]


def test_held_out_scenes_have_all_captions():
    assert HELD_OUT.splits["heldout"] == dataset_spec(COUNT).splits["heldout"]
    captions = [scene(0, index).caption for index in HELD_OUT.splits["heldout"]]
    assert 0 < sum(caption_is_held_out(it, SHARE, 0) for it in captions) < 0.2 * len(captions)


def test_no_shape_colour_relation_or_number_is_lost_to_training():
    scenes = [scene(0, index) for index in HELD_OUT.splits["train"]]
    groups = {(it.task, group) for it in scenes for group in it.groups}
    assert {group.shape for task, group in groups if task == "single_object"} == set(SHAPES)
    assert {(group.shape, group.color) for _, group in groups if group.color} == set(itertools.product(SHAPES, COLORS))
    assert {(group.shape, group.count) for _, group in groups if group.count > 1} == {
        (shape, count) for shape in SHAPES for count in (2, 3, 4)
    }
    placed = {(it.relation, n, group.shape) for it in scenes if it.relation for n, group in enumerate(it.groups)}
    assert placed == set(itertools.product(RELATIONS, (0, 1), SHAPES))
    # Two objects without colours come up for each pair in one order at least.
    pairs = {frozenset(group.shape for group in it.groups) for it in scenes if it.task == "two_object"}
    assert len(pairs) == 8 * 7 / 2


def test_without_the_option_a_pack_is_what_it_was():
    plain = dataset_spec(100, heldout=0.1, seed=3)
    assert plain.splits == {"train": range(90), "heldout": range(10**9, 10**9 + 10)}
    assert plain.arguments == {"count": 100, "size": 64, "heldout": 0.1, "seed": 3}


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan")])
def test_a_wrong_share_is_told(share):
    with pytest.raises(UserError, match="heldout_captions is .*: it should be a share between 0 and 0.5"):
        dataset_spec(100, heldout_captions=share)


def test_too_many_scenes_to_look_through_are_told():
    with pytest.raises(UserError, match="count is 100000000: it should be between 1 and 10000000"):
        dataset_spec(10**8, heldout_captions=0.1)


def captions(folder):
    """What a split's captions are, read with no code of the packer's."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            yield from (tar.extractfile(it).read().decode() for it in tar if it.name.endswith(".txt"))


def test_the_command_line_packs_them_and_goes_on_with_no_other_share(tmp_path, capsys):
    words = f"shapes --out {tmp_path} --count 200 --size 32 --workers 1 --heldout_captions".split()
    assert main([*words, "0.3"]) == 0
    trained = list(captions(tmp_path / "train"))
    assert len(trained) == 190 and not any(caption_is_held_out(it, 0.3, 0) for it in trained)
    assert any(caption_is_held_out(it, 0.3, 0) for it in captions(tmp_path / "heldout"))
    assert json.loads((tmp_path / "dataset.json").read_text())["arguments"]["heldout_captions"] == 0.3
    assert main([*words, "0.2"]) == 2
    assert "heldout_captions is 0.3, not 0.2" in capsys.readouterr().err
    assert main(words[:-1]) == 2
    assert "heldout_captions is 0.3, not None" in capsys.readouterr().err
