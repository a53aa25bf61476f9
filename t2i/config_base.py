"""What every part of the config is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.errors import UserError

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"


class ConfigError(UserError):
    """A user's mistake, said in one sentence that names the field, its value and what would be right."""


Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every part of the tree: unknown keys are errors and the docstrings are the help texts."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _truth_values_are_no_numbers(cls, tree: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(tree, dict) else ():
            if field.annotation in (int, float) and isinstance(tree.get(name), bool):
                raise ValueError(f"{name} must be a number, not {str(tree[name]).lower()}")
        return tree
