"""Compiled blocks compute what eager ones do, forward and backward, at more than one resolution."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from data.filters import sdxl_sizes
from t2i.build import build_denoiser
from t2i.config.run import ModelConfig


def outcome(network: torch.nn.Module, side: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(side)
    image = torch.randn(2, 3, side, side, generator=generator)
    text = torch.randn(2, 6, 16, generator=generator)
    text[1, 2:] = 0  # pads, if they are masked
    network.zero_grad()
    predicted = network(image, torch.tensor([0.2, 0.7]), text).output
    (predicted * torch.randn(predicted.shape, generator=generator)).sum().backward()
    return [predicted.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize("text_padding", ["attend", "mask"])
def test_compiled_blocks_agree_with_eager_ones(text_padding: Literal["attend", "mask"]) -> None:
    config = ModelConfig(
        width=32, depth=2, heads=2, text_depth=1, patch_size=4, bottleneck=8, repa_layer=1, text_padding=text_padding
    )
    torch.manual_seed(0)
    eager = build_denoiser(config, text_width=16, text_length=6)
    for parameter in eager.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    compiled = copy.deepcopy(eager)
    for block in (*compiled.text_blocks, *compiled.blocks):
        block.compile(fullgraph=True)
    for side in (16, 24):
        found, expected = outcome(compiled, side), outcome(eager, side)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_sizes_of_a_table_of_buckets_are_a_few_graphs() -> None:
    config = ModelConfig(width=32, depth=2, heads=2, text_depth=1, patch_size=2, bottleneck=8, repa_layer=1)
    network, graphs = build_denoiser(config, text_width=16, text_length=6), CompileCounter()
    for block in (*network.text_blocks, *network.blocks):
        block.compile(backend=graphs, fullgraph=True)  # which raises where the compiler would give up
    for height, width in sdxl_sizes(32):
        image, text = torch.randn(2, 3, height, width), torch.randn(2, 6, 16)
        assert network(image, torch.tensor([0.2, 0.7]), text).output.shape == image.shape
    assert graphs.frame_count <= 2 * 3  # with one number of tokens, and with any
