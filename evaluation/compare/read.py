"""What is compared: folders of runs or of scores, and the groups that they form.

Runs of the same code whose settings differ only in the seed (and in name and place) have the same recipe and form one
group, with means and standard deviations. A config is read as the run wrote it, without the checks of today's code, so
that runs of older code are compared, too; a setting that a run does not have is "-", not today's default.
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
from t2i.config.loading import fields_of, merge
from t2i.train.run_dir import Stage, read_stages

Flat = dict[str, Any]
SHARED = ""
"""In place of a stage's name: the settings that stages share."""


def stage_settings(config: dict[str, Any]) -> dict[str, Flat]:
    """The flat settings of each stage, and those that stages share, without the run's name and place."""
    shared = {name: value for name, value in config.items() if name not in ("stages", "name", "root")}
    return {SHARED: fields_of(shared)} | {
        stage["name"]: fields_of(merge(shared, {k: v for k, v in stage.items() if k != "name"}))
        for stage in config.get("stages", [])
    }


def differing(flats: Sequence[Flat]) -> list[str]:
    """Sorted names of the fields that are not the same in all."""
    names = {name for flat in flats for name in flat}
    return sorted(name for name in names if any(name not in flat or flat[name] != flats[0].get(name) for flat in flats))


_NO_SCORES = ("checkpoints", "samples", "model", "best", "profile")
_NO_RECIPE = ("name", "root", "seed")  # settings in which runs of one recipe may differ


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
        """The lines of results.jsonl, or None if there is no such file.

        Raises:
            UserError: a line is no JSON object.
        """
        path = self.folder / "results.jsonl"
        if not path.is_file():
            return None
        return [_json(path, line) for line in read_lines(path)]


@dataclass(frozen=True)
class Run:
    """A run, or a folder of scores alone, whose other fields are empty.

    Attributes:
        scores: by their folder, relative to `path`.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    stages: dict[str, Stage]
    scores: dict[str, Scores]

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Flat settings by stage."""
        return stage_settings(self.config)

    @cached_property
    def about(self) -> dict[str, Any]:
        """Code, machine, versions and data, flat."""
        return fields_of(self.environment)

    @property
    def recipe(self) -> tuple[Any, ...]:
        """Equal for runs that differ only in the seed."""
        settings = {k: v for k, v in self.config.items() if k not in _NO_RECIPE}
        return settings, self.environment.get("git"), self.environment.get("source_sha256")


@dataclass(frozen=True)
class RunGroup:
    """A column of the tables: a run, or several runs of one recipe."""

    name: str
    runs: tuple[Run, ...]


def read_groups(paths: Sequence[Path], together: bool) -> list[RunGroup]:
    """Read folders of runs, or with a GenEval summary.json, in their order.

    Args:
        together: whether runs that differ only in the seed form one group.

    Raises:
        UserError: fewer than two are given, one is given twice or is neither, or a file in it is damaged.
    """
    resolved = [path.resolve() for path in paths]
    if twice := [path for path, real in zip(paths, resolved, strict=True) if resolved.count(real) > 1]:
        raise UserError(f"{twice[0]} is given twice: give each run once")
    if len(paths) < 2:
        raise UserError("a single run is given: give two or more to compare")
    groups: list[list[Run]] = []
    for run in map(_read, paths):
        alike = [group for group in groups if together and _differs_in_seed(run, group)]
        if alike:
            alike[0].append(run)
        else:
            groups.append([run])
    names = dict(zip(resolved, _names(resolved), strict=True))
    return [RunGroup(_join([names[run.path.resolve()] for run in group]), tuple(group)) for group in groups]


def _differs_in_seed(run: Run, group: list[Run]) -> bool:
    seeds = [other.config.get("seed") for other in group]
    return bool(run.config) and group[0].recipe == run.recipe and run.config.get("seed") not in seeds


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
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
    """Length of the common beginning of texts."""
    return next(
        (i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), min(map(len, texts))
    )


def _read(path: Path) -> Run:
    path = path.parent if path.name == "summary.json" else path
    is_run = (path / "config.yaml").is_file() and any(
        (path / name).is_file() for name in ("metrics.jsonl", "environment.json")
    )
    if is_run:
        stages = {stage.name: stage for stage in read_stages(path)}
        environment = path / "environment.json"
        about = _json(environment, read_text(environment)) if environment.is_file() else {}
        return Run(path, _config(path / "config.yaml"), about, stages, _find_scores(path))
    if scores := _read_scores(path):
        return Run(path, {}, {}, {}, {path.name: scores})
    raise UserError(
        f"{path} is no run: it should be a run's folder (with config.yaml and metrics.jsonl) or one with the "
        "summary.json of a GenEval score"
    )


def _find_scores(run: Path) -> dict[str, Scores]:
    """All scores below a run's folder, sorted; folders named by digits hold the images of prompts."""
    found = {}
    for folder, names, files in os.walk(run):
        names[:] = sorted(name for name in names if name not in _NO_SCORES and not name.isdigit())
        if "summary.json" in files and (scores := _read_scores(Path(folder))):
            found[str(Path(folder).relative_to(run))] = scores
    return found


def _read_scores(folder: Path) -> Scores | None:
    """The folder's GenEval scores, or None if it has no summary or one of another benchmark."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary = _json(path, read_text(path))
    tasks = summary.get("tasks")
    is_geneval = isinstance(tasks, dict) and all(isinstance(task, dict) and "score" in task for task in tasks.values())
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
