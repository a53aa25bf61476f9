"""The folder of a run: its paths, environment.json, and what reports and comparisons read back from it.

A run that is read may still go on, or have been killed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from data.files import write_json
from data.pages import Array, Piece
from t2i.build import choose_dtype
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.engine.checkpoint import checkpoints
from t2i.source import describe_source, installed_versions
from t2i.train.metrics import JsonLines

if TYPE_CHECKING:
    from t2i.train.data import StageData


@dataclass(frozen=True)
class StageDir:
    """A stage's name, its folder, and the stage before it."""

    name: str
    folder: Path
    previous: StageDir | None

    @property
    def model(self) -> Path:
        """The finished model; exists once the stage is done."""
        return self.folder / "model"

    @property
    def best(self) -> Path:
        """The model with the stage's best score."""
        return self.folder / "best"

    @property
    def checkpoints(self) -> Path:
        """The stage's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def null_caption(self) -> Path:
        """The null caption's text states or class, one file for all stages of the run."""
        return self.folder.parent / "null_caption.safetensors"

    @property
    def samples(self) -> Path:
        """The stage's sample grids."""
        return self.folder / "samples"

    @property
    def done(self) -> bool:
        """Whether the stage's model is there."""
        return self.model.exists()

    @property
    def begun(self) -> bool:
        """Whether the stage has a checkpoint, or its model."""
        return self.done or bool(checkpoints(self.checkpoints))


def list_stage_dirs(config: RunConfig) -> list[StageDir]:
    """The folders of all stages of a run, in order."""
    stage_dirs: list[StageDir] = []
    for stage in config.stages:
        name = str(stage["name"])
        stage_dirs.append(StageDir(name, config.directory / name, stage_dirs[-1] if stage_dirs else None))
    return stage_dirs


def write_environment(
    config: RunConfig, stage: RunConfig, data: StageData, parameters: int, world_size: int, devices: str
) -> None:
    """Write environment.json: versions, devices, source code, and stand-ins and licences of all stages so far."""
    from t2i.train.build import stand_ins  # the engines, which reading a run does without

    path = config.directory / "environment.json"
    before: dict[str, Any] = {"stand_ins": [], "data": []}
    if path.exists():
        with suppress(ValueError):  # torn by a full disk
            before = json.loads(path.read_text())
    known = {entry["name"]: entry for entry in before["data"]}
    for source, opened in zip(stage.data.sources, data.sources, strict=True):
        known[source.name] = {
            "name": source.name,
            "url": source.url,
            "licence": source.licence,
            "credit": source.credit,
            "samples": int(opened.index.counts.sum()),
        }
    environment = {
        "versions": installed_versions(),
        "device": devices,
        "world_size": world_size,
        "parameters": parameters,
        "stand_ins": list(dict.fromkeys([*before["stand_ins"], *stand_ins(stage.objective)])),
        "data": list(known.values()),
        **describe_source(),
    }
    write_json(path, environment)


def describe_devices(world: World) -> str:
    """Such as "8 x NVIDIA H100 80GB HBM3", or "CPU: 2 cores, fast bf16". A collective."""
    if world.device.type == "cuda":
        mine = torch.cuda.get_device_name(world.device)
    else:
        fast = choose_dtype("auto", world.device) == torch.bfloat16
        mine = f"CPU: {len(os.sched_getaffinity(0))} cores, {'fast' if fast else 'no fast'} bf16"
    counts = Counter(world.gather(mine))
    if counts == {mine: 1} and world.device.type == "cpu":
        return mine
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


NO_SCORES = ("kind", "stage", "step", "time", "prompts", "images", "complete", "held_s")
"""Fields of a "score" line that are not scores."""
_PAUSE_S = 3600.0  # a longer gap in metrics.jsonl means that the run was down, not a slow step


@dataclass(frozen=True)
class Stage:
    """A stage of the run that has trained a step."""

    name: str
    start: int  # steps of all earlier stages
    start_s: float  # seconds of all earlier stages
    lines: list[dict[str, Any]]  # its metrics
    grids: list[tuple[int, Path]]  # step and image of each sample grid
    done: bool  # whether its model is there

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def last(self) -> dict[str, Any]:
        """The last line of training."""
        return self.of("train")[-1]

    @property
    def end(self) -> int:
        """The last step that it has reached."""
        return int(self.lines[-1]["step"])

    @property
    def progress(self) -> float:
        return 1.0 if self.done else float(self.last["step"] / self.last["total_steps"])

    @property
    def images(self) -> int:
        return int(self.last["step"] * self.last["batch_size"])

    @cached_property
    def _clock(self) -> Array:
        """Seconds from the stage's start to each line: an estimate for the first, then the time between lines."""
        first = self.lines[0]
        gaps = np.diff([line["time"] for line in self.lines])
        estimate = first["step"] * first.get("step_s", 0.0)
        return np.cumsum([estimate, *np.where(gaps <= _PAUSE_S, gaps, 0.0)])

    @property
    def seconds(self) -> float:
        """Wall time so far, without pauses."""
        return float(self._clock[-1])

    def series(self, kind: str, metric: str, over: Literal["steps", "hours"] = "steps") -> Piece | None:
        """A metric over the steps or hours since the run's start, where it is finite and complete, or None."""
        found = [
            (self.start + line["step"] if over == "steps" else (self.start_s + second) / 3600, line[metric])
            for line, second in zip(self.lines, self._clock, strict=True)
            if line["kind"] == kind and line.get(metric) is not None and line.get("complete", True)
        ]
        if not found:
            return None
        x, y = zip(*found, strict=True)
        return np.array(x, float), np.array(y, float)


@dataclass(frozen=True)
class Run:
    """What a run's folder says, with stages in the order in which they began."""

    environment: dict[str, Any]
    stages: list[Stage]
    end: int  # steps of all stages


def read_run(directory: Path) -> Run:
    """Read a run's folder.

    Raises:
        FileNotFoundError: it has no environment.json or no config.yaml.
    """
    for name in ("environment.json", "config.yaml"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}: a report needs the folder of a run that has begun")
    stages = read_stages(directory)
    end = stages[-1].start + stages[-1].end if stages else 0
    return Run(json.loads((directory / "environment.json").read_text(encoding="utf-8")), stages, end)


def read_stages(directory: Path) -> list[Stage]:
    """The stages in a run's metrics.jsonl, if it exists, in the order in which they began."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in JsonLines(directory / "metrics.jsonl").lines():
        lines.setdefault(line["stage"], []).append(line)
    stages: list[Stage] = []
    start, start_s = 0, 0.0
    for name, own in lines.items():
        if any(line["kind"] == "train" for line in own):
            folder = directory / name
            stages.append(Stage(name, start, start_s, own, _grids(folder / "samples"), (folder / "model").exists()))
            start, start_s = start + stages[-1].end, start_s + stages[-1].seconds
    return stages


def _grids(folder: Path) -> list[tuple[int, Path]]:
    """Step and image of each grid that is whole: its description is written after it."""
    described = [path.with_suffix(".png") for path in folder.glob("step_*.json")]
    return sorted((int(path.stem.removeprefix("step_")), path) for path in described)


def read_grid(path: Path) -> tuple[dict[str, Any], list[Image.Image]]:
    """A grid's description and its images, one for each prompt of the description."""
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    grid = Image.open(path)
    width, height = grid.width // about["columns"], grid.height // about["rows"]
    cells = [divmod(i, about["columns"]) for i in range(len(about["prompts"]))]
    return about, [
        grid.crop((column * width, row * height, (column + 1) * width, (row + 1) * height)) for row, column in cells
    ]
