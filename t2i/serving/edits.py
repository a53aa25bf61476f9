"""What is asked of a model that edits: a form's fields, checked, and an image brought to a size that it knows."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.decode import image_size
from data.errors import BadSample, UserError
from t2i.config import RunConfig
from t2i.config_loading import validate_section
from t2i.editing import EditSettings, patch_window
from t2i.serving.limits import Limits
from t2i.serving.session import MOST_SEED, MOST_STEPS, check_number, check_whole, check_words, stem_of

MOST_IMAGE_PIXELS = 2**26
"""Of an image that somebody brings, before it is scaled down."""


@dataclass(frozen=True)
class EditForm:
    """The fields of the page as they are filled in."""

    image: str | Image.Image | None
    """A file that was brought, or a picture that is here."""
    source: str
    target: str
    steps: float | None
    n_max: float | None
    source_guidance: float | None
    target_guidance: float | None
    seed: float | None


@dataclass(frozen=True)
class EditRequest:
    """What somebody asks for, checked."""

    image: Tensor
    """uint8 (3, H, W), whole patches."""
    source: str
    target: str
    edits: EditSettings

    @property
    def calls(self) -> int:
        """How often it calls the network for the target."""
        own = self.edits
        return (own.n_max - own.n_min) * own.n_avg + own.n_min

    @property
    def form(self) -> EditForm:
        """The fields that ask for the same again."""
        own = self.edits
        image = Image.fromarray(self.image.permute(1, 2, 0).contiguous().numpy())
        guidance = own.source_guidance, own.target_guidance
        return EditForm(image, self.source, self.target, own.steps, own.n_max, *guidance, own.seed)

    @property
    def settings(self) -> dict[str, Any]:
        """All of it but the image, in JSON's types."""
        told = {"source": self.source, "target": self.target, "size": list(self.image.shape[1:])}
        return told | {"edits": self.edits.model_dump(mode="json")}

    @property
    def stem(self) -> str:
        """The beginning of a file's name."""
        return stem_of(self.target, self.edits.seed)


def first_edits(config: RunConfig) -> EditSettings:
    """What the page's fields say when it opens: the defaults, on the model's own time grid."""
    return EditSettings(timeshift=config.sampling.timeshift)


def check_edit(form: EditForm, config: RunConfig, limits: Limits) -> EditRequest:
    """What a form asks for.

    Args:
        form: the fields.
        config: of the model.
        limits: sizes that may be asked for.

    Raises:
        UserError: a field that is wrong, in one sentence.
    """
    if form.image is None:
        raise UserError("image: there is none: drop one into its place")
    source, target = check_words("what the image shows", form.source), check_words("what it is to show", form.target)
    if not target:
        raise UserError("what it is to show: is empty: say it in words")
    asked = {
        "steps": check_whole("steps", form.steps, 1, MOST_STEPS),
        "n_max": check_whole("steps taken", form.n_max, 1, MOST_STEPS),
        "source_guidance": check_number("guidance of what it shows", form.source_guidance),
        "target_guidance": check_number("guidance of what it is to show", form.target_guidance),
        "seed": check_whole("seed", form.seed, 0, MOST_SEED),
    }
    edits = validate_section(EditSettings, first_edits(config).model_dump() | asked, "settings")
    brought = open_image(form.image) if isinstance(form.image, str) else form.image
    image = fit_image(brought, config, limits)
    limits.check(*image.shape[1:])
    return EditRequest(image, source, target, edits)


def open_image(path: str) -> Image.Image:
    """An image file, whose size is looked at before it is decoded.

    Raises:
        UserError: it is no image, or has too many pixels.
    """
    content = Path(path).read_bytes()
    try:
        height, width = image_size(content)
        _check_pixels(height, width)
        return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    except BadSample as bad:
        raise UserError(f"image: cannot be used: {bad.detail}") from bad
    except OSError as error:
        raise UserError(f"image: cannot be read: {error}") from error


def _check_pixels(height: int, width: int) -> None:
    if height * width > MOST_IMAGE_PIXELS:
        raise UserError(f"image: has {width} x {height} pixels: must have at most {MOST_IMAGE_PIXELS:,} in all")


def fit_image(image: Image.Image, config: RunConfig, limits: Limits) -> Tensor:
    """An image, uint8 (3, H, W), of about as many pixels as the model was trained at, or fewer; whole patches of it.

    Raises:
        UserError: it has too many pixels, or fewer than a patch.
    """
    _check_pixels(image.height, image.width)
    height, width = config.data.size
    shrink = math.sqrt(min(1.0, min(height * width, limits.max_pixels) / (image.width * image.height)))
    plain = image.convert("RGB")
    if shrink < 1.0:
        patch = limits.patch  # down to whole patches at once, where that changes the shape by less than one
        sides = [max(patch, round(side * shrink / patch) * patch) for side in image.size]
        if sides[0] * sides[1] > limits.max_pixels:  # by rounding up
            sides = [max(patch, int(side * shrink / patch) * patch) for side in image.size]
        plain = plain.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(plain)).permute(2, 0, 1)
    return pixels[:, *patch_window(pixels.shape[1], pixels.shape[2], limits.patch)]
