"""GenEval's folder of images: what is written is read back, and what is malformed is said in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import BOMB, foreign
from PIL import Image

from data.errors import UserError
from data.files import write_png
from evaluation.geneval.summary import begin_folder, image_path, read_folder, read_image, write_grid

CIRCLE = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}
STARS = {
    "tag": "counting",
    "include": [{"class": "star", "count": 2}],
    "exclude": [{"class": "star", "count": 3}],
    "prompt": "a photo of two stars",
}


def plain(shade: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.full((height, width, 3), shade, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of two prompts with three images each."""
    root = tmp_path / "images"
    begin_folder(root, [CIRCLE, STARS])
    for prompt in range(2):
        for image in range(3):
            write_png(image_path(root, prompt, image), plain(100 * prompt + 10 * image))
    return root


def test_the_layout_is_genevals(folder: Path) -> None:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    images = {f"{prompt:05d}/samples/{image:04d}.png" for prompt in range(2) for image in range(3)}
    assert files == images | {"00000/metadata.jsonl", "00001/metadata.jsonl"}
    assert (folder / "00001" / "metadata.jsonl").read_text() == json.dumps(STARS) + "\n"


def test_what_was_written_is_read(folder: Path) -> None:
    found = read_folder(folder)
    assert [it.metadata for it in found] == [CIRCLE, STARS]
    assert [[int(read_image(path)[0, 0, 0]) for path in it.images] for it in found] == [[0, 10, 20], [100, 110, 120]]


def test_folders_and_images_come_by_number_whatever_their_digits(tmp_path: Path) -> None:
    """As others may name them: 2 comes before 10."""
    for prompt in range(11):
        samples = tmp_path / str(prompt) / "samples"
        samples.mkdir(parents=True)
        (tmp_path / str(prompt) / "metadata.jsonl").write_text(json.dumps({**CIRCLE, "prompt": str(prompt)}))
        for image in range(11):
            write_png(samples / f"{image}.png", plain(image))
    for name in ("notes", "\u00b2", "1.5"):  # no number, a digit that is none, and nothing that GenEval writes
        (tmp_path / name).mkdir()
    found = read_folder(tmp_path)
    assert [it.metadata["prompt"] for it in found] == [str(prompt) for prompt in range(11)]
    assert [path.stem for path in found[0].images] == [str(image) for image in range(11)]


def test_metadata_is_one_object_of_json_over_any_lines(folder: Path) -> None:
    more = {**STARS, "id": 7}
    (folder / "00001" / "metadata.jsonl").write_text(json.dumps(more, indent=2) + "\n\n")
    assert read_folder(folder)[1].metadata == more


def test_a_part_of_the_numbers_is_read(folder: Path) -> None:
    shutil.rmtree(folder / "00000")
    (folder / "00001").rename(folder / "0552")
    assert [it.folder.name for it in read_folder(folder)] == ["0552"]


@pytest.mark.parametrize(("images", "rows", "columns"), [(1, 1, 1), (3, 2, 2), (4, 2, 2), (5, 2, 3)])
def test_a_grid_shows_its_images_row_by_row(tmp_path: Path, images: int, rows: int, columns: int) -> None:
    begin_folder(tmp_path, [CIRCLE])
    for image in range(images):
        write_png(image_path(tmp_path, 0, image), plain(10 + image))
    write_grid(read_folder(tmp_path)[0])
    grid = read_image(tmp_path / "00000" / "grid.png")
    assert grid.shape == (rows * 4, columns * 6, 3)
    shades = [int(grid[4 * row + 3, 6 * column + 5, 0]) for row in range(rows) for column in range(columns)]
    assert shades == [10 + i if i < images else 0 for i in range(rows * columns)]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (6, 4), (204, 204, 204)).convert(mode).save(tmp_path / "0.png")
    assert np.array_equal(read_image(tmp_path / "0.png"), plain(204))


@pytest.mark.parametrize("name", foreign(8))
def test_images_of_others_are_read_as_training_reads_them(tmp_path: Path, name: str) -> None:
    content, colour = foreign(8)[name]
    (tmp_path / name).write_bytes(content)
    assert np.abs(read_image(tmp_path / name).astype(int) - colour).max() <= 1


def test_an_image_over_the_pixel_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0000.png").write_bytes(BOMB)
    with pytest.raises(UserError, match=r"0000.png: has too many pixels"):
        read_image(tmp_path / "0000.png")


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda root: shutil.rmtree(root), "there is no such folder"),
    "empty": (lambda root: [shutil.rmtree(path) for path in root.iterdir()], "must hold a folder for each prompt"),
    "a number twice": (
        lambda root: shutil.copytree(root / "00001", root / "1"),
        "images: 00001 and 1 have the same number: remove one",
    ),
    "no line": (lambda root: (root / "00001" / "metadata.jsonl").unlink(), "00001: has no metadata.jsonl"),
    "two lines": (
        lambda root: (root / "00001" / "metadata.jsonl").write_text((json.dumps(STARS) + "\n") * 2),
        "metadata.jsonl: has more than one object of JSON",
    ),
    "no JSON": (
        lambda root: (root / "00001" / "metadata.jsonl").write_text("two stars"),
        "Invalid JSON",
    ),
    "no samples": (lambda root: shutil.rmtree(root / "00001" / "samples"), "00001: has no image samples/0000.png"),
    "samples of another name": (
        lambda root: [path.rename(path.with_suffix(".txt")) for path in (root / "00001" / "samples").iterdir()],
        "00001: has no image samples/0000.png, but 0000.txt, 0001.txt, 0002.txt",
    ),
    "an image twice": (
        lambda root: shutil.copy(image_path(root, 1, 2), image_path(root, 1, 2).with_suffix(".jpg")),
        "samples: 0002.jpg and 0002.png have the same number: remove one",
    ),
    "an image lost": (
        lambda root: image_path(root, 1, 2).unlink(),
        r"0000\d: holds [23] images where others hold [23]: complete it",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_malformed_folder_is_refused(folder: Path, mistake: str) -> None:
    spoil, said = MISTAKES[mistake]
    spoil(folder)
    with pytest.raises(UserError, match=said):
        read_folder(folder)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_a_damaged_image_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "0000.png"
    write_png(path, np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=r"0000.png: is no image that can be read \(.*\): make it again"):
        read_image(path)
