"""The class-conditional PixelGen against an independent plain implementation, its parameter count and its dropout.

The reference below follows the published description only: complex-number rotary embedding, unfold and fold,
PyTorch's fused attention and RMSNorm, explicit dropout masks. It shares with the model its weights, and the hash that
makes the masks, which tests/t2i/models/test_dropout.py checks.
"""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_weights import randomise
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t2i.build import build_denoiser
from t2i.config.run import ModelConfig
from t2i.models.layers import axial_rope_table, derive, keep_mask
from t2i.models.pixelgen import ClassPixelGen

WIDTH, HEADS, PATCH, CLASSES, CONTEXT, RATE = 32, 2, 4, 5, 3, 0.25
MIDDLE = {4: (1, 2), 6: (1, 2)}
"""Blocks that drop, by depth: from depth // 4 up to, not including, 3 (depth // 4)."""


def tiny(**changes: float) -> ClassPixelGen:
    sizes = {"width": WIDTH, "depth": 4, "heads": HEADS, "classes": CLASSES, "bottleneck": 10, "repa_layer": 2}
    sizes |= {"context_tokens": CONTEXT, "context_start": 2, "dropout": RATE, "patch_size": PATCH}
    torch.manual_seed(0)
    return ClassPixelGen(**{**sizes, **changes})


def randomised(**changes: float) -> ClassPixelGen:
    """All weights random and of a size at which every part matters, none left at zero or one."""
    model = tiny(**changes)
    randomise(model)
    return model


def inputs(rows: int, columns: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(batch, 3, rows * PATCH, columns * PATCH)
    return x, torch.linspace(0.1, 0.9, batch), torch.arange(batch) % (CLASSES + 1)


def keys(batch: int) -> Tensor:
    return torch.randint(0, 2**62, (batch,), generator=torch.Generator().manual_seed(2))


# The reference


def mae_table(rows: int, columns: int) -> Tensor:
    quarter, table = WIDTH // 4, np.zeros((rows * columns, WIDTH), np.float32)
    for n in range(rows * columns):
        for start, position in ((0, n % columns), (WIDTH // 2, n // columns)):
            for k in range(quarter):
                angle = position / 10000 ** (k / quarter)
                table[n, start + k], table[n, start + quarter + k] = np.sin(angle), np.cos(angle)
    return torch.from_numpy(table)


def complex_rope(x_BHNK: Tensor, rows: int, columns: int) -> Tensor:
    """Turns the last rows x columns tokens: first half of the pairs by row, second by column."""
    pairs, unturned = x_BHNK.shape[-1] // 2, x_BHNK.shape[2] - rows * columns
    turns = torch.ones(x_BHNK.shape[2], pairs, dtype=torch.complex128)
    for n in range(rows * columns):
        for k in range(pairs // 2):
            frequency = 10000.0 ** (-2 * k / pairs)
            turns[unturned + n, k] = np.exp(1j * (n // columns) * frequency)
            turns[unturned + n, pairs // 2 + k] = np.exp(1j * (n % columns) * frequency)
    values = torch.view_as_complex(x_BHNK.double().reshape(*x_BHNK.shape[:-1], pairs, 2))
    return torch.view_as_real(values * turns).flatten(-2).to(x_BHNK.dtype)


def reference(
    w: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor, *, start: int, depth: int, key: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The image, and the image tokens after every block."""
    rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH

    def linear(h: Tensor, name: str) -> Tensor:
        return F.linear(h, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def rms(h: Tensor, name: str) -> Tensor:
        return h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def drop(h: Tensor, n: int, place: int) -> Tensor:
        if key is None or n not in MIDDLE[depth]:
            return h
        mask = keep_mask(derive(derive(key, n), place), h.shape[1], h.shape[2], RATE)
        return h * mask / (1 - RATE)

    def block(h: Tensor, n: int) -> Tensor:
        name = f"blocks.{n}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(condition, f"{name}.adaln")[:, None].split(WIDTH, dim=-1)
        m = rms(h, f"{name}.norm1") * (1 + scale1) + shift1
        q, k, v = (
            part.reshape(*part.shape[:2], HEADS, -1).transpose(1, 2)
            for part in linear(m, f"{name}.attn.qkv").split(WIDTH, dim=-1)
        )
        q, k = (complex_rope(rms(z, f"{name}.attn.{c}_norm"), rows, columns) for z, c in ((q, "q"), (k, "k")))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        h = h + gate1 * drop(linear(mixed, f"{name}.attn.out"), n, 0)
        m = rms(h, f"{name}.norm2") * (1 + scale2) + shift2
        gate, up = linear(m, f"{name}.mlp.gate_up").chunk(2, dim=-1)
        return h + gate2 * linear(drop(gate * torch.sigmoid(gate) * up, n, 1), f"{name}.mlp.down")

    angles = t[:, None] * torch.tensor([10000.0 ** (-k / 128) for k in range(128)])
    hidden = F.silu(linear(torch.cat([angles.cos(), angles.sin()], dim=1), "time.mlp.0"))
    of_class = w["label.weight"][label]
    condition = F.silu(linear(hidden, "time.mlp.2") + of_class)

    h = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)
    h = linear(linear(h, "patch_down") if "patch_down.weight" in w else h, "patch_up") + mae_table(rows, columns)
    outputs = []
    for n in range(depth):
        if n == start:
            h = torch.cat([of_class[:, None].repeat(1, CONTEXT, 1) + w["context_position"], h], dim=1)
        h = block(h, n)
        outputs.append(h[:, -rows * columns :])
    shift, scale = linear(condition, "head_adaln")[:, None].split(WIDTH, dim=-1)
    pixels = linear(rms(outputs[-1], "head_norm") * (1 + scale) + shift, "head")
    return F.fold(pixels.transpose(1, 2), x.shape[2:], PATCH, stride=PATCH), outputs


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "bottleneck", "start", "depth"), [(4, 4, 10, 2, 4), (3, 5, 0, 0, 4), (2, 6, 10, 5, 6)]
)
def test_forward_and_gradients_equal_the_reference(
    rows: int, columns: int, bottleneck: int, start: int, depth: int, drops: bool
) -> None:
    model = randomised(bottleneck=bottleneck, context_start=start, depth=depth)
    x, t, label = inputs(rows, columns)
    key, weighting = keys(2) if drops else None, torch.randn(2, 3, rows * PATCH, columns * PATCH)
    weights = dict(model.named_parameters())
    ours = model(x, t, label, key).output
    theirs = reference(weights, x, t, label, start=start, depth=depth, key=key)[0]
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((image * weighting).mean(), [*weights.values()]) for image in (ours, theirs)]
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_features_are_the_image_tokens_after_block_number_repa_layer(layer: int) -> None:
    model = randomised(repa_layer=layer)
    outputs = reference(dict(model.named_parameters()), *inputs(3, 3), start=2, depth=4)[1]
    torch.testing.assert_close(model(*inputs(3, 3)).features, outputs[layer - 1], atol=1e-5, rtol=1e-5)


# Parameters and initialisation

SIZES = {
    "L": ({"width": 1024, "depth": 24, "heads": 16, "bottleneck": 128}, 459_139_808),
    "XL": ({"width": 1152, "depth": 28, "heads": 16, "bottleneck": 0, "dropout": 0.1}, 676_994_112),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_papers(size: str) -> None:
    """459 M and 677 M with the fixed position table of 256 tokens, which the public code counts."""
    fields, count = SIZES[size]
    with torch.device("meta"):
        model = build_denoiser(ModelConfig(condition="class", **fields), 0, 0)
        prediction = model(torch.empty(1, 3, 256, 256), torch.empty(1), torch.empty(1, dtype=torch.long))
    assert prediction.output.shape == (1, 3, 256, 256) and prediction.features.shape == (1, 256, fields["width"])
    assert sum(p.numel() for p in model.parameters()) + 256 * fields["width"] == count


def test_xl_drops_in_the_middle_half() -> None:
    with torch.device("meta"):
        model = build_denoiser(ModelConfig(condition="class", **SIZES["XL"][0]), 0, 0)
    assert isinstance(model, ClassPixelGen) and list(model.dropping) == list(range(7, 21))


def test_output_is_exactly_zero_at_init_and_only_the_head_learns() -> None:
    model, (x, t, label) = tiny(), inputs(4, 4)
    image = model(10 * x, t, label).output
    assert torch.equal(image, torch.zeros_like(x))
    (image - torch.randn_like(image)).square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning == {"head.weight", "head.bias"}


# Dropout


def test_what_is_dropped_depends_on_the_samples_key_alone() -> None:
    model, (x, t, label), key = randomised(), inputs(3, 3, batch=4), keys(4)
    whole = model(x, t, label, key).output
    for part in (torch.tensor([2]), torch.tensor([3, 1])):
        torch.testing.assert_close(model(x[part], t[part], label[part], key[part]).output, whole[part])
    other = model(x, t, label, key.roll(1)).output
    assert (other - whole).abs().mean() > 1e-3
    assert not torch.allclose(model(x, t, label).output, whole)


def test_checkpointed_blocks_drop_the_same_again() -> None:
    plain, arguments = randomised(dropout=0.5), (*inputs(3, 3), keys(2))
    other = copy.deepcopy(plain)
    for block in other.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    outcomes = []
    for model in (plain, other):
        image = model(*arguments).output
        image.square().sum().backward()
        outcomes.append([image.detach(), *(p.grad for p in model.parameters())])
    for found, expected in zip(*outcomes, strict=True):
        assert torch.equal(found, expected)


def test_a_block_compiles_whole_and_drops_the_same() -> None:
    """Without code being made, which takes a minute for a block; test_dropout.py has it made for the masks."""
    block = randomised(dropout=0.5).blocks[1]
    torch.manual_seed(3)
    x, given, key = torch.randn(2, 9, WIDTH, requires_grad=True), torch.randn(2, 1, WIDTH), keys(2)
    rope = axial_rope_table(3, 3, WIDTH // HEADS, 0, torch.device("cpu"))
    outcomes = []
    for forward in (block.forward, torch.compile(block.forward, fullgraph=True, backend="aot_eager")):
        out = forward(x, given, rope, key)
        outcomes.append([out, *torch.autograd.grad(out.square().mean(), [x, *block.parameters()])])
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
