"""metrics.jsonl survives torn lines and rewinds; Weights & Biases writes offline without a login."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from t2i.config.run import RunConfig
from t2i.train.metrics import JsonLines, Observer, peak_flops


def lines(metrics: JsonLines) -> list[tuple[str, int]]:
    return [(line["stage"], line["step"]) for line in metrics.lines()]


def test_rewind_takes_back_the_stages_later_steps_alone(tmp_path: Path) -> None:
    metrics = JsonLines(tmp_path / "metrics.jsonl")
    for stage, step in (("a", 1), ("a", 9), ("b", 1), ("b", 2), ("b", 3)):
        metrics.write({"stage": stage, "step": step})
    with metrics.path.open("a") as file:
        file.write('{"stage": "b", "st')  # the writer was killed here
    assert lines(metrics)[-1] == ("b", 3)
    metrics.rewind("b", 2)
    assert lines(metrics) == [("a", 1), ("a", 9), ("b", 1), ("b", 2)]
    metrics.write({"stage": "b", "step": 3})
    assert lines(metrics)[-1] == ("b", 3)
    metrics.write({"stage": "c", "step": 0})  # the first validation of a stage that was killed before it saved
    metrics.rewind("c", 0)
    assert lines(metrics)[-1] == ("b", 3)


def test_what_comes_again_is_taken_back(tmp_path: Path) -> None:
    metrics = JsonLines(tmp_path / "metrics.jsonl")
    places = [("a", 2, "score"), ("b", 1, "score"), ("b", 2, "train"), ("b", 2, "score"), ("b", 2, "validation")]
    for stage, step, kind in places:
        metrics.write({"stage": stage, "step": step, "kind": kind})
    metrics.take_back("b", 2, ("score", "validation"))
    assert [(line["stage"], line["step"], line["kind"]) for line in metrics.lines()] == places[:3]


def observer(directory: Path, active: bool, wandb_mode: str) -> Observer:
    tree = {"name": directory.name, "root": directory.parent, "train": {"steps": 3}, "logging": {"wandb": wandb_mode}}
    return Observer(RunConfig.model_validate(tree), "s", 0, active)


def test_ranks_other_than_0_write_nothing(tmp_path: Path) -> None:
    silent = observer(tmp_path, False, "online")
    silent.write("train", 1, {"loss": 1.0})
    silent.event("hello")
    silent.take_back(1, ("train",))
    silent.progress()
    silent.close()
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_a_login_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    speaking = observer(tmp_path, True, "online")
    speaking.write("train", 1, {"loss": 2.0, "images_per_s": 3.0})
    speaking.progress({"loss": 2.0, "images_per_s": 3.0})
    speaking.close()
    assert "writing offline" in (tmp_path / "events.log").read_text()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 2.0


def test_the_measured_peak_is_a_rate_of_this_machine() -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
