"""What there is to compare: folders of runs or of scores, and the columns that they make.

Runs of the same code whose settings differ in nothing but the seed (and the name and place) are the same recipe: one
column, with means and spreads.

Trees of settings made flat, and what differs between them.

A run's config is read as it was written, without the checks of today's code: runs of older code are compared, too,
and a setting that a run does not know is "-", not today's default.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import read_lines, read_text
from data.yaml_file import read_yaml
from t2i.config.loading import merge
from t2i.train.run_dir import Stage, read_stages

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


_NO_SCORES = ("checkpoints", "samples", "model", "best", "profile")
_ITS_OWN = ("name", "root", "seed")  # settings in which runs of one recipe may differ


@dataclass(frozen=True)
class Scores:
    """A folder with a GenEval summary.json."""

    folder: Path
    summary: dict[str, Any]

    @property
    def overall(self) -> float | None:
        return self.summary.get("overall")

    @cached_property
    def results(self) -> list[dict[str, Any]] | None:
        """The lines of results.jsonl; None without it.

        Raises:
            UserError: it is no JSON.
        """
        path = self.folder / "results.jsonl"
        if not path.is_file():
            return None
        return [_json(path, line) for line in read_lines(path)]


@dataclass(frozen=True)
class Member:
    """A run, or a folder of scores alone, which has nothing but `scores`."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    stages: dict[str, Stage]
    scores: dict[str, Scores]
    """By their folder, as seen from `path`."""

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Flat settings by stage."""
        return stage_settings(self.config)

    @cached_property
    def about(self) -> dict[str, Any]:
        """Code, machine, versions and data, flat."""
        return flatten(self.environment)

    @property
    def recipe(self) -> tuple[Any, ...]:
        """Equal for runs that differ in nothing but the seed."""
        settings = {k: v for k, v in self.config.items() if k not in _ITS_OWN}
        return settings, self.environment.get("git"), self.environment.get("source_sha256")


@dataclass(frozen=True)
class Column:
    """What stands side by side with others: a run, or runs of one recipe."""

    name: str
    members: tuple[Member, ...]


def read_columns(paths: Sequence[Path], together: bool) -> list[Column]:
    """Read the folders and make columns of them, in their order.

    Args:
        paths: folders of runs, or folders with a GenEval summary.json.
        together: runs that differ in nothing but the seed are one column.

    Raises:
        UserError: fewer than two are given, one is given twice or is neither, or a file in it is damaged.
    """
    resolved = [path.resolve() for path in paths]
    if twice := [path for path, real in zip(paths, resolved, strict=True) if resolved.count(real) > 1]:
        raise UserError(f"{twice[0]} is given twice: each run should be given once")
    if len(paths) < 2:
        raise UserError("a single run is given: there should be two or more to compare")
    groups: list[list[Member]] = []
    for member in map(_read, paths):
        alike = [group for group in groups if together and _is_another_seed(member, group)]
        if alike:
            alike[0].append(member)
        else:
            groups.append([member])
    names = dict(zip(resolved, _names(resolved), strict=True))
    return [Column(_join([names[it.path.resolve()] for it in group]), tuple(group)) for group in groups]


def _is_another_seed(member: Member, group: list[Member]) -> bool:
    seeds = [it.config.get("seed") for it in group]
    return bool(member.config) and group[0].recipe == member.recipe and member.config.get("seed") not in seeds


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _join(names: list[str]) -> str:
    """prove-0 and prove-1 to prove-{0,1}."""
    if len(names) == 1:
        return names[0]
    start = names[0][: common_length(names)]
    return f"{start}{{{','.join(name.removeprefix(start) for name in names)}}}"


def common_length(texts: Sequence[str]) -> int:
    """How many characters all of them begin with."""
    return next(
        (i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), min(map(len, texts))
    )


def _read(path: Path) -> Member:
    path = path.parent if path.name == "summary.json" else path
    is_run = (path / "config.yaml").is_file() and any(
        (path / name).is_file() for name in ("metrics.jsonl", "environment.json")
    )
    if is_run:
        stages = {stage.name: stage for stage in read_stages(path)}
        environment = path / "environment.json"
        about = _json(environment, read_text(environment)) if environment.is_file() else {}
        return Member(path, _config(path / "config.yaml"), about, stages, _find_scores(path))
    if scores := _read_scores(path):
        return Member(path, {}, {}, {}, {path.name: scores})
    raise UserError(
        f"{path} is no run: it should be a run's folder (with config.yaml and metrics.jsonl) or one with the "
        "summary.json of a GenEval score"
    )


def _find_scores(run: Path) -> dict[str, Scores]:
    """Those below a run's folder, sorted; images of prompts lie in folders whose names are digits."""
    found = {}
    for folder, names, files in os.walk(run):
        names[:] = sorted(name for name in names if name not in _NO_SCORES and not name.isdigit())
        if "summary.json" in files and (scores := _read_scores(Path(folder))):
            found[str(Path(folder).relative_to(run))] = scores
    return found


def _read_scores(folder: Path) -> Scores | None:
    """None where there is no summary, or one of another benchmark."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary = _json(path, read_text(path))
    tasks = summary.get("tasks")
    is_geneval = isinstance(tasks, dict) and all(isinstance(it, dict) and "score" in it for it in tasks.values())
    return Scores(folder, summary) if is_geneval else None


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it should hold JSON objects; write it anew or move it away")
    return found


def _config(path: Path) -> dict[str, Any]:
    try:
        found = read_yaml(path)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it should be a YAML mapping of sections, as the run wrote it")
    return found
