"""Requests of the page: the fields of its two forms, checked. Nothing here knows of a browser, generates or waits."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from data.decode import decode, image_size
from data.errors import BadSample, UserError
from data.listing import FORMATS
from t2i.config.loading import validate_section
from t2i.config.run import RunConfig
from t2i.config.train import SamplingConfig
from t2i.models.text import Conditioner
from t2i.pipeline import EditSettings, edit_settings, patch_window
from t2i.size_limits import Limits

# A page is for trying: what takes hours is for a job.
MOST_PICTURES = 16
MOST_STEPS = 500
MOST_CHARACTERS = 2000
MOST_SEED = 2**53 - 1
"""The largest integer that a browser's numbers hold exactly."""
MOST_IMAGE_PIXELS = 2**26
"""Of an image to edit, before it is scaled down."""
RATIOS = (1, 1), (4, 3), (3, 2), (16, 9), (3, 4), (2, 3), (9, 16)
"""Width : height of the sizes that are offered."""


@dataclass(frozen=True)
class Form:
    """The fields that generate, as filled in: a number may be missing (None), an integer may be 7.0."""

    prompt: str
    negative: str
    width: float | None
    height: float | None
    steps: float | None
    guidance_scale: float | None
    guided_from: float | None
    guided_to: float | None
    solver: str
    order: float | None
    seed: float | None
    pictures: float | None


class Text(NamedTuple):
    """A text that the model reads, with the name of its field; `plain` ones without the model's instruction."""

    field: str
    text: str
    plain: bool = False


@dataclass(frozen=True)
class Request:
    """A checked request to generate images."""

    prompt: str
    negative: str
    size: tuple[int, int]
    """Height and width in pixels."""
    pictures: int
    sampling: SamplingConfig

    @property
    def calls(self) -> int:
        """Calls of the network."""
        steps = self.sampling.steps
        return self.pictures * (2 * steps - 1 if self.sampling.solver == "heun" else steps)

    @property
    def form(self) -> Form:
        """The fields of the same request."""
        (height, width), own = self.size, self.sampling
        numbers = own.steps, own.guidance_scale, *own.cfg_interval
        return Form(self.prompt, self.negative, width, height, *numbers, own.solver, own.order, own.seed, self.pictures)

    @property
    def settings(self) -> dict[str, Any]:
        """In JSON's types."""
        texts = {"prompt": self.prompt, "negative": self.negative}
        return texts | {"size": list(self.size), "sampling": self.sampling.model_dump(mode="json")}

    @property
    def texts(self) -> tuple[Text, ...]:
        return Text("prompt", self.prompt), Text("negative prompt", self.negative, plain=True)

    @property
    def stem(self) -> str:
        """Of a file's name."""
        return stem_of(self.prompt, self.sampling.seed)


def stem_of(prompt: str, seed: int) -> str:
    """The stem of a file's name: the prompt's first words in plain letters, and the seed."""
    letters = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    return f"{letters or 'picture'}_seed{seed}"


def first_request(config: RunConfig) -> Request:
    """The values of the page's fields when it opens: one image with the sampling of the model's own config."""
    return Request("", "", config.data.size, 1, config.sampling)


def check_form(form: Form, config: RunConfig, conditioner: Conditioner, limits: Limits) -> Request:
    """Check the form that generates.

    Raises:
        UserError: a field is wrong.
    """
    prompt, negative = check_text("prompt", form.prompt), check_text("negative prompt", form.negative)
    if config.model.condition == "class":
        conditioner([prompt, negative])  # raises if one is no class
    width = check_int("width", form.width, 1, 2**16)
    height = check_int("height", form.height, 1, 2**16)
    limits.check(height, width)
    sampling = _check_sampling(form, config.sampling)
    if negative and sampling.guidance_scale == 1.0:
        raise UserError("negative prompt: does nothing at guidance 1: leave it empty or raise the guidance")
    pictures = check_int("pictures", form.pictures, 1, MOST_PICTURES)
    return Request(prompt, negative, (height, width), pictures, sampling)


def _check_sampling(form: Form, own: SamplingConfig) -> SamplingConfig:
    interval = check_number("guidance from", form.guided_from), check_number("guidance to", form.guided_to)
    asked = {
        "solver": form.solver,
        "steps": check_int("steps", form.steps, 1, MOST_STEPS),
        "guidance_scale": check_number("guidance", form.guidance_scale),
        "cfg_interval": interval,
        "seed": check_int("seed", form.seed, 0, MOST_SEED),
        "batch_size": 1,  # so that an image does not depend on how many are asked for
    }
    if form.solver == "adams":
        asked["order"] = check_int("order", form.order, 1, 4)
    same = form.solver == own.solver and asked.get("order", own.order) == own.order
    # With another solver or order these options of the model's own config would be refused.
    base = own.model_dump(exclude=None if same else {"order", "coefficients"})
    return validate_section(SamplingConfig, base | asked, "settings")


def check_text(name: str, text: str) -> str:
    """A text without blanks around it; a UserError if it is too long or no text."""
    if not isinstance(text, str):  # no browser sends this
        raise UserError(f"{name}: must be text")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{name}: has {len(text)} characters: must have at most {MOST_CHARACTERS}")
    return text.strip()


def check_int(name: str, value: float | None, low: int, high: int) -> int:
    """An integer from `low` to `high`; a UserError if it is none."""
    if not isinstance(value, int | float) or not low <= value <= high or value != int(value):
        shown = f"{value:g}" if isinstance(value, float) else "is empty" if value is None else str(value)[:20]
        raise UserError(f"{name} {shown}: must be a whole number from {low} to {high}")
    return int(value)


def check_number(name: str, value: float | None) -> float:
    """A finite number; a UserError if it is none."""
    if not isinstance(value, int | float) or not -MOST_SEED <= value <= MOST_SEED:
        shown = "is empty" if value is None or value != value else str(value)[:20]
        raise UserError(f"{name} {shown}: must be a number")
    return float(value)


def sizes_like(size: tuple[int, int], limits: Limits) -> list[tuple[int, int]]:
    """Heights and widths to offer: `size`, and other aspect ratios of about as many pixels, within the limits."""
    patch, found = limits.patch, [size]
    patches = size[0] * size[1] / patch**2
    for across, down in RATIOS:
        rows = max(1, round(math.sqrt(patches * down / across)))
        columns = max(1, round(math.sqrt(patches * across / down)))
        found.append((rows * patch, columns * patch))
    return list(dict.fromkeys((h, w) for h, w in found if h * w <= limits.max_pixels))


@dataclass(frozen=True)
class EditForm:
    """The fields that edit, as filled in."""

    image: bytes | None
    """Content of the image's file."""
    source: str
    target: str
    steps: float | None
    n_max: float | None
    source_guidance: float | None
    target_guidance: float | None
    seed: float | None


@dataclass(frozen=True)
class EditRequest:
    """A checked request to edit an image."""

    image: Tensor
    """uint8 (3, H, W), whole patches."""
    source: str
    target: str
    edits: EditSettings

    @property
    def calls(self) -> int:
        """Calls of the network for the target."""
        own = self.edits
        return (own.n_max - own.n_min) * own.n_avg + own.n_min

    @property
    def form(self) -> EditForm:
        """The fields of the same request."""
        own = self.edits
        file = io.BytesIO()
        Image.fromarray(self.image.permute(1, 2, 0).contiguous().numpy()).save(file, "png")
        guidance = own.source_guidance, own.target_guidance
        return EditForm(file.getvalue(), self.source, self.target, own.steps, own.n_max, *guidance, own.seed)

    @property
    def settings(self) -> dict[str, Any]:
        """All but the image, in JSON's types."""
        texts = {"source": self.source, "target": self.target}
        return texts | {"size": list(self.image.shape[1:]), "edits": self.edits.model_dump(mode="json")}

    @property
    def texts(self) -> tuple[Text, ...]:
        return Text("what the image shows", self.source), Text("what it is to show", self.target)

    @property
    def stem(self) -> str:
        """Of a file's name."""
        return stem_of(self.target, self.edits.seed)


def check_edit(form: EditForm, config: RunConfig, limits: Limits) -> EditRequest:
    """Check the form that edits.

    Raises:
        UserError: a field is wrong.
    """
    if form.image is None:
        raise UserError("image: there is none, or it is no longer stored: upload one")
    source, target = check_text("what the image shows", form.source), check_text("what it is to show", form.target)
    if not target:
        raise UserError("what it is to show: is empty: say it in words")
    asked = {
        "steps": check_int("steps", form.steps, 1, MOST_STEPS),
        "n_max": check_int("steps taken", form.n_max, 1, MOST_STEPS),
        "source_guidance": check_number("guidance of what it shows", form.source_guidance),
        "target_guidance": check_number("guidance of what it is to show", form.target_guidance),
        "seed": check_int("seed", form.seed, 0, MOST_SEED),
    }
    edits = edit_settings(config, asked, "settings")
    image = fit_image(form.image, config, limits)
    limits.check(*image.shape[1:])
    return EditRequest(image, source, target, edits)


def fit_image(data: bytes, config: RunConfig, limits: Limits) -> Tensor:
    """Decode an image to uint8 (3, H, W): whole patches, and about as many pixels as the model was trained at or fewer.

    Its size is checked before any pixel is decoded.

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
        # Scaled to whole patches in one step; less than a patch is cropped, except from very narrow images.
        size = replace(limits, max_pixels=most).largest_like(height, width)
        return torch.from_numpy(decode(data, size))
    except BadSample as fault:
        if fault.reason == "too_many_pixels":
            raise _too_large("too many pixels") from fault
        known = ", ".join(kind.name for kind in FORMATS.values())
        raise UserError(f"image: cannot be read ({fault.detail}): must be a whole image, one of {known}") from fault


def _too_large(pixels: str) -> UserError:
    return UserError(f"image: has {pixels}: must have at most {MOST_IMAGE_PIXELS:,} in all")
