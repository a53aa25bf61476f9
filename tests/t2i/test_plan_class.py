"""The planner on class-conditional networks: what real tensors say, and the paper's sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from t2i.config.loading import load_config, stage_config
from t2i.plan.choice import Assumptions
from t2i.plan.command import plan, tables
from t2i.plan.memory import CAPTION_CACHE, StageMemory
from t2i.train.preflight import estimate


def test_the_papers_xl() -> None:
    found = plan(
        load_config(Path("configs/pixelgen_xl.yaml")), Assumptions.from_config(8, "h800", 0.22, 100_000, False)
    )
    (stage,) = found["stages"]
    assert stage["parameters"]["denoiser"] == 676_699_200
    assert "text encoder" not in stage["flops_per_image"] and "text encoder" not in stage["static_bytes"]["zero1"]
    # 20 blocks of 288 tokens, 8 of 256: two FLOPs a token and weight that it meets (adaLN meets samples), and those
    # of the scores and the sums over values.
    weights = 4 * 1152**2 + 3 * 1152 * 3072
    counted = 2 * weights * (20 * 288 + 8 * 256) + 4 * 1152 * (20 * 288**2 + 8 * 256**2)
    assert stage["recomputed_flops"]["checkpointed"] == pytest.approx(counted, rel=0.01)
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
