"""A run to be killed: how it is started, its folder, and where it stands by what is in it."""

from __future__ import annotations

import fcntl
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import tiny_config, write_config

from t2i.config.loading import load_config
from t2i.engine.checkpoint import Checkpoint, newest
from t2i.train.metrics import JsonLines
from t2i.train.run_dir import StageDir, list_stage_dirs

STEPS = 20
"""Of each stage."""
LAST = f"step_{STEPS:08d}"
HANG_S = 120.0
SAVING = re.compile(r"\.step_\d+\.[0-9a-f]{8}-\d+\.\d+")  # what a checkpoint is called until it is committed


@dataclass(frozen=True)
class Parallelism:
    """The engine, the number of ranks and the launcher of a run."""

    name: str
    launcher: str
    options: tuple[str, ...]
    ranks: int = 2


ZERO1 = Parallelism("zero1", "deepspeed", ("--engine.zero_stage", "1"))
ZERO3 = Parallelism("zero3", "deepspeed", ("--engine.zero_stage", "3"))
FSDP2 = Parallelism("fsdp2", "torchrun", ("--engine.name", "fsdp"))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Stand:
    """The first stage that is not done (their number: none is left), its newest checkpoint's step (0: there is none)
    and data state, and what is wrong with newer ones."""

    stage: int
    step: int
    data: dict[str, Any] | None
    faults: list[str]


class Run:
    """The folder of a run, and where it stands by what is in it."""

    def __init__(self, root: Path, name: str, scenes: Path) -> None:
        changes: dict[str, Any] = {
            "name": name,
            "train": {"steps": STEPS, "batch_size": 8, "micro_batch_size": 2},
            "validation": {"every": 10, "samples": 12, "prompts": ["a photo of a red circle"]},
            "checkpoint": {"every": 3, "keep": 2, "ephemeral_every": 1},
            # The stand-ins' gradients jump where rounding moves a unit over its kink, and losses part by 1e-3 then.
            "objective": {"features_network": "efficientnet-lite0", "lpips_weight": 0.0, "pdino_weight": 0.0},
            "stages": [{"name": "first"}, {"name": "second", "data": {"resolution": 24}}],
        }
        self.config_path = write_config(root / f"{name}.yaml", tiny_config(scenes, root, **changes))
        self.config = load_config(self.config_path)
        self.places: list[StageDir] = list_stage_dirs(self.config)
        self.metrics = JsonLines(self.config.directory / "metrics.jsonl")
        self.events = self.config.directory / "events.log"

    @property
    def total(self) -> int:
        return STEPS * len(self.places)

    def steps_trained(self) -> int:
        """Steps with a line in metrics.jsonl, over all stages."""
        path = self.metrics.path
        return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0

    def saves(self) -> set[Path]:
        """Folders of checkpoints that are not committed."""
        found = (path for place in self.places for path in place.checkpoints.glob(".step_*"))
        return {path for path in found if SAVING.fullmatch(path.name)}

    def stands(self) -> Stand:
        """Where the next start has to resume."""
        for stage, place in enumerate(self.places):
            if not place.done:
                path, faults = newest(place.checkpoints)
                state = Checkpoint(path).state if path is not None else {"step": 0, "data": None}
                return Stand(stage, state["step"], state["data"], faults)
        return Stand(len(self.places), 0, None, [])

    def wait_until_free(self) -> bool:
        """Wait until no process holds the run's lock; False if one still does at the end of the wait."""
        path, deadline = self.config.directory / "run.lock", time.monotonic() + HANG_S
        while path.exists():
            with path.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        return False
            time.sleep(0.05)
        return True
