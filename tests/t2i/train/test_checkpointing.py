"""When a stage is saved, what is said of it, and how far back it may go."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_cuts import cut, ema_of

from data.errors import StoreError
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.engine.checkpoint import Mirror, checkpoints, step_of
from t2i.train import checkpointing
from t2i.train.checkpointing import Saver
from t2i.train.guard import Guard, Rollback, Stop
from t2i.train.run_dir import StageDir

ALONE = World(0, 1, torch.device("cpu"))


class Quiet:
    """In place of the watch and the observer: what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def alive(self, what: str) -> None:
        pass

    def event(self, text: str) -> None:
        self.said.append(text)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        assert kind == "checkpoint" and values["stall_s"] >= 0


def saver(
    root: Path, loaded_step: int = -1, mirror: Mirror | None = None, offload_dir: Path | None = None, **checkpoint: Any
) -> Saver:
    tree = {"train": {"steps": 10}, "engine": {"offload_dir": offload_dir}, "checkpoint": {"keep": 9, **checkpoint}}
    config = RunConfig.model_validate({"root": root, **tree})
    place, (shards,) = StageDir("low", root / "run" / "low", None), cut(1)
    guard = Guard(config.spike_guard)
    return Saver(config, place, ALONE, Quiet(), "x", mirror, shards, ema_of(shards), guard, loaded_step)


def state() -> dict[str, Any]:
    return {"made": True}


def steps(root: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(root / "run" / "low" / "checkpoints")]


def test_regular_ones_ephemeral_ones_and_the_last(tmp_path: Path) -> None:
    it, observer = saver(tmp_path, every=4, ephemeral_every=3), Quiet()
    seen = []
    for step in range(1, 11):
        it.when_due(step, state, observer, last=step == 10)
        it.wait(observer)
        seen.append(steps(tmp_path))
    # Of 3, 6 and 9, only until a regular one is newer; 10 is the stage's end.
    assert seen == [[], [], [3], [4], [4], [4, 6], [4, 6], [4, 8], [4, 8, 9], [4, 8, 10]]
    (manifest,) = (tmp_path / "run" / "low" / "checkpoints" / "step_00000004").glob("manifest.json")
    assert json.loads(manifest.read_text())["state"] == {"made": True}


def test_the_copy_of_the_state_may_lie_in_a_file(tmp_path: Path) -> None:
    written = []
    for name in ("memory", "files"):
        folder = tmp_path / "state" if name == "files" else None
        it = saver(tmp_path / name, offload_dir=folder)
        assert it._writer._snapshot._buffer.is_shared() == (name == "files")
        assert it.now(6, state, Quiet()) == "saved"
        (step,) = checkpoints(tmp_path / name / "run" / "low" / "checkpoints")
        written.append({path.name: path.read_bytes() for path in step.glob("*.safetensors")})
    assert written[0] == written[1] and written[0]
    assert not list((tmp_path / "state").iterdir())


def test_what_was_loaded_need_not_be_saved_and_all_else_is(tmp_path: Path) -> None:
    it, observer = saver(tmp_path, loaded_step=5), Quiet()
    assert it.now(5, state, observer) == "saved" and steps(tmp_path) == []
    assert it.now(6, state, observer) == "saved" and steps(tmp_path) == [6]
    assert it.now(6, state, observer) == "saved"
    assert saver(tmp_path, loaded_step=0).now(0, state, observer) == "nothing to save"


@pytest.mark.parametrize("faults", [1, 2])
def test_a_fault_is_tried_again_once_and_then_said(tmp_path: Path, monkeypatch, faults: int) -> None:
    import t2i.engine.checkpoint.writer as writer

    commit, left = writer.commit, [None] * faults

    def fails(aside: Path, final: Path) -> None:
        if left:
            left.pop()
            raise OSError(28, "No space left on device")
        commit(aside, final)

    monkeypatch.setattr(writer, "commit", fails)
    it, observer = saver(tmp_path), Quiet()
    said = it.now(3, state, observer)
    assert (said, steps(tmp_path)) == (("saved", [3]) if faults == 1 else ("NOT saved (events.log says why)", []))
    assert sum("No space left" in event for event in observer.said) == faults


def test_there_must_be_something_to_go_back_to(tmp_path: Path) -> None:
    it, observer = saver(tmp_path, every=4), Quiet()
    assert it.leads_back(Rollback(4, 5, "why")) == Rollback(4, 5, "why")  # no checkpoint was due yet: the stage's start
    it.now(4, state, observer)
    it.now(8, state, observer)
    assert it.leads_back(Rollback(6, 9, "why")) == Rollback(6, 9, "why")
    for part in (tmp_path / "run" / "low" / "checkpoints" / "step_00000004").glob("*.safetensors"):
        part.write_bytes(b"torn")
    decision = it.leads_back(Rollback(6, 9, "why"))
    assert isinstance(decision, Stop) and decision.reason.startswith("why, but no good checkpoint from before step 6")
    assert 8 in steps(tmp_path)  # nothing was given up for it


def test_a_mirror_that_does_not_answer_leaves_nothing_to_go_back_to(tmp_path: Path, monkeypatch) -> None:
    def silent(*_: Any) -> None:
        raise StoreError("no answer")

    it = saver(tmp_path, every=4)
    monkeypatch.setattr(checkpointing, "latest_checkpoint", silent)
    assert isinstance(it.leads_back(Rollback(6, 9, "why")), Stop)


def test_going_back_takes_later_ones_away(tmp_path: Path) -> None:
    it, observer = saver(tmp_path, every=2), Quiet()
    for step in (2, 4, 6):
        it.now(step, state, observer)
    it.go_back(Rollback(4, 6, "why"), observer)
    assert steps(tmp_path) == [2]


class Busy:
    """A mirror that is never done."""

    def in_use(self) -> set[Path]:
        return {Path("step_00000010")}


@pytest.mark.parametrize("leaves", [True, False])
def test_the_mirror_is_waited_for_within_bounds_and_not_by_who_is_asked_to_leave(
    tmp_path: Path, monkeypatch, leaves: bool
) -> None:
    monkeypatch.setattr(checkpointing, "MIRROR_PATIENCE_S", 3600.0 if leaves else 0.2)
    monkeypatch.setattr(checkpointing, "MIRROR_ROUND_S", 0.05)
    it, asked = saver(tmp_path, mirror=Busy()), []

    def leave() -> str | None:
        asked.append(time.monotonic())
        return "SIGTERM came" if leaves and len(asked) == 3 else None

    it.await_mirror(leave)
    assert len(asked) == 3 if leaves else asked[-1] - asked[0] >= 0.2


def test_without_a_mirror_nobody_waits(tmp_path: Path) -> None:
    saver(tmp_path).await_mirror(lambda: None)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
