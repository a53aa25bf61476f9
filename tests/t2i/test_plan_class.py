"""The planner on class-conditional networks: what real tensors say, and the paper's sizes."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import t2i.models.pixelgen as pixelgen
from t2i.build import build_denoiser
from t2i.config import ModelConfig
from t2i.config_loading import load_config, stage_config
from t2i.plan import Assumptions, plan
from t2i.plan_memory import Shapes, ends_activations, image_blocks_activations
from t2i.plan_networks import saved_bytes
from t2i.plan_stage import CAPTION_CACHE, StageMemory
from t2i.plan_tables import tables
from t2i.train.memory import estimate

SMALL = {"condition": "class", "patch_size": 4, "width": 192, "depth": 4, "heads": 4, "repa_layer": 2}
SMALL |= {"context_tokens": 32, "context_start": 2, "classes": 10}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", [{"bottleneck": 32}, {"bottleneck": 0, "dropout": 0.1}], ids=["L", "XL"])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, changes: dict[str, float]) -> None:
    model, samples = ModelConfig.model_validate(SMALL | changes), 3
    net = build_denoiser(model, 0, 0).to(dtype)
    keys = (torch.randint(0, 2**62, (samples,)),) if model.dropout else ()

    def run() -> torch.Tensor:
        labels = torch.zeros(samples, dtype=torch.long)
        return net(torch.randn(samples, 3, 64, 64), torch.rand(samples), labels, *keys).output

    with mock.patch.object(pixelgen, "attention", F.scaled_dot_product_attention):
        measured = saved_bytes(run, net)
    shapes = Shapes(model, (64, 64), 0, 0, dtype.itemsize)
    blocks = image_blocks_activations(shapes, fused_norms=False)
    assert samples * (blocks + ends_activations(shapes, None, fused_norms=False)) == pytest.approx(measured, rel=0.03)


def test_the_papers_xl() -> None:
    found = plan(load_config(Path("configs/pixelgen_xl.yaml")), Assumptions.of(8, "h800", 0.22, 100_000, False))
    (stage,) = found["stages"]
    assert stage["parameters"]["denoiser"] == 676_699_200
    assert "text encoder" not in stage["flops_per_image"] and "text encoder" not in stage["static_bytes"]["zero1"]
    # 20 blocks of 288 tokens, 8 of 256: two FLOPs a token and weight that it meets (adaLN meets samples), and those
    # of the scores and the sums over values.
    weights = 4 * 1152**2 + 3 * 1152 * 3072
    counted = 2 * weights * (20 * 288 + 8 * 256) + 4 * 1152 * (20 * 288**2 + 8 * 256**2)
    assert stage["of_which"]["recomputed with checkpointing"] == pytest.approx(counted, rel=0.01)
    assert "frozen: DINOv2" in tables(found) and "Qwen" not in tables(found)


def test_no_memory_is_for_captions() -> None:
    stage = stage_config(load_config(Path("configs/pixelgen_xl.yaml")), 0)
    stage = stage.model_copy(update={"text": stage.text.model_copy(update={"cache": 1000})})
    memory = StageMemory.of(stage, 8, 2)
    assert not {"text encoder", CAPTION_CACHE} & memory.frozen().keys()
    assert memory.activations(32, False)["text blocks"] == 0
    found = estimate(stage, 8, torch.bfloat16)
    # At the least the weights in bf16, and on every rank its share of the fp32 masters, moments and average.
    assert 676_699_200 * (2 + 16 / 8) < found.least < found.expected < 80 * 2**30
