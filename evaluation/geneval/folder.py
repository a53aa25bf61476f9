"""GenEval's folder of images, written and read.

    00000/metadata.jsonl      the prompt, one line
    00000/samples/0000.png    its images
    00000/grid.png            all of them in one

A folder for each prompt, in the prompts' order. Of what others made any digits may name a folder or image, and numbers
may be missing. Images may not: a folder that lacks some would get a score that looks like a whole one.

Source: Ghosh et al., "GenEval" (2023), and its evaluation/evaluate_images.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.decode import decode_file
from data.errors import UserError
from data.files import atomic_write
from data.listing import is_image
from evaluation.drawing import write_png
from evaluation.geneval.detection import Image
from evaluation.geneval.prompts import Metadata, read_one, to_lines


@dataclass(frozen=True)
class Prompted:
    """One prompt and its images.

    Attributes:
        folder: the prompt's own, such as 00000.
        metadata: of the prompt, GenEval's.
        images: the files, in the order of their numbers.
    """

    folder: Path
    metadata: Metadata
    images: tuple[Path, ...]


def image_path(root: Path, prompt: int, image: int) -> Path:
    """The file of an image by its prompt's number and its own, both from 0."""
    return root / f"{prompt:05d}" / "samples" / f"{image:04d}.png"


def begin_folder(root: Path, prompts: Sequence[Metadata]) -> None:
    """Make the folders and write each prompt's line; what is there already stays.

    Raises:
        UserError: they cannot be made.
    """
    try:
        for number, metadata in enumerate(prompts):
            samples = image_path(root, number, 0).parent
            samples.mkdir(parents=True, exist_ok=True)
            line = samples.with_name("metadata.jsonl")
            if not line.exists():
                atomic_write(line, to_lines([metadata]))
    except OSError as error:
        raise UserError(f"{root}: cannot be written to: {error.strerror}") from error


def read_image(path: Path) -> Image:
    """An image, uint8 (H, W, 3).

    Raises:
        UserError: it is no image, or a damaged one.
    """
    return np.ascontiguousarray(decode_file(path).transpose(1, 2, 0))


def write_grid(it: Prompted) -> None:
    """Write grid.png of a prompt's images, as nearly square as can be, row by row."""
    images = [read_image(path) for path in it.images]
    height, width = images[0].shape[:2]
    columns = math.ceil(math.sqrt(len(images)))
    grid = np.zeros((-(-len(images) // columns) * height, columns * width, 3), np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    write_png(it.folder / "grid.png", grid)


def read_folder(root: Path) -> list[Prompted]:
    """All prompts of a folder, in the order of their numbers.

    Raises:
        UserError: it is no such folder, or something is missing from it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder of images")
    folders = _numbered((path.name, path) for path in root.iterdir() if path.is_dir())
    if not folders:
        raise UserError(f"{root}: must hold a folder for each prompt: 00000/metadata.jsonl and 00000/samples/0000.png")
    found = [_read_prompt(folder) for folder in folders]
    usual, _ = Counter(len(it.images) for it in found).most_common(1)[0]
    for it in found:
        if len(it.images) != usual:
            raise UserError(f"{it.folder}: holds {len(it.images)} images where others hold {usual}: complete it")
    return found


def _read_prompt(folder: Path) -> Prompted:
    line = folder / "metadata.jsonl"
    if not line.exists():
        raise UserError(f"{folder}: has no metadata.jsonl, which says what its images must show")
    samples = folder / "samples"
    files = sorted(samples.iterdir()) if samples.is_dir() else []
    images = _numbered((path.stem, path) for path in files if is_image(path.name))
    if not images:
        others = f", but {', '.join(path.name for path in files[:3])}" if files else ""
        raise UserError(f"{folder}: has no image samples/0000.png{others}")
    return Prompted(folder, read_one(line), tuple(images))


def _numbered(paths: Iterable[tuple[str, Path]]) -> list[Path]:
    """The paths whose names, given before them, are numbers, in their order; others are left out, as by the official
    code.

    Raises:
        UserError: two have the same number.
    """
    found: dict[int, Path] = {}
    for name, path in sorted(paths):
        if name.isdecimal() and (first := found.setdefault(int(name), path)) is not path:
            raise UserError(f"{path.parent}: {first.name} and {path.name} are of one number: remove one")
    return [found[number] for number in sorted(found)]
