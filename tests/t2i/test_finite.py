"""Numbers that are not finite: weights and null captions are refused by name, pictures by prompt and step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from random_model import write_random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import launch.sample
from launch.export import main as export
from launch.process import main
from t2i.config.base import ConfigError
from t2i.config.train import SamplingConfig
from t2i.model_folder import check_finite, read_model
from t2i.pipeline import NotFiniteError, Picture, Pipeline, edit_image, edit_settings

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "model")


def spoil(file: Path, name: str, value: float, places: int = 1) -> None:
    tensors = load_file(file)
    tensors[name].view(-1)[-places:] = value
    save_file(tensors, file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["denoiser.blocks.1.norm1.weight", "null_caption", "projector.layers.0.weight"])
def test_weights_are_refused_by_name(model: Path, name: str, value: float) -> None:
    spoil(model / "ema.safetensors", name, value, 2)
    with pytest.raises(ConfigError, match=rf"ema.safetensors: {name} has 2 of [\d,]+ numbers that are not finite"):
        read_model(model, "ema")
    assert read_model(model, "raw").tensors


def test_the_first_tensor_is_named_and_the_others_are_counted() -> None:
    bad, good, none = torch.tensor([1.0, torch.nan]), torch.ones(3), torch.empty(0)
    kinds = [("int", torch.tensor([1])), ("none", none), ("half", good.half()), ("large", torch.tensor([3e38, 3e38]))]
    check_finite([*kinds, ("bf16", good.bfloat16())], "file")
    with pytest.raises(ConfigError, match=r"file: b has 1 of 2 numbers that are not finite \(as have 2 more tensors\)"):
        check_finite([("a", good), ("b", bad), ("c", bad.half()), ("d", -1 / bad.bfloat16() * torch.inf)], "file")


def test_jobs_say_it_in_a_sentence_and_exit_with_2(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(model / "ema.safetensors", "null_caption", float("nan"))
    (tmp_path / "prompts.txt").write_text("a red circle")
    words = ["--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    with pytest.raises(SystemExit) as stop:
        main(launch.sample.sample)
    assert stop.value.code == 2
    assert "null_caption has 1 of" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert export([str(model), "--out", str(tmp_path / "out.ckpt")]) == 2
    assert "null_caption has 1 of" in capsys.readouterr().err
    assert not (tmp_path / "out.ckpt").exists()


def spoiled(pipeline: Pipeline, image: int, first: int, value: float) -> list[int]:
    """Have calls of the network, from the `first` on, return one number of one image's that is not finite."""
    real, calls = pipeline.denoiser.forward, list[int]()

    def forward(x: Tensor, t: Tensor, condition: Tensor) -> object:
        result = real(x, t, condition)
        calls.append(len(calls))
        if len(calls) > first:
            result.output[image, 0, 0, 0] = value
        return result

    pipeline.denoiser.forward = forward  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("solver", "first", "place"),
    [("euler", 0, r"step 1 of 4 \(t = 0\)"), ("euler", 2, r"step 3 of 4 \(t = 0.5\)"), ("heun", 3, "step 3 of 4")]
    + [("adams", 3, "step 4 of 4"), ("dpmpp", 1, "step 2 of 4")],
)
def test_a_picture_is_refused_by_its_step(model: Path, solver: str, first: int, place: str, value: float) -> None:
    pipeline = Pipeline.load(model, "ema", CPU)
    spoiled(pipeline, 1, first, value)
    order = {"order": 2, "coefficients": "variable"} if solver == "adams" else {}
    sampling = SamplingConfig(solver=solver, steps=4, batch_size=3, guidance_scale=1.0, shift=1.0, **order)
    pictures = [Picture("a red circle"), Picture("a blue star", 7), Picture("a dog")]
    with pytest.raises(NotFiniteError, match=rf"prompt 'a blue star', picture 7: is not finite from {place}"):
        pipeline.draw(pictures, sampling)
    told: list[str] = []
    pipeline.on_fault = told.append
    assert len(pipeline.draw(pictures, sampling)) == 3
    assert len(told) == 1


def test_what_fills_a_batch_up_is_not_looked_at(model: Path) -> None:
    pipeline = Pipeline.load(model, "ema", CPU)
    spoiled(pipeline, 1, 0, float("nan"))
    assert len(pipeline.draw([Picture("a")], SamplingConfig(steps=2, batch_size=2, guidance_scale=1.0))) == 1


def test_an_edit_is_refused_by_its_words_and_step(model: Path) -> None:
    pipeline = Pipeline.load(model, "ema", CPU)
    settings = edit_settings(pipeline.config, {"steps": 4, "n_max": 2}, "test")
    spoiled(pipeline, 0, 2, float("nan"))
    with pytest.raises(NotFiniteError, match="edit from 'a circle' to 'a star': is not finite from step 4 of 4"):
        edit_image(pipeline, torch.zeros(3, 16, 16, dtype=torch.uint8), "a circle", "a star", settings)
