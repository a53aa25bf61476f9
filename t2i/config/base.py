"""The base of every config section: strict fields, words for none, and fields that other settings make useless."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from data.errors import UserError
from data.files import expand_path

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"


class ConfigError(UserError):
    """A user's mistake, in one sentence that names the field, its value and what would be right."""


Fraction = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, AfterValidator(expand_path)]
"""A path, an address such as s3://bucket/prefix, or a name that may be a path."""
ExpandedPath = Annotated[Path, AfterValidator(expand_path)]


class Unused:
    """Annotates a field that does nothing where another field of the section has one of the given values."""

    def __init__(self, **others: Any) -> None:
        self.others = {name: value if isinstance(value, tuple) else (value,) for name, value in others.items()}


def parts_of(annotation: Any) -> set[Any]:
    """An annotation and everything inside it: types and values of literals."""
    return {annotation}.union(*map(parts_of, get_args(annotation))) if get_args(annotation) else {annotation}


def read_none(value: Any, annotation: Any) -> Any:
    """None, or the literal "none", for the words none and null where a field may have it; any other value unchanged."""
    if value is not None and not (isinstance(value, str) and value.lower() in ("none", "null")):
        return value
    parts = parts_of(annotation)
    return None if NoneType in parts else "none" if "none" in parts else value


class Section(BaseModel):
    """Base of every section: unknown keys are errors, numbers are finite, docstrings are the help texts."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, tree: Any) -> Any:
        """Read words for none; refuse truth values for numbers, also within lists and mappings."""
        if not isinstance(tree, dict):
            return tree
        for name, field in cls.model_fields.items():
            parts = parts_of(field.annotation)
            numeric = bool(parts & {int, float}) or any(isinstance(part, int) for part in parts)  # of a literal
            if numeric and bool not in parts and (truth := _truth_value(tree.get(name))) is not None:
                must = "be a number" if isinstance(tree[name], bool) else "hold numbers"
                raise ValueError(f"{name} must {must}, not {str(truth).lower()}")
        annotations = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: read_none(value, annotations.get(name)) for name, value in tree.items()}

    @model_validator(mode="after")
    def _used(self) -> Self:
        for name, field in type(self).model_fields.items():
            value, default = getattr(self, name), field.default
            others = [item.others for item in field.metadata if isinstance(item, Unused) and value != default]
            for other, values in (pair for part in others for pair in part.items()):
                if (cause := getattr(self, other)) in values:
                    shown = "" if isinstance(value, Section) else f" {value}"
                    right = "its defaults" if isinstance(value, Section) else "null" if default is None else default
                    raise ValueError(f"{name}{shown} does nothing under {other} {cause}: leave it at {right}")
        return self


def _truth_value(value: Any) -> bool | None:
    """The first truth value in a tree of lists and mappings."""
    if isinstance(value, bool):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((truth for item in inner if (truth := _truth_value(item)) is not None), None)
