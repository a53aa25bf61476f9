"""The objective that a config asks for, what its optimizer decays, and whether its average will tell anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t2i.build import TrainingNetwork, build_denoiser, build_projector
from t2i.config.base import ConfigError
from t2i.config.loading import load_config, stage_config
from t2i.config.run import RunConfig
from t2i.config.train import ObjectiveConfig
from t2i.diffusion.objective import Objective
from t2i.engine.optimizer import build_optimizer
from t2i.models.layers import muon_takes
from t2i.train.build import build_objective, noisy_ema

CONFIGS = Path(__file__).parents[3] / "configs"


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
    changes = {"pdino_gate": "none", "pdino_layers": [1, 3], "perceptual_t_min": 0.6, "repa_weight": 1}
    for weights, expected in (
        (built(dino_folder, **changes).weights, (False, (1, 3), 0.6, 1)),
        (built(dino_folder).weights, (True, (), 0.3, 0.5)),
    ):
        assert (weights.pdino_gated, weights.pdino_layers, weights.perceptual_t_min, weights.repa) == expected


def test_layers_that_the_network_lacks_are_refused(dino_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"objective.pdino_layers \[2, 4\]: .* has layers 1 to 3"):
        built(dino_folder, pdino_layers=[2, 4])


# The average


@pytest.mark.parametrize(
    ("decay", "steps", "init", "first", "fitting"),
    [
        (0.9999, 200, {}, True, "0.95"),
        (0.9999, 20_000, {}, True, "0.9995"),
        (0.9999, 20_000, {"source": "scratch"}, False, "0.9995"),
        (0.9999, 5, {}, True, "0"),
        (0.9999, 200_000, {}, True, None),
        (0.99, 1000, {}, True, None),
        (0.9999, 200, {}, False, None),  # it goes on from a stage that has trained
        (0.9999, 200, {"source": "runs/before/model"}, True, None),
        (0.0, 1, {}, True, None),
    ],
)
def test_an_average_that_stays_noise_is_said_with_the_decay_that_fits(
    decay: float, steps: int, init: dict[str, str], first: bool, fitting: str | None
) -> None:
    config = RunConfig.model_validate({"ema": {"decay": decay}, "train": {"steps": steps}, "init": init})
    said = noisy_ema(config, first)
    assert (said is None) == (fitting is None)
    if said is not None:
        assert said.startswith(f"ema.decay {decay:g} ") and f"; {fitting} would fit" in said
        config.ema.decay = float(fitting or 0)
        assert noisy_ema(config, first) is None


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_averages_of_the_configs_forget_where_they_began(path: Path) -> None:
    config = load_config(path)
    for index in range(len(config.stages)):
        assert noisy_ema(stage_config(config, index), index == 0) is None


# Weight decay


NETWORKS: list[dict[str, Any]] = [
    {"family": "pixelgen", "text_depth": 1, "bottleneck": 8},
    {
        "family": "pixelgen",
        "condition": "class",
        "classes": 3,
        "bottleneck": 8,
        "context_tokens": 2,
        "context_start": 1,
    },
    {"family": "pixeldit"},
    {"family": "pixeldit", "condition": "class", "classes": 3},
]


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda it: f"{it['family']} {it.get('condition', 'text')}")
def test_weight_decay_is_for_the_matrices_of_linear_layers_alone(network: dict[str, Any], muon: bool) -> None:
    model = {"patch_size": 4, "width": 48, "depth": 2, "heads": 2, "repa_layer": 1} | network
    config = RunConfig.model_validate({"model": model, "text": {"length": 4}})
    module = TrainingNetwork(build_denoiser(config.model, 8, 4), build_projector(config.model, 8))

    def groups(weight_decay: float) -> list[dict[str, Any]]:
        return build_optimizer(
            module, muon=muon_takes if muon else lambda _: False, betas=(0.9, 0.99), eps=1e-8,
            weight_decay=weight_decay, muon_momentum=0.9, work_dtype=torch.float32,
        ).param_groups  # fmt: skip

    decay = {id(p): group["weight_decay"] for group in groups(0.1) for p in group["params"]}
    decayed = {name for name, p in module.named_parameters() if decay[id(p)] == 0.1}
    spared = {name for name, p in module.named_parameters() if decay[id(p)] == 0.0}
    assert decayed | spared == {name for name, _ in module.named_parameters()}
    assert all(name.endswith(".weight") and module.get_parameter(name).ndim == 2 for name in decayed)
    ending = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "label.weight", "_position")
    assert [name for name in spared if not name.endswith(ending)] == []
    assert [name for name in decayed if name.endswith(ending)] == []
    # Without decay there are as many groups as optimizers, as if nobody asked.
    assert [group["muon"] for group in groups(0.0)] == ([False, True] if muon else [False])
