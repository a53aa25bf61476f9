"""Trees of settings made flat, and what differs between them.

A run's config is read as it was written, without the checks of today's code: runs of older code are compared, too,
and a setting that a run does not know is "-", not today's default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t2i.config_loading import merge

Flat = dict[str, Any]
SHARED = ""
"""Stands for a stage: the settings that stages share."""


def flatten(tree: Any, prefix: str = "") -> Flat:
    """Leaves by their dotted names. Lists of sections go by the sections' names, other lists are leaves."""
    if isinstance(tree, list) and tree and all(isinstance(it, dict) and "name" in it for it in tree):
        tree = {it["name"]: {k: v for k, v in it.items() if k != "name"} for it in tree}
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: Flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def stage_settings(config: dict[str, Any]) -> dict[str, Flat]:
    """The settings that each stage works with, and those that they share, flat; without name and place of the run."""
    shared = {name: value for name, value in config.items() if name not in ("stages", "name", "root")}
    return {SHARED: flatten(shared)} | {
        stage["name"]: flatten(merge(shared, {k: v for k, v in stage.items() if k != "name"}))
        for stage in config.get("stages", [])
    }


def differing(flats: Sequence[Flat]) -> list[str]:
    """Sorted names of what is not the same in all."""
    names = {name for flat in flats for name in flat}
    return sorted(name for name in names if any(name not in flat or flat[name] != flats[0].get(name) for flat in flats))
