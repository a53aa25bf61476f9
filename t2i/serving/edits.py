"""What is asked of a model that edits: a form's fields, checked, and an image brought to a size that it knows."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.decode import decode, image_size
from data.errors import BadSample, UserError
from data.formats import FORMATS
from t2i.config import RunConfig
from t2i.editing import EditSettings, edit_settings, patch_window
from t2i.serving.session import MOST_SEED, MOST_STEPS, Words, check_number, check_whole, check_words, stem_of
from t2i.size_limits import Limits

MOST_IMAGE_PIXELS = 2**26
"""Of an image that somebody brings, before it is scaled down."""


@dataclass(frozen=True)
class EditForm:
    """The fields of the page as they are filled in."""

    image: bytes | None
    """A file's."""
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
        file = io.BytesIO()
        Image.fromarray(self.image.permute(1, 2, 0).contiguous().numpy()).save(file, "png")
        guidance = own.source_guidance, own.target_guidance
        return EditForm(file.getvalue(), self.source, self.target, own.steps, own.n_max, *guidance, own.seed)

    @property
    def settings(self) -> dict[str, Any]:
        """All of it but the image, in JSON's types."""
        told = {"source": self.source, "target": self.target, "size": list(self.image.shape[1:])}
        return told | {"edits": self.edits.model_dump(mode="json")}

    @property
    def words(self) -> tuple[Words, ...]:
        """What the text encoder reads."""
        return Words("what the image shows", self.source), Words("what it is to show", self.target)

    @property
    def stem(self) -> str:
        """The beginning of a file's name."""
        return stem_of(self.target, self.edits.seed)


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
        raise UserError("image: there is none, or it is no longer kept: drop one into its place")
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
    edits = edit_settings(config, asked, "settings")
    image = fit_image(form.image, config, limits)
    limits.check(*image.shape[1:])
    return EditRequest(image, source, target, edits)


def fit_image(data: bytes, config: RunConfig, limits: Limits) -> Tensor:
    """An image, uint8 (3, H, W), of about as many pixels as the model was trained at, or fewer; whole patches of it.

    Its size is looked at before any pixel is decoded.

    Args:
        data: the file's bytes.
        config: of the model.
        limits: sizes that may be asked for.

    Raises:
        UserError: it is no image, has too many pixels, or a side smaller than a patch.
    """
    try:
        height, width = image_size(data)
        if height * width > MOST_IMAGE_PIXELS:
            raise _too_large(f"{width} x {height} pixels")
        rows, columns = patch_window(height, width, limits.patch)
        most = min(config.data.size[0] * config.data.size[1], limits.max_pixels)
        if height * width <= most:
            return torch.from_numpy(decode(data, (height, width)))[:, rows, columns]
        # Down to whole patches at once; what is cropped is less than one, but of an image like a thread.
        size = replace(limits, max_pixels=most).largest_like(height, width)
        return torch.from_numpy(decode(data, size))
    except BadSample as fault:
        if fault.reason == "too_many_pixels":
            raise _too_large("too many pixels") from fault
        known = ", ".join(it.name for it in FORMATS.values())
        raise UserError(f"image: cannot be read ({fault.detail}): must be a whole image, one of {known}") from fault


def _too_large(pixels: str) -> UserError:
    return UserError(f"image: has {pixels}: must have at most {MOST_IMAGE_PIXELS:,} in all")
