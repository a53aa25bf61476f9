"""The network's section: what goes with which condition, and the paper's class-conditional recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t2i.config_base import ConfigError
from t2i.config_loading import check_world_size, load_config, stage_config, validate_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"dropout": 0.1}, "dropout 0.1 does nothing under condition text"),
        ({"classes": 10}, "classes 10 does nothing under condition text"),
        ({"bottleneck": 0}, "bottleneck 0 is for condition class"),
        ({"condition": "class", "text_depth": 2}, "text_depth 2 does nothing under condition class"),
        ({"condition": "class", "text_padding": "mask"}, "text_padding mask does nothing under condition class"),
        ({"condition": "class", "context_start": 16}, "context_start 16 must be below depth (16)"),
        ({"condition": "label"}, "model.condition"),
    ],
)
def test_fields_that_do_not_go_together(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config({"model": model}, "here")
    assert words in str(caught.value)


def test_adms_crop_is_square() -> None:
    assert validate_config({"data": {"crop": "adm", "resolution": [64, 64]}}, "here").data.size == (64, 64)
    with pytest.raises(ConfigError, match=r"data: crop adm makes squares: .* 32x64"):
        validate_config({"data": {"crop": "adm", "resolution": [32, 64]}}, "here")


@pytest.mark.parametrize("name", ["pixelgen_l", "pixelgen_xl"])
def test_the_papers_recipe_for_classes(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    for index in range(len(config.stages)):
        stage = stage_config(config, index)
        check_world_size(stage, 8, name)
        assert (stage.train.batch_size, stage.optimizer.lr, stage.ema.decay) == (256, 1e-4, 0.9999)
        assert (stage.data.crop, stage.data.horizontal_flip, stage.data.resolution) == ("adm", False, 256)
        assert stage.data.sources[0].class_folders and stage.data.sources[0].captions.members == {"cls": 1.0}


def test_xl_trains_160_epochs() -> None:
    train = load_config(CONFIGS / "pixelgen_xl.yaml").train
    assert train.steps * train.batch_size / 1_281_167 == pytest.approx(160, abs=0.2)


def test_table_5_adds_one_term_at_a_time_and_each_row_begins_anew() -> None:
    config = load_config(CONFIGS / "pixelgen_l.yaml")
    rows = [stage_config(config, index) for index in range(4)]
    terms = [(row.objective.lpips_weight, row.objective.pdino_weight, row.objective.gate) for row in rows]
    assert terms == [(0.0, 0.0, 0.0), (0.1, 0.0, 0.0), (0.1, 0.01, 0.0), (0.1, 0.01, 0.3)]
    assert all(row.objective.repa_weight == 0.5 and row.init.source == "scratch" for row in rows)
    assert all(row.train.steps == 200_000 for row in rows)
