"""What is asked of a model: a form's fields, checked. Nothing here knows of a browser, draws or waits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from data.errors import UserError
from t2i.config import RunConfig
from t2i.config_loading import validate_section
from t2i.config_sampling import SamplingConfig
from t2i.models.conditions import Conditioner
from t2i.size_limits import Limits

# A page is for trying; what takes hours is a job's affair.
MOST_PICTURES = 16
MOST_STEPS = 500
MOST_CHARACTERS = 2000
MOST_SEED = 2**53 - 1
"""What a browser's numbers hold."""
RATIOS = (1, 1), (4, 3), (3, 2), (16, 9), (3, 4), (2, 3), (9, 16)
"""Width : height of the sizes that are offered."""


@dataclass(frozen=True)
class Form:
    """The fields of the page as they are filled in: a number may be missing (None), a whole one may be 7.0."""

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


@dataclass(frozen=True)
class Words:
    """A text of a request, by its field's name; plain: read without the model's instruction."""

    field: str
    text: str
    plain: bool = False


@dataclass(frozen=True)
class Request:
    """What somebody asks for, checked."""

    prompt: str
    negative: str
    size: tuple[int, int]
    """Height and width in pixels."""
    pictures: int
    sampling: SamplingConfig

    @property
    def calls(self) -> int:
        """How often it calls the network."""
        steps = self.sampling.steps
        return self.pictures * (2 * steps - 1 if self.sampling.solver == "heun" else steps)

    @property
    def form(self) -> Form:
        """The fields that ask for the same again."""
        (height, width), own = self.size, self.sampling
        numbers = own.steps, own.guidance_scale, *own.cfg_interval
        return Form(self.prompt, self.negative, width, height, *numbers, own.solver, own.order, own.seed, self.pictures)

    @property
    def settings(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        told = {"prompt": self.prompt, "negative": self.negative, "size": list(self.size)}
        return told | {"sampling": self.sampling.model_dump(mode="json")}

    @property
    def words(self) -> tuple[Words, ...]:
        """What the text encoder reads."""
        return Words("prompt", self.prompt), Words("negative prompt", self.negative, plain=True)

    @property
    def stem(self) -> str:
        """The beginning of a file's name."""
        return stem_of(self.prompt, self.sampling.seed)


def stem_of(prompt: str, seed: int) -> str:
    """The beginning of a file's name: the prompt's first words in plain letters, and the seed."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    return f"{words or 'picture'}_seed{seed}"


def first_request(config: RunConfig) -> Request:
    """What the page's fields say when it opens: one picture as the model's own config has it."""
    return Request("", "", config.data.size, 1, config.sampling)


def check_form(form: Form, config: RunConfig, conditioner: Conditioner, limits: Limits) -> Request:
    """What a form asks for.

    Args:
        form: the fields.
        config: of the model.
        conditioner: reads prompts; where they are classes, it knows which numbers are.
        limits: sizes that may be asked for.

    Raises:
        UserError: a field that is wrong, in one sentence.
    """
    prompt, negative = check_words("prompt", form.prompt), check_words("negative prompt", form.negative)
    if config.model.condition == "class":
        conditioner([prompt, negative])
    width = check_whole("width", form.width, 1, 2**16)
    height = check_whole("height", form.height, 1, 2**16)
    limits.check(height, width)
    sampling = _check_sampling(form, config.sampling)
    if negative and sampling.guidance_scale == 1.0:
        raise UserError("negative prompt: does nothing at guidance 1: leave it empty or raise the guidance")
    return Request(
        prompt, negative, (height, width), check_whole("pictures", form.pictures, 1, MOST_PICTURES), sampling
    )


def _check_sampling(form: Form, own: SamplingConfig) -> SamplingConfig:
    interval = check_number("guidance from", form.guided_from), check_number("guidance to", form.guided_to)
    asked = {
        "solver": form.solver,
        "steps": check_whole("steps", form.steps, 1, MOST_STEPS),
        "guidance_scale": check_number("guidance", form.guidance_scale),
        "cfg_interval": interval,
        "seed": check_whole("seed", form.seed, 0, MOST_SEED),
        "batch_size": 1,  # a picture is the same, then, however many are asked for
    }
    if form.solver == "adams":
        asked["order"] = check_whole("order", form.order, 1, 4)
    same = form.solver == own.solver and asked.get("order", own.order) == own.order
    # What only the model's own solver heeds, at its own order, is refused with others.
    kept = own.model_dump(exclude=None if same else {"order", "coefficients"})
    return validate_section(SamplingConfig, kept | asked, "settings")


def check_words(name: str, text: str) -> str:
    """A text without blanks around it.

    Raises:
        UserError: it is too long, or no text.
    """
    if not isinstance(text, str):  # no browser's request
        raise UserError(f"{name}: must be text")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{name}: has {len(text)} characters: must have at most {MOST_CHARACTERS}")
    return text.strip()


def check_whole(name: str, value: float | None, low: int, high: int) -> int:
    """A whole number from `low` to `high`.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, int | float) or not low <= value <= high or value != int(value):
        shown = f"{value:g}" if isinstance(value, float) else "is empty" if value is None else str(value)[:20]
        raise UserError(f"{name} {shown}: must be a whole number from {low} to {high}")
    return int(value)


def check_number(name: str, value: float | None) -> float:
    """A number.

    Raises:
        UserError: there is none.
    """
    if not isinstance(value, int | float) or not -MOST_SEED <= value <= MOST_SEED:
        shown = "is empty" if value is None or value != value else str(value)[:20]
        raise UserError(f"{name} {shown}: must be a number")
    return float(value)


def sizes_like(size: tuple[int, int], limits: Limits) -> list[tuple[int, int]]:
    """Heights and widths to offer: `size`, and the usual shapes of about as many pixels, those that are allowed."""
    patch, found = limits.patch, [size]
    patches = size[0] * size[1] / patch**2
    for across, down in RATIOS:
        rows = max(1, round(math.sqrt(patches * down / across)))
        columns = max(1, round(math.sqrt(patches * across / down)))
        found.append((rows * patch, columns * patch))
    return list(dict.fromkeys(it for it in found if it[0] * it[1] <= limits.max_pixels))
