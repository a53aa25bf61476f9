"""Files of edits, and how well an edit keeps the background.

A file is YAML in the layout of FlowEdit's data set:

    - init_img: Images/bear.png           # relative to the file's folder; input_img means the same
      source_prompt: A large brown bear walking through a stream of water.
      target_prompts:
        - A large black bear walking through a stream of water.
      target_codes:                       # a word for each target; optional
        - 1_black_bear
      box: [212, 96, 840, 1010]           # the edited region; or mask: FILE, or detect: [bear]; or nothing

`box` is x0, y0, x1, y1 in pixels of the image, x to the right and y down, x1 and y1 one beyond the last. `mask` is an
image of the same size, black outside the region. `detect` names classes of a detector: the region is all their boxes in
the image and in the result.

The background scores are MSE and SSIM of the pixels outside the edited region. The PixelDiT paper (section D.2, Table
14) does not define its own further. Here values are 0 to 1, and MSE is the mean over the outside pixels and their three
channels. SSIM is a map over the whole image, with Wang et al.'s Gaussian window (11 pixels, sigma 1.5), averaged over
channels, then over the outside pixels. Windows of pixels near the region reach into it, so `ssim_replaced` is the same
for the result with the source's pixels put back inside the region.

Source: Kulikov et al., "FlowEdit" (2025): Data/flowedit.yaml has init_img, the examples of the code input_img. Wang et
al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), equation 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, Field, model_validator
from scipy.ndimage import gaussian_filter

from data.decode import decode_file
from data.errors import UserError
from data.yaml_file import read_yaml
from t2i.config.base import Section
from t2i.config.loading import validate_section

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]
Inside = NDArray[np.bool_]
"""(H, W): the pixels of the edited region."""

METRICS = ("mse", "ssim", "ssim_replaced")
_SIGMA, _RADIUS = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2


def ssim_map(first: Floats, second: Floats) -> Floats:
    """SSIM (H, W) around each pixel of two images (H, W, 3) in [0, 1]; images are mirrored at their edges."""
    blur = partial(gaussian_filter, sigma=_SIGMA, radius=_RADIUS, axes=(0, 1))
    mean1, mean2 = blur(first), blur(second)
    variance1, variance2 = blur(first * first) - mean1**2, blur(second * second) - mean2**2
    covariance = blur(first * second) - mean1 * mean2
    alike = (2 * mean1 * mean2 + _C1) * (2 * covariance + _C2)
    return np.asarray((alike / ((mean1**2 + mean2**2 + _C1) * (variance1 + variance2 + _C2))).mean(-1))


def background_scores(source: Pixels, result: Pixels, inside: Inside) -> dict[str, float]:
    """ "mse", "ssim" and "ssim_replaced" of the background, from uint8 (H, W, 3) before and after the edit.

    Args:
        inside: the edited region, which is not all of the image.
    """
    assert source.shape == result.shape and source.shape[:2] == inside.shape and not inside.all()
    before, after = source / 255.0, result / 255.0
    outside = ~inside
    replaced = np.where(inside[..., None], before, after)
    return {
        "mse": float(np.square(after - before)[outside].mean()),
        "ssim": float(ssim_map(before, after)[outside].mean()),
        "ssim_replaced": float(ssim_map(before, replaced)[outside].mean()),
    }


Box = tuple[float, float, float, float]


class Entry(Section):
    """An image and its edits, in a file of edits."""

    init_img: str = Field(validation_alias=AliasChoices("init_img", "input_img"))
    """Path of the image."""
    source_prompt: str
    """Caption of the image."""
    target_prompts: list[str] = Field(min_length=1)
    """Captions of edited images, an edit each."""
    target_codes: list[str] | None = None
    """A word for each edit."""
    box: Box | None = None
    """The edited region."""
    mask: str | None = None
    """Path of an image that is black outside the region."""
    detect: list[str] | None = Field(None, min_length=1)
    """Classes of the objects whose boxes are the region."""

    @model_validator(mode="after")
    def _one_region(self) -> Entry:
        if sum(region is not None for region in (self.box, self.mask, self.detect)) > 1:
            raise ValueError("give one of box, mask and detect")
        return self


@dataclass(frozen=True)
class Edit:
    """One edit of a file.

    Attributes:
        entry: number of its image in the file, from 0.
        number: its own among those of the image, from 0.
        source, target: captions of the image before and after.
        code: a word for the target; may be empty.
        about: the whole entry.
    """

    entry: int
    number: int
    image: Path
    source: str
    target: str
    code: str
    about: Entry

    @property
    def name(self) -> str:
        """Name of the result's file, without suffix."""
        return f"{self.entry:05d}_{self.number}"


def read_edits(path: Path) -> list[Edit]:
    """All edits of a file, in its order.

    Raises:
        UserError: it cannot be read, has another layout, or a path leads out of its folder.
    """
    entries = read_yaml(path, f"--edits {path}")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--edits {path}: must be a list of images with init_img, source_prompt and target_prompts")
    return [edit for number, tree in enumerate(entries) for edit in _edits(path, number, tree)]


def _edits(path: Path, number: int, tree: Any) -> list[Edit]:
    where = f"--edits {path}, entry {number}"
    if not isinstance(tree, dict):
        raise UserError(f"{where}: must have init_img, source_prompt and target_prompts (got {tree!r:.40})")
    about = validate_section(Entry, tree, where)
    image = _inside_folder(path, about.init_img, f"{where}: init_img")
    if about.mask is not None:
        _inside_folder(path, about.mask, f"{where}: mask")
    codes = about.target_codes or []
    if len(codes) != len(about.target_prompts):  # as in an entry of the published file: which one is missing is unknown
        codes = [""] * len(about.target_prompts)
    prompts = enumerate(zip(about.target_prompts, codes, strict=True))
    return [Edit(number, n, image, about.source_prompt, prompt, code, about) for n, (prompt, code) in prompts]


def _inside_folder(path: Path, name: str, where: str) -> Path:
    """A file below the folder of `path`; foreign names may lead anywhere else."""
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"{where} {name!r}: must be a path below the folder of {path.name}, without '..'")
    return path.parent / parts


def given_region(edit: Edit, folder: Path, height: int, width: int) -> Inside | None:
    """The region (height, width) that an entry's box or mask gives, or None if it has neither.

    Args:
        folder: that of the file of edits.
        height, width: of the image in its file.

    Raises:
        UserError: the box is empty or leads out of the image, or the mask has another size.
    """
    box, mask_file = edit.about.box, edit.about.mask
    if box is not None:
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(
                f"entry {edit.entry}: box {list(box)}: must be [x0, y0, x1, y1] within {edit.image.name}, which has "
                f"{width} x {height} pixels, with x0 below x1 and y0 below y1"
            )
        return in_boxes([box], height, width)
    if mask_file is None:
        return None
    mask = decode_file(folder / mask_file)
    if mask.shape[1:] != (height, width):
        raise UserError(
            f"entry {edit.entry}: mask {mask_file}: has {mask.shape[2]} x {mask.shape[1]} pixels, and must have "
            f"{width} x {height} as {edit.image.name}"
        )
    return np.asarray(mask.max(0) > 0)


def in_boxes(boxes: Sequence[Box], height: int, width: int) -> Inside:
    """The pixels (height, width) that any box touches."""
    inside = np.zeros((height, width), np.bool_)
    for x0, y0, x1, y1 in boxes:
        rows = slice(max(0, int(np.floor(y0))), max(0, int(np.ceil(y1))))
        columns = slice(max(0, int(np.floor(x0))), max(0, int(np.ceil(x1))))
        inside[rows, columns] = True
    return inside
