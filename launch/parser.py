"""Words of a command line, before jsonargparse makes values of them."""

from __future__ import annotations

import math
import re
from argparse import Action
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_loader
from pydantic import AfterValidator

from data.errors import UserError
from data.files import expand_path
from data.yaml_file import load_yaml
from t2i.config_base import parts_of, read_none

set_loader("yaml", lambda text: load_yaml(text, "value"), (UserError,))
_NUMBER_OF_YAML_1_1 = re.compile(r"[-+]?(?:0b[01_]+|\d[\d_]*(?::[0-5]?\d)+(?:\.\d*)?)\Z", re.ASCII)
"""What jsonargparse would take for a number: 90 for 1:30."""
_NOT_FINITE = ("nan", "inf", "-inf", "+inf", "infinity", "-infinity")
"""Words that Python takes for numbers."""


class Parser(ArgumentParser):
    """A parser whose options follow the rules of the files that users write, wherever a type is given.

    Numbers and lists are YAML as data/yaml_file.py reads it, numbers are finite; none and null mean none where an
    option may be none; in paths `~`, `$NAME` and `${NAME}` are filled in. Raises UserError besides ArgumentError.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hints = dict[str, Any]()
        """By destination, where jsonargparse does not see the whole annotation of a function's parameter."""

    def _get_values(self, action: Action, arg_strings: list[str]) -> Any:
        hint = self.hints.get(action.dest, getattr(action, "_typehint", None))
        if hint is not None:
            name = action.option_strings[0] if action.option_strings else action.dest
            arg_strings = [read_word(word, hint, name) for word in arg_strings]
        return super()._get_values(action, arg_strings)


def read_word(word: str, hint: Any, name: str) -> str:
    """The word that jsonargparse is to see for what a user wrote.

    Args:
        word: on the command line.
        hint: what type it is to be.
        name: begins the sentences of errors.

    Raises:
        UserError: it breaks one of the rules.
    """
    parts = parts_of(hint)
    if (none := read_none(word, hint)) != word:
        return none or "null"
    if parts & {Path, AfterValidator(expand_path)}:
        try:
            return expand_path(word)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    if str in parts:
        return word
    value = load_yaml(word, name)
    numeric = bool(parts & {int, float})
    for leaf in _leaves(value):
        if (isinstance(leaf, float) and not math.isfinite(leaf)) or (numeric and str(leaf).lower() in _NOT_FINITE):
            raise UserError(f"{name} {word}: must be a finite number")
        if isinstance(leaf, str) and _NUMBER_OF_YAML_1_1.match(leaf):
            raise UserError(f"{name} {word}: {leaf} is no number: write it in decimal")
    if isinstance(value, float) and int in parts and float not in parts and value.is_integer():
        return str(int(value))
    return word


def _leaves(tree: Any) -> list[Any]:
    """What a tree of mappings and lists holds."""
    if not isinstance(tree, dict | list):
        return [tree]
    return [leaf for it in (tree.values() if isinstance(tree, dict) else tree) for leaf in _leaves(it)]
