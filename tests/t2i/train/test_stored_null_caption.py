"""Where a run has its null caption from, and that it is its own text encoder's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_qwen import save_qwen
from torch import Tensor

from data.errors import UserError
from t2i.build import build_text, condition_identity
from t2i.config.base import ConfigError
from t2i.config.loading import validate_config
from t2i.config.run import RunConfig
from t2i.model_folder import write_model
from t2i.train.checkpointing import find_null_caption, store_null_caption
from t2i.train.run_dir import StageDir, stage_places

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_qwen(tmp_path_factory.mktemp("qwen3")))


def run_of(root: Path, qwen: str, padding: str, source: str = "previous") -> tuple[RunConfig, StageDir]:
    text, stages = {"model": qwen, "length": 12}, [{"name": "low"}]
    tree = {"root": str(root), "text": text, "stages": stages, "init": {"source": source}}
    config = validate_config({**tree, "model": {"text_padding": padding}}, "test")
    config.directory.mkdir(parents=True, exist_ok=True)
    return config, stage_places(config)[0]


def found(config: RunConfig, place: StageDir) -> Tensor:
    return find_null_caption(config, place, build_text(config, CPU, torch.float32))


@pytest.mark.parametrize("padding", ["attend", "mask"])
def test_a_run_keeps_its_null_caption(tmp_path: Path, qwen: str, padding: str) -> None:
    config, place = run_of(tmp_path, qwen, padding)
    fresh = found(config, place)
    store_null_caption(config, place, fresh + 1)
    assert torch.equal(found(config, place), fresh + 1)
    other, _ = run_of(tmp_path, qwen, {"attend": "mask", "mask": "attend"}[padding])
    assert condition_identity(other) != condition_identity(config)
    with pytest.raises(ConfigError, match="was computed with"):
        found(other, place)


@pytest.mark.parametrize("padding", ["attend", "mask"])
def test_a_model_to_start_from_has_the_runs_padding(tmp_path: Path, qwen: str, padding: str) -> None:
    config, place = run_of(tmp_path, qwen, "mask", str(tmp_path / "model"))
    saved, _ = run_of(tmp_path / "other", qwen, padding)
    write_model(tmp_path / "model", saved, {}, {}, torch.ones(12, 20))
    if padding == "mask":
        assert torch.equal(found(config, place), torch.ones(12, 20))
    else:
        with pytest.raises(ConfigError, match=r"has another text encoder, text.length, model.text_padding or"):
            found(config, place)


def test_a_run_keeps_its_instruction(tmp_path: Path, qwen: str) -> None:
    config, place = run_of(tmp_path, qwen, "attend")
    store_null_caption(config, place, found(config, place))
    text = config.text.model_copy(update={"instruction": "a photo of "})
    with pytest.raises(ConfigError, match=r"was computed with .*, this run has .* text.instruction of SHA-256 \w+"):
        found(config.model_copy(update={"text": text}), place)


def test_a_text_encoder_may_move_and_not_change(tmp_path: Path, qwen: str) -> None:
    config, place = run_of(tmp_path, qwen, "attend")
    store_null_caption(config, place, states := found(config, place))
    shutil.copytree(qwen, tmp_path / "moved")
    moved, _ = run_of(tmp_path, str(tmp_path / "moved"), "attend")
    assert torch.equal(found(moved, place), states)
    other, _ = run_of(tmp_path, str(save_qwen(tmp_path / "other", seed=1)), "attend")
    with pytest.raises(UserError, match=r"text.model .*other is not the text encoder of .*null_caption"):
        found(other, place)
