"""Files of edits: the data set's layout, regions, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pictures import encode, foreign
from PIL import Image

from data.decode import decode_file
from data.errors import UserError
from evaluation.editing.edit_list import Edit, Entry, given_region, in_boxes, read_edits

AS_PUBLISHED = """
-
    init_img:  pictures/pond.png

    source_prompt: A duck on a pond.
        The water is calm.

    target_prompts:
     - A swan on a pond. The water is calm.
     - A duck on a pond. The water''s surface is frozen.

    target_codes:
     - 1_swan
     - 2_frozen

-

    input_img:  pictures/shop.png
    source_prompt: A shop whose sign
      reads "TEA"
    target_prompts:
    - A shop whose sign reads "INK"
"""
ENTRY = {"init_img": "a.png", "source_prompt": "a cat", "target_prompts": ["a dog"]}


def write(folder: Path, *entries: Any) -> Path:
    (folder / "edits.yaml").write_text(yaml.safe_dump(list(entries)))
    return folder / "edits.yaml"


def edit_of(folder: Path, **changes: Any) -> Edit:
    return read_edits(write(folder, {**ENTRY, **changes}))[0]


def test_the_layouts_of_the_data_set_and_of_its_codes_examples(tmp_path: Path) -> None:
    (tmp_path / "edits.yaml").write_text(AS_PUBLISHED)
    first, second, third = read_edits(tmp_path / "edits.yaml")
    assert (first.name, second.name, third.name) == ("00000_0", "00000_1", "00001_0")
    assert first.image == second.image == tmp_path / "pictures/pond.png"
    assert first.source == second.source == "A duck on a pond. The water is calm."
    assert second.target == "A duck on a pond. The water''s surface is frozen."
    assert (first.code, second.code, third.code) == ("1_swan", "2_frozen", "")
    assert third.image == tmp_path / "pictures/shop.png" and third.source == 'A shop whose sign reads "TEA"'


def test_codes_are_left_out_where_one_is_missing(tmp_path: Path) -> None:
    """The published file has an entry of 9 codes for 10 prompts."""
    targets = {"target_prompts": ["a dog", "a fox"]}
    assert edit_of(tmp_path, **targets, target_codes=["1_dog"]).code == ""
    assert edit_of(tmp_path, **targets, target_codes=["1_dog", "2_fox"]).code == "1_dog"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "edits.yaml: must be a list of images with init_img, source_prompt and target_prompts"),
        (["a.png"], "entry 0: must have init_img, source_prompt and target_prompts"),
        ([ENTRY, {**ENTRY, "init_img": None}], "entry 1: init_img: input should be a valid string"),
        ([{"init_img": "a.png", "target_prompts": ["a"]}], "entry 0: source_prompt: field required"),
        ([{"source_prompt": "a", "target_prompts": ["a"]}], "entry 0: init_img: field required"),
        ([{**ENTRY, "target_prompt": "a"}], "unknown field 'target_prompt'; did you mean 'target_prompts'?"),
        ([{**ENTRY, "target_prompts": []}], "target_prompts: .*at least 1 item"),
        ([{**ENTRY, "target_prompts": "a dog"}], "target_prompts: input should be a valid list"),
        ([{**ENTRY, "box": [0, 0, 1]}], "box"),
        ([{**ENTRY, "box": [0, 0, 1, 1], "detect": ["cat"]}], "give one of box, mask and detect"),
        ([{**ENTRY, "init_img": "../a.png"}], "init_img '../a.png': must be a path below the folder of edits.yaml"),
        ([{**ENTRY, "init_img": "/etc/a.png"}], "init_img '/etc/a.png': must be a path below"),
        ([{**ENTRY, "mask": "b/../../a.png"}], "mask 'b/../../a.png': must be a path below"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, entries: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_edits(write(tmp_path, *entries))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- init_img: a.png\n  source_prompt: x\n  source_prompt: y\n", "line 3: 'source_prompt' is given twice"),
        ("- init_img: a.png\n  source_prompt: x\n  target_prompts: [y]\n  box: [0, 0, 010, 9]", "line 4: 010 is octal"),
        ("- init_img: a.png\n  source_prompt: x\n  target_prompts: [y]\n  box: [0, 0, .inf, 9]", "box.2: .* finite"),
        ("a: &a [" + "x, " * 99 + "]\nb: &b [" + "*a, " * 99 + "]\nc: [" + "*b, " * 99 + "]", "aliases expand"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "edits.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"--edits .*edits.yaml.*{said}"):
        read_edits(tmp_path / "edits.yaml")


@pytest.mark.parametrize("content", ["[a", "a: b", "", "\xff"])
def test_what_is_no_list_in_yaml(tmp_path: Path, content: str) -> None:
    (tmp_path / "edits.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="--edits .*edits.yaml(: not YAML|: must be a list|: should be UTF-8)"):
        read_edits(tmp_path / "edits.yaml")
    with pytest.raises(UserError, match="none.yaml: cannot be read"):
        read_edits(tmp_path / "none.yaml")


# Regions


@pytest.mark.parametrize(
    ("boxes", "rows", "columns"),
    [
        ([(1, 2, 3, 5)], slice(2, 5), slice(1, 3)),
        ([(1.2, 2.7, 2.1, 4.01)], slice(2, 5), slice(1, 3)),
        ([(-2.5, -1, 3, 99)], slice(0, 8), slice(0, 3)),
        ([(1, 2, 2, 5), (2, 2, 3, 5)], slice(2, 5), slice(1, 3)),
        ([(-9, -9, -1, -1), (1, 1, 2, 2)], slice(1, 2), slice(1, 2)),
    ],
)
def test_every_pixel_that_a_box_touches_is_inside(
    boxes: list[tuple[float, float, float, float]], rows: slice, columns: slice
) -> None:
    expected = np.zeros((8, 6), np.bool_)
    expected[rows, columns] = True
    np.testing.assert_array_equal(in_boxes(boxes, 8, 6), expected)


def test_regions_that_entries_give(tmp_path: Path) -> None:
    mask = np.zeros((8, 6), np.uint8)
    mask[2:5, 1:3] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert given_region(edit_of(tmp_path), tmp_path, 8, 6) is None
    assert given_region(edit_of(tmp_path, detect=["cat"]), tmp_path, 8, 6) is None
    for given in ({"box": [1, 2, 3, 5]}, {"mask": "mask.png"}):
        found = given_region(edit_of(tmp_path, **given), tmp_path, 8, 6)
        np.testing.assert_array_equal(found, mask > 0)


@pytest.mark.parametrize("box", [[0, 0, 7, 8], [0, 0, 6, 9], [-1, 0, 3, 3], [3, 3, 3, 5], [3, 5, 5, 3]])
def test_a_box_that_is_none_or_outside(tmp_path: Path, box: list[int]) -> None:
    with pytest.raises(UserError, match=r"entry 0: box .*: must be \[x0, y0, x1, y1\] within a.png, which has 6 x 8"):
        given_region(edit_of(tmp_path, box=box), tmp_path, 8, 6)


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    Image.new("L", (6, 9)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="mask mask.png: has 6 x 9 pixels, and must have 6 x 8 as a.png"):
        given_region(edit_of(tmp_path, mask="mask.png"), tmp_path, 8, 6)


# Pictures


def test_pictures_come_at_their_own_size_upright_and_on_white(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    turned = Image.fromarray(np.rot90(pixels))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(decode_file(tmp_path / "turned.png"), pixels.transpose(2, 0, 1))
    Image.new("RGBA", (5, 7), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (decode_file(tmp_path / "clear.png") == 255).all()


def test_pictures_and_masks_of_others_are_read_as_training_reads_them(tmp_path: Path) -> None:
    for name, (content, colour) in foreign(16).items():
        (tmp_path / name).write_bytes(content)
        assert np.abs(decode_file(tmp_path / name).astype(int) - np.array(colour)[:, None, None]).max() <= 1
    wide = np.zeros((16, 16), np.uint16)
    wide[2:4] = 257
    (tmp_path / "mask.png").write_bytes(encode(wide))
    edit = Edit(
        0,
        0,
        tmp_path / "a.png",
        "",
        "",
        "",
        Entry(init_img="a.png", source_prompt="", target_prompts=[""], mask="mask.png"),
    )
    region = given_region(edit, tmp_path, 16, 16)
    assert region is not None and region[2:4].all() and region.sum() == 32


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a.png: is no image that can be read \(.*\): make it again"):
        decode_file(tmp_path / "a.png")
    with pytest.raises(UserError, match="b.png: cannot be read: No such file"):
        decode_file(tmp_path / "b.png")
