"""GenEval's prompts: the official 553 lines from classes, colours and six rules, and files of others.

- `official` generates the lines anew, with the authors' seed and in their order of random draws. NumPy does not promise
  the same stream in every version, so the result is checked against the hash of the published file.
- A prompt is the dictionary that the published file holds as one line: "tag" (the task), "include", for the task
  "counting" "exclude", and "prompt", in this order.

Source: Ghosh et al., "GenEval" (2023), and its prompts/create_prompts.py.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from data.errors import UserError
from data.files import read_lines, read_text

Metadata = dict[str, Any]

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]
Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
TASKS: tuple[str, ...] = get_args(Task)
RELATIONS: tuple[str, ...] = get_args(Relation)
COLORS: tuple[str, ...] = get_args(Color)
# COCO's classes in COCO's order, three of them in GenEval's words (computer mouse, tv remote, computer keyboard).
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
OFFICIAL_MD5 = "9a0ed515640279a48ed3380d90aec0ed"
"""Of the published evaluation_metadata.jsonl."""

_SEED = 43
_PROMPTS_PER_TASK = 100
"""Random prompts of each task but the first; duplicates count once."""
_NUMBERS = {2: "two", 3: "three", 4: "four"}
# Prompts do not ask for people in a colour.
_COLORABLE = CLASSES[1:]


def official() -> list[Metadata]:
    """Make the 553 official prompts, in the official order.

    Raises:
        UserError: this NumPy's random stream is not the one that GenEval's authors had.
    """
    rng = np.random.default_rng(_SEED)
    order = rng.choice(len(CLASSES), size=len(CLASSES), replace=False)
    prompts = [_naming("single_object", _object(CLASSES[i])) for i in order]
    rules: list[Callable[[np.random.Generator], Metadata]] = [_two_object, _counting, _colors, _position, _color_attr]
    for rule in rules:
        drawn = [rule(rng) for _ in range(_PROMPTS_PER_TASK)]
        prompts += {prompt["prompt"]: prompt for prompt in drawn}.values()  # in the order of first occurrence
    _check_official(prompts)
    return prompts


def _check_official(prompts: Sequence[Metadata]) -> None:
    if digest(prompts) != OFFICIAL_MD5:
        raise UserError(
            f"NumPy {np.__version__} has another random stream than GenEval's prompts were drawn from (the md5 is "
            f"{digest(prompts)} for {OFFICIAL_MD5}): install numpy 2.4, or give the published "
            "evaluation_metadata.jsonl as a file of prompts"
        )


# One function a task. The draws are in the authors' order, scalars as scalars: a call with a size reads another stream.


def _two_object(rng: np.random.Generator) -> Metadata:
    a, b = rng.choice(len(CLASSES), size=2, replace=False)
    return _naming("two_object", _object(CLASSES[a]), _object(CLASSES[b]))


def _counting(rng: np.random.Generator) -> Metadata:
    name = CLASSES[rng.choice(len(CLASSES))]
    count = int(rng.integers(2, 4, endpoint=True))
    prompt = f"a photo of {_NUMBERS[count]} {name}{'es' if name.endswith('s') else 's'}"
    more = {"class": name, "count": count + 1}
    return {"tag": "counting", "include": [_object(name, count)], "exclude": [more], "prompt": prompt}


def _colors(rng: np.random.Generator) -> Metadata:
    name = _COLORABLE[rng.choice(len(_COLORABLE))]
    return _naming("colors", _object(name, color=COLORS[rng.choice(len(COLORS))]))


def _position(rng: np.random.Generator) -> Metadata:
    a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    # The reference object comes first: rules look for it first.
    include = [_object(b), {**_object(a), "position": [relation, 0]}]
    prompt = f"a photo of {_with_article(a)} {relation} {_with_article(b)}"
    return {"tag": "position", "include": include, "prompt": prompt}


def _color_attr(rng: np.random.Generator) -> Metadata:
    names = [_COLORABLE[i] for i in rng.choice(len(_COLORABLE), size=2, replace=False)]
    colors = [COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False)]
    return _naming("color_attr", *(_object(name, color=color) for name, color in zip(names, colors, strict=True)))


def _object(name: str, count: int = 1, color: str | None = None) -> Metadata:
    return {"class": name, "count": count, **({"color": color} if color else {})}


def _naming(task: str, *objects: Metadata) -> Metadata:
    """The prompt that names one object of each kind."""
    names = (_with_article(" ".join([*filter(None, [item.get("color")]), item["class"]])) for item in objects)
    return {"tag": task, "include": list(objects), "prompt": "a photo of " + " and ".join(names)}


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def to_lines(prompts: Sequence[Metadata]) -> bytes:
    """The prompts as the published file holds them: a line of JSON each."""
    return "".join(json.dumps(prompt) + "\n" for prompt in prompts).encode()


def digest(prompts: Sequence[Metadata]) -> str:
    """The md5 of `to_lines`: `OFFICIAL_MD5` for the official prompts."""
    return hashlib.md5(to_lines(prompts), usedforsecurity=False).hexdigest()


class _Fields(BaseModel):
    """Unknown fields are allowed, but in a file of prompts not those that look like a misspelt one."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="after")
    def _check_spelling(self, info: ValidationInfo) -> Self:
        for name in (self.model_extra or {}) if info.context != _OF_OTHERS else ():
            for meant in difflib.get_close_matches(name, _OPTIONAL, n=1, cutoff=0.8):
                if meant in type(self).model_fields and meant not in self.model_fields_set:
                    raise ValueError(f"{name} is no field: did you mean {meant}?")
        return self


class _Few(_Fields):
    name: Annotated[str, Field(alias="class", min_length=1)]
    count: Annotated[int, Field(ge=1)]


class _Unwanted(_Few):
    @field_validator("count", mode="before")
    @classmethod
    def _check_possible(cls, count: Any) -> Any:
        if isinstance(count, int) and count < 1:
            raise ValueError(f"{count} leaves no image that could be right: must be at least 1")
        return count


class _Wanted(_Few):
    color: Color | None = None
    position: tuple[Relation, Annotated[int, Field(ge=0)]] | None = None


class _Prompt(_Fields):
    tag: Annotated[str, Field(min_length=1)]
    include: list[_Wanted] = []
    exclude: list[_Unwanted] = []
    prompt: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _check_items(self) -> Self:
        if not self.include and not self.exclude:
            raise ValueError("include and exclude are empty: any image would be right")
        for i, item in enumerate(self.include):
            if item.position and item.position[1] >= i:
                raise ValueError(f"include.{i}.position must point to an object before it, so below {i}")
        return self


class _ListedPrompt(_Prompt):
    tag: Task
    heldout: bool = False  # on the proving ground: whether training never saw the caption


_OF_OTHERS = "metadata of others"
_ITEM = ("class", "count", "color", "position")
_OPTIONAL = ("include", "exclude", "color", "position")


def essentials(metadata: Metadata) -> Metadata:
    """What a prompt asks for, without empty fields and those that others have added."""
    lists = {
        name: [{field: item[field] for field in _ITEM if item.get(field) is not None} for item in metadata[name]]
        for name in ("include", "exclude")
        if metadata.get(name)
    }
    return {"tag": metadata["tag"], **lists, "prompt": metadata["prompt"]}


def read(path: Path) -> list[Metadata]:
    """Read prompts from a file like the published one: a line of JSON each, with any wording, classes and more fields.

    Raises:
        UserError: the file cannot be read, holds no prompt, or a line, which is named, is no prompt.
    """
    lines = read_lines(path, f"prompts {path}")
    if not lines:
        raise UserError(f"prompts {path}: the file is empty: it needs a line of JSON for each prompt")
    return [_parse(line, f"prompts {path}, line {number}") for number, line in enumerate(lines, 1)]


def read_one(path: Path) -> Metadata:
    """Read a metadata.jsonl as the official code does: one object of JSON, over any number of lines.

    Its images are there already, so any tag is a task, and any other field is kept and ignored.

    Raises:
        UserError: the file cannot be read, holds anything else, or a prompt for which any image or none is right.
    """
    return _parse(read_text(path), str(path), _Prompt, _OF_OTHERS)


def _parse(text: str, where: str, form: type[_Prompt] = _ListedPrompt, context: str | None = None) -> Metadata:
    try:
        metadata: Metadata = json.loads(text)
        form.model_validate_json(text, context=context)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {field + ': ' if field else ''}{message}") from error
    except ValueError as error:
        words = "has more than one object of JSON" if "Extra data" in str(error) else f"Invalid JSON: {error}"
        raise UserError(f"{where}: {words}") from error
    return metadata
