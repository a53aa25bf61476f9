"""What a job leaves behind that may be killed at any moment: files that are whole or absent, and a note of what they
were made from, so that nothing else is mixed with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from t2i.config_loading import changes
from t2i.engine.checkpoint.format import sync


def write_aside(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file, durably, under another name, and give it its own once it is whole.

    Raises:
        OSError: with the file's name, also if the disk is full.
    """
    aside = path.with_suffix(".partial")
    try:
        with aside.open("wb") as file:
            file.writelines(pieces)
        sync(aside)
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, tree: Any) -> None:
    """The same for JSON's types."""
    write_aside(path, [(json.dumps(tree, indent=1) + "\n").encode()])


def note_settings(note: Path, made_of: dict[str, Any], beside: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
    """Write down what a folder's files are made from; if that is known already, compare.

    Args:
        note: the file; its folder is there.
        made_of: everything that the files depend on, in JSON's types.
        beside: what else is worth knowing of them, which is not compared.

    Returns:
        Dotted names of what differs from the note that was there; none: go on.
    """
    if not note.exists():
        write_json(note, {**beside, **made_of})
        return []
    begun = {name: value for name, value in json.loads(note.read_text()).items() if name not in beside}
    return changes(begun, json.loads(json.dumps(made_of)))
