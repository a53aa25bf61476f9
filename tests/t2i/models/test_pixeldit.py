"""Both PixelDiT networks: counts of the paper, initialisation, the order of pixels, and what every switch changes.

That they compute what the public networks do is tests/t2i/released/test_convert_pixeldit.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from random_weights import randomise
from torch import Tensor

from t2i.build import build_denoiser, build_projector
from t2i.config.run import ModelConfig
from t2i.models.pixeldit import ClassPixelDiT, PixelDiT

WIDTH, HEADS, PATCH, CLASSES, TEXT, TOKENS = 32, 2, 4, 5, 20, 6
T2I_PIXEL = {"depth": 2, "attention_width": 1152, "attention_heads": 16}
TINY_PIXEL = {"depth": 2, "width": 8}


def config(condition: str, **changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"patch_size": PATCH, "width": WIDTH, "depth": 3, "heads": HEADS, "repa_layer": 2}
    sizes |= {"classes": CLASSES} if condition == "class" else {}
    sizes |= {"condition": condition, "family": "pixeldit", "prediction": "velocity", "pixel": TINY_PIXEL}
    return ModelConfig(**{**sizes, **changes})


def fresh(condition: str, **changes: Any) -> PixelDiT | ClassPixelDiT:
    torch.manual_seed(0)
    model = build_denoiser(config(condition, **changes), TEXT, TOKENS)
    assert isinstance(model, PixelDiT | ClassPixelDiT)
    return model


def randomised(condition: str, **changes: Any) -> PixelDiT | ClassPixelDiT:
    model = fresh(condition, **changes)
    torch.manual_seed(0)
    randomise(model)
    return model


def inputs(condition: str, rows: int, columns: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(batch, 3, rows * PATCH, columns * PATCH)
    given = torch.randn(batch, TOKENS, TEXT) if condition == "text" else torch.arange(batch) % (CLASSES + 1)
    return x, torch.linspace(0.1, 0.9, batch), given


# Parameters

PUBLIC: dict[str, tuple[dict[str, Any], int]] = {
    "B": ({"width": 768, "depth": 12, "heads": 12, "pixel": {"depth": 2}}, 184_749_155),
    "L": ({"width": 1024, "depth": 22, "heads": 16, "pixel": {}}, 569_648_963),
    "XL": ({"width": 1152, "depth": 26, "heads": 16, "pixel": {}}, 797_383_203),
    "T2I": ({"width": 1536, "depth": 14, "heads": 24, "pixel": T2I_PIXEL, "repa_width": 2048}, 1_302_470_787),
}
TAIL = 33_039_424
"""Of the public T2I's last block, the text's part beyond keys and values."""


def public(size: str, **pixel: Any) -> tuple[ModelConfig, PixelDiT | ClassPixelDiT]:
    sizes = PUBLIC[size][0]
    condition = {"classes": 1000} if size != "T2I" else {}
    name = "class" if size != "T2I" else "text"
    model = config(name, **{**sizes, "pixel": {**sizes["pixel"], **pixel}, "patch_size": 16, **condition})
    with torch.device("meta"):
        network = build_denoiser(model, 2304, 300)
    assert isinstance(network, PixelDiT | ClassPixelDiT)
    return model, network


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", PUBLIC)
def test_parameters_are_the_papers_at_every_size(size: str) -> None:
    network = public(size)[1]
    assert count(network) + (TAIL if size == "T2I" else 0) == PUBLIC[size][1]
    with torch.device("meta"):
        for height, width in ((256, 256), (512, 256), (752, 1344)):
            given = torch.empty(1, 300, 2304) if size == "T2I" else torch.empty(1, dtype=torch.long)
            output, features = network(torch.empty(1, 3, height, width), torch.empty(1), given)
            assert output.shape == (1, 3, height, width)
            assert features.shape == (1, height * width // 256, PUBLIC[size][0]["width"])


@pytest.mark.parametrize(("size", "parameters"), [("XL", 759_601_699), ("T2I", 1_277_288_579 - TAIL)])
def test_parameters_under_post_modulation(size: str, parameters: int) -> None:
    assert count(public(size, post_modulation=True)[1]) == parameters


def test_parameters_of_the_parts() -> None:
    network = public("XL")[1]
    assert (count(network.blocks[0]), count(network.pixels.blocks[3])) == (23_898_384, 43_090_432)
    assert count(network.pixels.blocks[0].adaln) == 28_336_128
    assert count(network.pixels.norm) + count(network.pixels.head) == 67
    model, network = public("T2I")
    assert (count(network.blocks[12]), count(network.pixels.blocks[1])) == (84_962_560, 52_527_616)
    assert count(network.blocks[13]) == 84_962_560 - TAIL
    assert count(build_projector(model, 768)) == 8_917_760


# Initialisation


@pytest.mark.parametrize("condition", ["class", "text"])
def test_output_is_exactly_zero_at_init_and_only_the_head_learns(condition: str) -> None:
    model, (x, t, given) = fresh(condition), inputs(condition, 4, 3)
    output = model(10 * x, t, given).output
    assert torch.equal(output, torch.zeros_like(x))
    (output - torch.randn_like(output)).square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning == {"pixels.head.weight", "pixels.head.bias"}


def test_adaln_is_zero_for_classes_alone() -> None:
    for condition, zero in (("class", True), ("text", False)):
        found = {n: p for n, p in fresh(condition).named_parameters() if "adaln." in n}
        assert {n.partition(".")[0] for n in found} == {"blocks", "pixels"}
        assert all((not parameter.any()) == zero for parameter in found.values())


@pytest.mark.parametrize("condition", ["class", "text"])
def test_embeddings_begin_as_the_public_codes(condition: str) -> None:
    model = fresh(condition, width=256, heads=4).requires_grad_(False)
    bound = math.sqrt(6 / (256 + 3 * PATCH**2))
    assert model.patch_in.weight.abs().max() == pytest.approx(bound, rel=1e-2) and not model.patch_in.bias.any()
    assert model.time.mlp[0].weight.std() == pytest.approx(0.02, rel=0.05)
    assert model.time.mlp[2].weight.std() == pytest.approx(0.02, rel=0.05)
    if isinstance(model, ClassPixelDiT):
        assert model.label.weight.std() == pytest.approx(0.02, rel=0.1)
    else:
        assert model.text_position.std() == pytest.approx(1, rel=0.1)


# Switches

SWITCHES: dict[str, dict[str, Any]] = {
    "public": {},
    "2 tokens a patch": {"tokens_per_patch": 2},
    "4 tokens a patch": {"tokens_per_patch": 4},
    "no compaction": {"tokens_per_patch": 16},
    "no attention": {"attention": False},
    "attention of another width": {"attention_width": 24, "attention_heads": 3},
    "patch-wise": {"modulation": "patch"},
    "patch-wise, no attention": {"modulation": "patch", "attention": False},
    "patch-wise, post-modulation": {"modulation": "patch", "post_modulation": True},
    "additive": {"modulation": "additive"},
    "additive, 4 tokens a patch": {"modulation": "additive", "tokens_per_patch": 4},
    "post-modulation": {"post_modulation": True},
    "post-modulation, no attention": {"post_modulation": True, "attention": False},
}


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize("pixel", SWITCHES.values(), ids=SWITCHES)
def test_every_parameter_learns(condition: str, pixel: dict[str, Any]) -> None:
    """For a picture that is not square."""
    model, (x, t, given) = randomised(condition, pixel={**TINY_PIXEL, **pixel}), inputs(condition, 3, 5)
    output, features = model(x, t, given)
    assert output.shape == x.shape and features.shape == (2, 15, WIDTH)
    ((output * torch.randn_like(output)).mean()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


# Both networks


@pytest.mark.parametrize("condition", ["class", "text"])
def test_every_pixel_and_condition_is_read(condition: str) -> None:
    model, (x, t, given) = randomised(condition), inputs(condition, 3, 3, batch=1)
    x.requires_grad_()
    t.requires_grad_()
    if condition == "text":
        given.requires_grad_()
    model(x, t, given).output.square().sum().backward()
    assert x.grad.abs().min() > 0 and t.grad.abs().min() > 0
    if condition == "text":
        assert given.grad.abs().sum(-1).min() > 0
    else:
        outputs = [model(x, t, torch.tensor([label])).output for label in range(CLASSES + 1)]
        assert all((one - other).abs().max() > 1e-2 for one in outputs for other in outputs if one is not other)


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_features_are_the_patches_after_block_number_repa_layer(condition: str, layer: int) -> None:
    model, (x, t, given) = randomised(condition, repa_layer=layer), inputs(condition, 3, 3)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *made: seen.append(made[2] if condition == "class" else made[2][0]))
    assert torch.equal(model(x, t, given).features, seen[layer - 1])


@pytest.mark.parametrize("condition", ["class", "text"])
def test_a_bf16_model_predicts_in_fp32(condition: str) -> None:
    model, (x, t, given) = randomised(condition), inputs(condition, 4, 4)
    exact = model(x, t, given).output
    prediction = model.bfloat16()(x, t, given)
    assert prediction.output.dtype == torch.float32 and prediction.features.dtype == torch.bfloat16
    # A bf16 head would leave values that bf16 can hold.
    assert not torch.equal(prediction.output, prediction.output.bfloat16().float())
    assert (prediction.output - exact).square().mean().sqrt() < 0.1 * exact.std()


def test_masked_pads_are_as_if_there_were_none() -> None:
    model, attending = randomised("text", text_padding="mask"), randomised("text")
    x, t, text = inputs("text", 3, 3)
    padded = text.clone()
    padded[:, 4:] = 0
    outputs = [network(x, t, states).output for network in (model, attending) for states in (padded, text[:, :4])]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[1], outputs[3])  # without pads both are one network
    assert (outputs[2] - outputs[3]).abs().max() > 1e-2
    assert not torch.allclose(model(x, t, text).output, outputs[0])


def test_samples_have_their_own_pads() -> None:
    model, (x, t, text) = randomised("text", text_padding="mask"), inputs("text", 3, 3)
    text[1, 2:] = 0
    together = model(x, t, text).output
    for n, length in ((0, TOKENS), (1, 2)):
        alone = model(x[n : n + 1], t[n : n + 1], text[n : n + 1, :length]).output
        torch.testing.assert_close(alone, together[n : n + 1], atol=1e-5, rtol=1e-5)
