"""Pictures in DPG-Bench's layout: one image a prompt, named by its id, a 2 x 2 grid of four pictures.

- They stand top left, top right, bottom left, bottom right; the resolution is the side of one in pixels.
- A picture is a function of the weights, the sampler, the seed, the prompt and its number. Each is a file until its
  grid is put together, so what a killed job has drawn is there for the next, on any number of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.decode import decode_file
from data.errors import UserError
from data.listing import excluded, is_image
from evaluation.dpg.rules import Item
from evaluation.drawing import unfinished_batches, write_png
from evaluation.parts import begin_or_go_on
from t2i.config_sampling import SamplingConfig
from t2i.engine.checkpoint.format import sha256
from t2i.pipeline import Pipeline, pictures_of

PICTURES = 4
"""Of a prompt."""


def boxes(resolution: int, pictures: int) -> list[tuple[int, int, int, int]]:
    """Left, upper, right and lower edges in pixels of a grid's pictures."""
    corners = [(column * resolution, row * resolution) for row in range(2) for column in range(2)]
    return [(left, upper, left + resolution, upper + resolution) for left, upper in corners[:pictures]]


def find(folder: Path, ids: Collection[str]) -> dict[str, Path]:
    """A folder's images by the ids of their prompts: their names without the ending, or else up to the first dot.

    Raises:
        UserError: there is no such folder, or two images are of one prompt.
    """
    found: dict[str, Path] = {}
    try:
        paths = sorted(path for path in folder.iterdir() if is_image(path.name) and not excluded(path.name))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    for path in paths:
        name = path.stem if path.stem in ids else path.name.split(".")[0]
        if name in found:
            raise UserError(f"{folder} holds two images of one prompt, {found[name].name} and {path.name}: remove one")
        found[name] = path
    return found


def examine(path: Path, resolution: int, pictures: int) -> str:
    """The SHA-256 of an image's file.

    Raises:
        UserError: it cannot be read whole, or is no grid of pictures of this resolution (nor, if one is scored, one).
    """
    height, width = decode_file(path).shape[1:]
    side = 2 * resolution
    if not (height == width == side or (pictures == 1 and height == width == resolution)):
        raise UserError(
            f"{path} is {width} x {height} pixels: a grid of 2 x 2 pictures of --resolution {resolution} "
            f"has {side} x {side}"
        )
    return sha256(path)


def crops(path: Path, resolution: int, pictures: int) -> list[Image.Image]:
    """A grid's pictures."""
    image = Image.fromarray(decode_file(path).transpose(1, 2, 0))
    return [image.crop(box) for box in boxes(resolution, pictures)]


@dataclass(frozen=True)
class Drawing:
    """Grids in the making.

    Attributes:
        out: the job's folder; the grids come into `grids/`, single pictures into `tiles/`.
        items: the prompts.
        resolution: side of a picture in pixels.
        sampling: how they are drawn.
    """

    out: Path
    items: Sequence[Item]
    resolution: int
    sampling: SamplingConfig

    def grid(self, item: Item) -> Path:
        """Where a prompt's grid is."""
        return self.out / "grids" / f"{item.id}.png"

    def tile(self, item: Item, number: int) -> Path:
        """Where one of its pictures is until then."""
        return self.out / "tiles" / f"{item.id}_{number}.png"

    def begin(self, made_of: dict[str, Any], beside: dict[str, Any]) -> None:
        """Begin in the folder, which is held, or see that the pictures that are there are of the same drawing.

        Args:
            made_of: what else the pictures depend on, in JSON's types.
            beside: what else is worth knowing of them.

        Raises:
            UserError: they are not, it holds anything else, or cannot be written to.
        """
        settings = {**made_of, "resolution": self.resolution, "sampling": self.sampling.model_dump(mode="json")}
        begin_or_go_on(self.out / "grids.json", settings, beside, "grids drawn otherwise")
        for name in ("grids", "tiles"):
            (self.out / name).mkdir(exist_ok=True)

    def unfinished(self) -> list[Item]:
        """Prompts without a grid."""
        return [item for item in self.items if not self.grid(item).exists()]

    def _is_missing(self, picture: tuple[Item, int]) -> bool:
        return not (self.grid(picture[0]).exists() or self.tile(*picture).exists())

    def missing(self) -> list[Sequence[tuple[Item, int]]]:
        """Batches of pictures, prompts and numbers, from which any has to be drawn."""
        pictures = [(item, number) for item in self.items for number in range(PICTURES)]
        return unfinished_batches(pictures, self.sampling.batch_size, self._is_missing)

    def draw(self, pipeline: Pipeline, mine: Sequence[tuple[Item, int]], drawn: Callable[[int], object]) -> None:
        """Draw these pictures, whole batches, and tell of each batch how many it was; those that are there stay."""
        every = pictures_of([item.prompt for item in self.items], PICTURES)
        numbered = {item.id: every[i * PICTURES :] for i, item in enumerate(self.items)}
        pictures = [numbered[item.id][number] for item, number in mine]
        names = iter(mine)
        for batch in pipeline.draw_batches(pictures, self.sampling, (self.resolution, self.resolution)):
            for image in batch:
                if self._is_missing(picture := next(names)):
                    write_png(self.tile(*picture), image.permute(1, 2, 0).numpy())
            drawn(len(batch))

    def assemble(self, mine: Sequence[Item]) -> None:
        """Put these prompts' grids together."""
        for item in mine:
            tiles = [decode_file(self.tile(item, number)).transpose(1, 2, 0) for number in range(PICTURES)]
            write_png(self.grid(item), np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])]))

    def end(self) -> None:
        """Remove the single pictures."""
        shutil.rmtree(self.out / "tiles")
