"""The network's section: what goes with which condition, and the paper's class-conditional recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t2i.config.base import ConfigError
from t2i.config.loading import changes, check_world_size, load_config, stage_config, validate_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"dropout": 0.1}, "dropout 0.1 does nothing under condition text: leave it at 0.0"),
        ({"classes": 10}, "classes 10 does nothing under condition text: leave it at 1000"),
        ({"bottleneck": 0}, "bottleneck 0 is for condition class"),
        ({"condition": "class", "text_depth": 2}, "text_depth 2 does nothing under condition class"),
        ({"condition": "class", "text_padding": "mask"}, "text_padding mask does nothing under condition class"),
        ({"condition": "class", "context_start": 16}, "context_start 16 must be below depth (16)"),
        ({"condition": "label"}, "model.condition"),
        ({"pixel": {"depth": 2}}, "pixel does nothing under family pixelgen: leave it at its defaults"),
        ({"family": "pixeldit", "bottleneck": 128}, "bottleneck 128 does nothing under family pixeldit"),
        ({"family": "pixeldit", "pixel": {"tokens_per_patch": 3}}, "model.pixel.tokens_per_patch 3 must be a power"),
        (
            {"family": "pixeldit", "patch_size": 2, "pixel": {"tokens_per_patch": 8}},
            "tokens_per_patch 8 must cut a patch",
        ),
        ({"family": "pixeldit", "pixel": {"attention_heads": 7}}, "pixel.attention_width 1536 must be a multiple"),
        (
            {"family": "pixeldit", "pixel": {"attention": False, "tokens_per_patch": 2}},
            "tokens_per_patch 2 does nothing under attention False",
        ),
        ({"family": "pixeldit", "pixel": {"modulation": "additive", "attention": False}}, "additive needs attention"),
    ],
)
def test_fields_that_do_not_go_together(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config({"model": model}, "here")
    assert words in str(caught.value)


def test_adms_crop_is_square() -> None:
    assert validate_config({"data": {"crop": "adm", "resolution": [64, 64]}}, "here").data.size == (64, 64)
    with pytest.raises(ConfigError, match=r"data.crop adm makes squares: .* 32x64"):
        validate_config({"data": {"crop": "adm", "resolution": [32, 64]}}, "here")


@pytest.mark.parametrize("name", ["pixelgen_l", "pixelgen_xl", "baselines/jit_repa"])
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


def test_xl_balances_gradients_after_80_epochs() -> None:
    """Appendix A.2 and the public code: from epoch 80 of 160, every 50 steps, four fifths of the old weight kept."""
    config = load_config(CONFIGS / "pixelgen_xl.yaml")
    assert len(config.stages) == 1  # the step is one of the stage
    objective = stage_config(config, 0).objective
    assert (objective.balance_from_step, objective.balance_every) == (config.train.steps // 2, 50)
    assert (objective.balance_smoothing, objective.balance_max) == (0.8, 100.0)


@pytest.mark.parametrize(
    ("row", "differs"),
    [
        ("jit_repa", {"objective.lpips_weight": 0.0, "objective.pdino_weight": 0.0}),
        ("lpips", {"objective.pdino_weight": 0.0, "objective.perceptual_t_min": 0.0}),
        ("pdino", {"objective.perceptual_t_min": 0.0}),
    ],
)
def test_the_rows_of_table_5_differ_in_their_terms_alone(row: str, differs: dict[str, float]) -> None:
    whole, less = (load_config(CONFIGS / name) for name in ("pixelgen_l.yaml", f"baselines/{row}.yaml"))
    assert less.name == f"pixelgen_l_{row}"
    stages = [stage_config(config, 0) for config in (whole, less)]
    assert sorted([*differs, "name"]) == changes(*(stage.model_dump() for stage in stages))
    for field, value in differs.items():
        section, _, name = field.partition(".")
        assert getattr(getattr(less, section), name) == value


def test_the_last_row_of_table_5_is_pixelgen_l() -> None:
    config = load_config(CONFIGS / "pixelgen_l.yaml")
    assert len(config.stages) == 1 and config.train.steps == 200_000
    objective = config.objective
    assert (objective.lpips_weight, objective.pdino_weight, objective.repa_weight) == (0.1, 0.01, 0.5)
    assert (objective.perceptual_t_min, objective.balance_from_step) == (0.3, None)
    sampling = config.sampling
    assert (sampling.solver, sampling.steps, sampling.guidance_scale, sampling.shift) == ("euler", 50, 1.0, 1.0)
