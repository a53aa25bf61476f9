"""The work of PixelDiT-XL for one image: Table 16 of the paper, all nine entries, and the ablations of Table 6.

A multiplication with an addition counts as two; matrices and attention count, norms and activations do not. The paper
cuts digits off, it does not round.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from t2i.build import build_denoiser
from t2i.config.run import ModelConfig

XL = {"width": 1152, "depth": 26, "heads": 16}
T2I = {"width": 1536, "depth": 14, "heads": 24}


def flops(side: int, pixel: dict[str, Any] | None = None, **model: Any) -> int:
    """Of one forward pass for one square image."""
    sizes: dict[str, Any] = {"condition": "class", **XL, "repa_layer": 1, **model}
    config = ModelConfig(family="pixeldit", prediction="velocity", pixel=pixel or {}, **sizes)
    with torch.device("meta"), torch.no_grad():
        network = build_denoiser(config, 2304, 300)
        condition = torch.empty(1, 300, 2304) if config.condition == "text" else torch.empty(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, side, side), torch.empty(1), condition)
    return counter.get_total_flops()


def cut(value: int, digits: int) -> str:
    """In billions, with so many digits behind the point, the rest cut off."""
    whole = math.floor(value / 10 ** (9 - digits))
    return f"{whole / 10**digits:.{digits}f}"


TABLE_16 = {
    (8, 256): "1115.69",
    (8, 512): "6200.99",
    (8, 1024): "52634.10",
    (16, 256): "311.19",
    (16, 512): "1352.24",
    (16, 1024): "7147.17",
    (32, 256): "135.54",
    (32, 512): "547.74",
    (32, 1024): "2298.42",
}


@pytest.mark.parametrize(("patch", "side"), TABLE_16)
def test_table_16(patch: int, side: int) -> None:
    assert cut(flops(side, patch_size=patch), 2) == TABLE_16[patch, side]


@pytest.mark.parametrize(
    ("pixel", "billions"),
    [({}, "311.194"), ({"attention": False}, "279.787"), ({"tokens_per_patch": 256}, "82247.090")],
    ids=["compaction", "no pixel attention", "no compaction"],
)
def test_table_6(pixel: dict[str, Any], billions: str) -> None:
    """311, 279 and 82247 there."""
    assert cut(flops(256, pixel), 3) == billions


@pytest.mark.parametrize(
    ("model", "billions"),
    [({"width": 768, "depth": 12, "heads": 12, "pixel": {"depth": 2}}, "75.4")]
    + [({"width": 1024, "depth": 22, "heads": 16}, "227.7")],
    ids=["B", "L"],
)
def test_the_smaller_networks(model: dict[str, Any], billions: str) -> None:
    assert cut(flops(256, **model), 1) == billions


@pytest.mark.parametrize(("side", "billions"), [(256, "525.7"), (512, "1432.5"), (1024, "6183.1")])
def test_from_text_the_last_blocks_text_is_saved(side: int, billions: str) -> None:
    """The public network computes the whole of it: queries, what they see, a projection, an MLP and adaLN for it."""
    pixel, width = {"depth": 2, "attention_width": 1152, "attention_heads": 16}, T2I["width"]
    ours = flops(side, pixel, condition="text", **T2I)
    seen = 4 * 300 * (300 + (side // 16) ** 2) * width
    matrices = 2 * 300 * (2 * width**2 + 3 * width * 4096)
    assert cut(ours + seen + matrices + 2 * 4 * width**2, 1) == billions
