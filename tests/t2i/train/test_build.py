"""The objective that a config asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t2i.config_base import ConfigError
from t2i.config_objective import ObjectiveConfig
from t2i.diffusion.objective import Objective
from t2i.train.build import build_objective


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(
        Dinov2Config(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    return str(folder)


def built(folder: str, **settings: Any) -> Objective:
    config = ObjectiveConfig(lpips_weight=0, features_path=folder, **settings)
    return build_objective(config, "image", torch.device("cpu"), torch.float32, compiled=False)


def test_the_objective_is_as_configured(dino_folder: str) -> None:
    weights = built(dino_folder, pdino_gate="none", pdino_layers=[1, 3], gate=0.6, repa_weight=1).weights
    assert (weights.pdino_gated, weights.pdino_layers, weights.gate, weights.repa) == (False, (1, 3), 0.6, 1)
    weights = built(dino_folder).weights
    assert (weights.pdino_gated, weights.pdino_layers, weights.gate, weights.repa) == (True, (), 0.3, 0.5)


def test_layers_that_the_network_lacks_are_refused(dino_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"objective.pdino_layers \[2, 4\]: .* has layers 1 to 3"):
        built(dino_folder, pdino_layers=[2, 4])
