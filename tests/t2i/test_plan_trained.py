"""What the meta device says of a network is what real tensors say."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import t2i.models.layers as transformer
import t2i.models.pixeldit as pixeldit
from t2i.build import TrainingNetwork, build_denoiser, build_projector
from t2i.config.run import RunConfig
from t2i.diffusion.perceptual import cosine_distance
from t2i.plan.counts import ImageCost, image_cost, on_meta
from t2i.plan.meta import SavedTensors, saved_bytes
from t2i.train.build import denoiser_training_flops

TEXT_WIDTH, LENGTH, FEATURES, SIDE = 64, 24, 40, 64
SMALL: dict[str, Any] = {"patch_size": 4, "width": 128, "depth": 3, "heads": 4, "repa_layer": 2}
CLASSES = {**SMALL, "condition": "class", "classes": 10, "width": 192, "depth": 4}
PIXELS = {"depth": 2, "attention_width": 64, "attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "pixelgen": {**SMALL, "text_depth": 2, "bottleneck": 32},
    "pixelgen class": {**CLASSES, "context_start": 2, "bottleneck": 32},
    "pixelgen class, dropout": {**CLASSES, "context_start": 2, "bottleneck": 0, "dropout": 0.1},
    "pixeldit": {**SMALL, "family": "pixeldit", "pixel": PIXELS, "repa_width": 100},
    "pixeldit class": {**CLASSES, "family": "pixeldit", "pixel": {"depth": 2}},
    "pixeldit class, changed": {
        **CLASSES,
        "family": "pixeldit",
        "pixel": {"depth": 2, "post_modulation": True, "tokens_per_patch": 2},
    },
}


def config_of(model: dict[str, Any], **objective: Any) -> RunConfig:
    tree = {"model": model, "text": {"length": LENGTH}, "data": {"resolution": SIDE}, "objective": objective}
    return RunConfig.model_validate(tree)


def counted(config: RunConfig, dtype: torch.dtype = torch.bfloat16) -> ImageCost:
    return image_cost(config, config.data.size, on_meta(config, TEXT_WIDTH, FEATURES), TEXT_WIDTH, dtype)


class RealNorm(torch.autograd.Function):
    """RMSNorm as one kernel that keeps its input and a number a row, which a CPU has none of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError


def inputs(config: RunConfig, samples: int, dtype: torch.dtype) -> list[Tensor]:
    """Of the training network."""
    given = [torch.randn(samples, 3, SIDE, SIDE), torch.rand(samples)]
    if config.model.condition == "text":
        return [*given, torch.randn(samples, LENGTH, TEXT_WIDTH).to(dtype)]
    keys = [torch.randint(0, 2**62, (samples,))] if config.model.dropout else []
    return [*given, torch.zeros(samples, dtype=torch.long), *keys]


def measured(config: RunConfig, network: TrainingNetwork, samples: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of real tensors, with the CPU's fused attention."""

    def run() -> Tensor:
        _, projected = network(*inputs(config, samples, dtype))
        assert projected is not None
        return cosine_distance(projected, torch.randn(samples, projected.shape[1], FEATURES))

    with (
        mock.patch.object(transformer, "attention", lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v)),
        mock.patch.object(pixeldit, "attention", lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v)),
        mock.patch.object(F, "rms_norm", lambda x, shape, weight, eps: RealNorm.apply(x, weight, eps)),
    ):
        return saved_bytes(run, network)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_what_is_kept_is_what_autograd_keeps(model: dict[str, Any], dtype: torch.dtype) -> None:
    config = config_of(model)
    network = TrainingNetwork(
        build_denoiser(config.model, TEXT_WIDTH, LENGTH), build_projector(config.model, FEATURES)
    ).to(dtype)
    cost = counted(config, dtype)
    expected = cost.outside + sum(block.kept for block in cost.blocks)
    three = measured(config, network, 3, dtype)
    # Tables, and weights that are cast, are there once.
    assert expected == three - measured(config, network, 2, dtype)
    assert 3 * expected == pytest.approx(three, rel=0.01)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_flops_by_part_are_those_of_the_metrics(model: dict[str, Any]) -> None:
    config = config_of(model)
    cost = counted(config)
    assert 3 * cost.denoiser_flops == denoiser_training_flops(config, TEXT_WIDTH)
    ends = cost.flops["embeddings and head"]
    assert cost.denoiser_flops - ends == sum(block.flops for block in cost.blocks) == cost.recomputed_flops(True)
    assert 0 < ends < 0.1 * cost.denoiser_flops
    assert cost.recomputed_flops("pixel") == cost.flops["pixel blocks"]


def test_the_text_stream_is_the_texts_matrices() -> None:
    config = config_of(MODELS["pixeldit"])
    d, hidden, blocks = 128, 8 * 128 // 3, config.model.depth - 1
    # Queries, keys, values, result and MLP of each token, adaLN of each sample; the last block has but keys and values.
    tokens = blocks * (4 * d**2 + 3 * d * hidden) + 2 * d**2
    assert counted(config).flops["text blocks"] == 2 * (LENGTH * tokens + (6 * blocks + 2) * d**2)


@pytest.mark.parametrize("name", ["pixelgen", "pixeldit"])
def test_checkpointing_keeps_what_a_block_alone_is_given(name: str) -> None:
    cost, tokens, width = counted(config_of(MODELS[name])), (SIDE // 4) ** 2, 128
    with_text = {"pixelgen": [0, 0, 0], "pixeldit": [LENGTH] * 3}[name]
    images = [block for block in cost.blocks if block.part == "image blocks"]
    assert [block.given for block in images] == [2 * width * (tokens + text) for text in with_text]
    pixels = [block for block in cost.blocks if block.part == "pixel blocks"]
    assert all(block.given == 2 * 16 * SIDE**2 < block.kept / 10 for block in pixels)
    for part in ("image blocks", "text blocks", "pixel blocks"):
        plain, pixel, whole = (cost.kept(part, item) for item in (False, "pixel", True))
        assert pixel == (whole if part == "pixel blocks" else plain)
    assert cost.recomputed_bytes(False) == 0
    assert cost.recomputed_bytes("pixel") == max((block.kept for block in pixels), default=0)
    assert cost.recomputed_bytes(True) == max(block.kept for block in cost.blocks)


def test_what_is_kept_is_booked_to_the_block_that_runs() -> None:
    first, second = torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)
    net = torch.nn.Sequential(first, torch.nn.Tanh(), second)
    with SavedTensors(net, [first, second]) as kept:
        net(torch.randn(2, 4))
    assert [sum(block.values()) for block in kept.of_block] == [4 * 2 * 4, 0]  # tanh keeps what the second is given
    assert [sum(block.values()) for block in kept.given] == [4 * 2 * 4, 4 * 2 * 5]
    assert sum(kept.outside.values()) == 4 * 2 * 5
    with SavedTensors(net, [first, second]) as again, torch.no_grad():
        net(torch.randn(2, 4))
    assert not again.outside and sum(kept.outside.values()) == 4 * 2 * 5
