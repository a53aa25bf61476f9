"""PixelGen against an independent plain implementation, its parameter count and its zero-initialisation.

The reference below follows the published description only: complex-number rotary embedding, unfold and fold,
PyTorch's fused attention, MAE's position table in numpy. It shares no line with the model, only its weights.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_weights import randomise
from torch import Tensor

from t2i.config.run import ModelConfig
from t2i.models.layers import RMSNorm, attention, patchify, rope_table, rotate, sincos_table, unpatchify
from t2i.models.pixelgen import PixelGen
from t2i.train.build import build_denoiser

WIDTH, HEADS, PATCH, TEXT_WIDTH, TEXT_LENGTH = 32, 2, 4, 12, 5
CPU = torch.device("cpu")


def tiny(**changes: int) -> PixelGen:
    sizes = {"width": WIDTH, "depth": 3, "heads": HEADS, "text_depth": 2, "bottleneck": 10, "repa_layer": 2}
    torch.manual_seed(0)
    return PixelGen(text_width=TEXT_WIDTH, text_length=TEXT_LENGTH, patch_size=PATCH, **{**sizes, **changes})


def randomised(**changes: int) -> PixelGen:
    """All weights random and of a size at which every part matters, none left at zero or one."""
    model = tiny(**changes)
    randomise(model)
    return model


def inputs(rows: int, columns: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(batch, 3, rows * PATCH, columns * PATCH)
    return x, torch.linspace(0.1, 0.9, batch), torch.randn(batch, TEXT_LENGTH, TEXT_WIDTH)


# The reference


def mae_table(rows: int, columns: int, width: int) -> np.ndarray:
    """As in MAE's pos_embed.py: the column first, and in each half sines before cosines."""
    table = np.zeros((rows * columns, width))
    quarter = width // 4
    for n in range(rows * columns):
        for start, position in ((0, n % columns), (width // 2, n // columns)):
            for k in range(quarter):
                angle = position / 10000 ** (k / quarter)
                table[n, start + k], table[n, start + quarter + k] = np.sin(angle), np.cos(angle)
    return table


def complex_rope(x_BHNK: Tensor, rows: int, columns: int) -> Tensor:
    width = x_BHNK.shape[-1]
    turns = torch.zeros(rows * columns, width // 2, dtype=torch.complex128)
    xs, ys = np.linspace(0, columns, columns), np.linspace(0, rows, rows)
    for n in range(rows * columns):
        for k in range(width // 4):
            frequency = 10000.0 ** (-4 * k / width)
            turns[n, 2 * k] = np.exp(1j * xs[n % columns] * frequency)
            turns[n, 2 * k + 1] = np.exp(1j * ys[n // columns] * frequency)
    pairs = torch.view_as_complex(x_BHNK.double().reshape(*x_BHNK.shape[:-1], width // 2, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x_BHNK.dtype)


def reference(
    w: dict[str, Tensor], x: Tensor, t: Tensor, text: Tensor, depth: int, text_depth: int
) -> tuple[Tensor, list[Tensor]]:
    """The image, and the output of every block."""
    rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH

    def rms(h: Tensor, name: str) -> Tensor:
        return h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-6) * w[name]

    def heads(h: Tensor) -> Tensor:
        return h.reshape(h.shape[0], h.shape[1], HEADS, -1).transpose(1, 2)

    def block(h: Tensor, name: str, context: Tensor | None) -> Tensor:
        adaln = condition @ w[f"{name}.adaln.weight"].T + w[f"{name}.adaln.bias"]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = adaln[:, None].split(WIDTH, dim=-1)
        m = rms(h, f"{name}.norm1.weight") * (1 + scale_msa) + shift_msa
        q, k, v = (heads(m @ part.T) for part in w[f"{name}.attn.qkv.weight"].split(WIDTH))
        q, k = rms(q, f"{name}.attn.q_norm.weight"), rms(k, f"{name}.attn.k_norm.weight")
        if context is not None:
            q, k = complex_rope(q, rows, columns), complex_rope(k, rows, columns)
            text_k, text_v = (heads(context @ p.T) for p in w[f"{name}.attn.context_kv.weight"].split(WIDTH))
            k = torch.cat([k, rms(text_k, f"{name}.attn.k_norm.weight")], dim=2)
            v = torch.cat([v, text_v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        h = h + gate_msa * (mixed @ w[f"{name}.attn.out.weight"].T + w[f"{name}.attn.out.bias"])
        m = rms(h, f"{name}.norm2.weight") * (1 + scale_mlp) + shift_mlp
        gate, up = (m @ part.T for part in w[f"{name}.mlp.gate_up.weight"].split(4 * WIDTH))
        return h + gate_mlp * ((gate * torch.sigmoid(gate) * up) @ w[f"{name}.mlp.down.weight"].T)

    frequencies = torch.tensor([10.0 ** (-k / 128) for k in range(128)])
    waves = torch.cat([torch.cos(t[:, None] * frequencies), torch.sin(t[:, None] * frequencies)], dim=1)
    hidden = F.silu(waves @ w["time.mlp.0.weight"].T + w["time.mlp.0.bias"])
    condition = F.silu(hidden @ w["time.mlp.2.weight"].T + w["time.mlp.2.bias"])

    text = rms(text @ w["text_in.weight"].T + w["text_in.bias"], "text_norm.weight") + w["text_position"]
    for n in range(text_depth):
        text = block(text, f"text_blocks.{n}", None)

    h = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2) @ w["patch_down.weight"].T
    h = h @ w["patch_up.weight"].T + w["patch_up.bias"]
    h = h + torch.from_numpy(mae_table(rows, columns, WIDTH)).float()
    outputs = []
    for n in range(depth):
        h = block(h, f"blocks.{n}", text)
        outputs.append(h)

    centred = h - h.mean(-1, keepdim=True)
    h = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)
    pixels = h @ w["head.weight"].T + w["head.bias"]
    return F.fold(pixels.transpose(1, 2), x.shape[2:], PATCH, stride=PATCH), outputs


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5), (2, 6)])
def test_forward_and_gradients_equal_the_reference(rows: int, columns: int) -> None:
    model = randomised()
    (x, t, text), weighting = inputs(rows, columns), torch.randn(2, 3, rows * PATCH, columns * PATCH)
    results = []
    for compute in (
        lambda *args: model(*args).output,
        lambda *args: reference(dict(model.named_parameters()), *args, depth=3, text_depth=2)[0],
    ):
        leaves = [v.clone().requires_grad_() for v in (x, t, text)]
        image = compute(*leaves)
        wanted = [*leaves, *model.parameters()]
        results.append((image, torch.autograd.grad((image * weighting).mean(), wanted)))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for ours_, theirs_ in zip(our_gradients, their_gradients, strict=True):
        assert theirs_.abs().max() > 0
        torch.testing.assert_close(ours_, theirs_, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_features_are_the_output_of_block_number_repa_layer(layer: int) -> None:
    model = randomised(repa_layer=layer)
    outputs = reference(dict(model.named_parameters()), *inputs(3, 3), depth=3, text_depth=2)[1]
    torch.testing.assert_close(model(*inputs(3, 3)).features, outputs[layer - 1], atol=1e-5, rtol=1e-5)


def test_every_text_token_and_every_pixel_is_read() -> None:
    model, (x, t, text) = randomised(), inputs(3, 3, batch=1)
    x.requires_grad_()
    text.requires_grad_()
    model(x, t, text).output.square().sum().backward()
    assert x.grad.abs().min() > 0 and text.grad.abs().sum(-1).min() > 0


# Parameters and initialisation


def test_xxl_has_the_papers_number_of_parameters_at_every_size() -> None:
    with torch.device("meta"):
        model = build_denoiser(ModelConfig(), text_width=2048, text_length=128)
        for height, width in ((256, 256), (512, 512), (256, 512)):
            prediction = model(torch.empty(1, 3, height, width), torch.empty(1), torch.empty(1, 128, 2048))
            assert prediction.output.shape == (1, 3, height, width)
            assert prediction.features.shape == (1, height * width // 256, 1536)
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_121_739_520
            assert sum(v.numel() for v in model.state_dict().values()) == 1_121_739_520
    assert set(model.state_dict()) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("part", "count"), [("blocks.0", 56_637_056), ("text_blocks.0", 51_918_464), ("time", 2_755_584)]
)
def test_parameters_of_the_xxl_parts(part: str, count: int) -> None:
    with torch.device("meta"):
        model = build_denoiser(ModelConfig(), text_width=2048, text_length=128)
    assert sum(p.numel() for p in model.get_submodule(part).parameters()) == count


def test_output_is_exactly_zero_at_init_and_only_the_head_learns() -> None:
    model, (x, t, text) = tiny(), inputs(4, 4)
    image = model(10 * x, t, text).output
    assert torch.equal(image, torch.zeros_like(x))
    (image - torch.randn_like(image)).square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning == {"head.weight", "head.bias"}


def test_blocks_are_identities_at_init() -> None:
    model, (x, t, text) = tiny(), inputs(4, 4)
    embedded = model.patch_up(model.patch_down(patchify(x, PATCH))) + sincos_table(4, 4, WIDTH, CPU)
    assert torch.equal(model(x, t, text).features, embedded)


def test_a_model_of_one_size_keeps_its_weights_at_twice_the_size() -> None:
    small = randomised()
    small(*inputs(4, 4))
    large = randomised()
    large.load_state_dict(small.state_dict(), strict=True)
    x, t, text = inputs(8, 8)
    expected, _ = reference(dict(small.named_parameters()), x, t, text, depth=3, text_depth=2)
    torch.testing.assert_close(large(x, t, text).output, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(large(x, t, text).output, small(x, t, text).output)


def test_a_bf16_model_predicts_in_fp32() -> None:
    model, (x, t, text) = randomised(), inputs(4, 4)
    exact = model(x, t, text).output
    prediction = model.bfloat16()(x, t, text)
    assert prediction.output.dtype == torch.float32 and prediction.features.dtype == torch.bfloat16
    # A bf16 head would leave values that bf16 can hold.
    assert not torch.equal(prediction.output, prediction.output.bfloat16().float())
    assert (prediction.output - exact).square().mean().sqrt() < 0.05 * exact.std()


# Layers


@pytest.mark.parametrize("keys", [7, 12])
def test_attention_equals_the_fused_kernel(keys: int) -> None:
    torch.manual_seed(0)
    q = 5 * torch.randn(2, 3, 7, 16)
    k, v = 5 * torch.randn(2, 2, 3, keys, 16)
    results = []
    for function in (attention, F.scaled_dot_product_attention):
        leaves = [a.clone().requires_grad_() for a in (q, k, v)]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad((out * torch.arange(16.0)).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)


def test_masked_keys_have_no_share_in_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (7, 9, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    out = attention(q, k, v, mask)
    for n, keys in enumerate((9, 4)):
        expected = F.scaled_dot_product_attention(q[n], k[n, :, :keys], v[n, :, :keys])
        torch.testing.assert_close(out[n], expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((out * torch.arange(1.0, 17.0)).sum(), (k, v))
    assert all(not g[1, :, 4:].any() and (g[1, :, :4] != 0).all() and (g[0] != 0).all() for g in gradients)
    with torch.no_grad():
        k[1, :, 4:], v[1, :, 4:] = 100.0, -100.0
    assert torch.equal(attention(q, k, v, mask), out)


def test_attention_survives_scores_beyond_the_range_of_exp() -> None:
    q = torch.full((1, 1, 2, 16), 30.0)
    k = torch.cat([q, -q], dim=2)
    v = torch.randn(1, 1, 4, 16)
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_rotation_preserves_norms_and_depends_on_relative_position() -> None:
    torch.manual_seed(0)
    rows, columns, width = 5, 7, 16
    cos, sin = rope_table(rows, columns, width, CPU)
    q, k = (torch.randn(width).expand(1, 1, rows * columns, width) for _ in range(2))
    turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    products = (turned_q[0, 0] @ turned_k[0, 0].T).reshape(rows, columns, rows, columns)
    torch.testing.assert_close(products[0, 0, 1, 2], products[3, 4, 4, 6])
    torch.testing.assert_close(products[2, 1, 0, 3], products[4, 4, 2, 6])
    assert abs(products[0, 0, 1, 2] - products[0, 0, 2, 1]) > 1e-3
    assert abs(products[0, 0, 1, 2] - products[1, 2, 0, 0]) > 1e-3


def test_rotation_is_the_complex_product_of_neighbouring_channels_and_so_is_its_gradient() -> None:
    torch.manual_seed(0)
    cos, sin = rope_table(3, 5, 16, CPU)
    angles = torch.complex(cos[:, 1::2], sin[:, 1::2])
    x = torch.randn(2, 3, 15, 16, requires_grad=True)
    gradient = torch.randn(2, 3, 15, 16)
    turned = rotate(x, cos, sin)
    turned.backward(gradient)
    pairs, gradient_pairs = (torch.view_as_complex(z.detach().unflatten(-1, (-1, 2))) for z in (x, gradient))
    torch.testing.assert_close(turned, torch.view_as_real(pairs * angles).flatten(-2), rtol=1e-6, atol=1e-6)
    assert x.grad is not None
    back = torch.view_as_real(gradient_pairs * angles.conj()).flatten(-2)
    torch.testing.assert_close(x.grad, back, rtol=1e-6, atol=1e-6)


def test_rope_positions_span_both_ends_and_grow_with_the_grid() -> None:
    cos, sin = (table[:, 1::2] for table in rope_table(16, 16, 64, CPU))  # of each pair's second channel
    angles = torch.atan2(sin.double(), cos.double())
    assert angles[1, 0].item() == pytest.approx(16 / 15) and angles[1, 1].item() == 0.0  # pairs go x, y, x, y
    assert angles[16, 0].item() == 0.0 and angles[16, 1].item() == pytest.approx(16 / 15)
    assert angles[1, 2].item() == pytest.approx(16 / 15 * 10000 ** (-4 / 64))
    assert angles[15, -2].item() == pytest.approx(16 * 10000 ** (-60 / 64))
    assert rope_table(32, 32, 64, CPU)[1][31, -3].item() == pytest.approx(math.sin(32 * 10000 ** (-60 / 64)))


def test_position_tables_are_made_once_for_a_grid_and_equal_the_references_on_squares() -> None:
    for rows, columns in ((4, 4), (2, 8), (8, 2)):
        assert sincos_table(rows, columns, 16, CPU) is sincos_table(rows, columns, 16, CPU)
        assert rope_table(rows, columns, 16, CPU) is rope_table(rows, columns, 16, CPU)
        np.testing.assert_array_equal(
            sincos_table(rows, columns, 16, CPU).numpy(), mae_table(rows, columns, 16).astype(np.float32)
        )
    # As many patches, other places.
    assert not torch.equal(sincos_table(2, 8, 16, CPU), sincos_table(8, 2, 16, CPU))
    assert not torch.equal(rope_table(2, 8, 16, CPU)[0], rope_table(8, 2, 16, CPU)[0])
    # The public code's fp32: angles of up to 32 are off by a few of its last bits.
    positions = torch.linspace(0, 32, 32)
    y, x = torch.meshgrid(positions, positions, indexing="ij")
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 64, 4).float() / 64)
    turns = torch.polar(
        torch.ones(1), torch.stack([torch.outer(v.flatten(), frequencies) for v in (x, y)], -1).flatten(1)
    )
    cos, sin = rope_table(32, 32, 64, CPU)
    torch.testing.assert_close(torch.complex(cos[:, 1::2], sin[:, 1::2]), turns, atol=5e-6, rtol=0)
    assert torch.equal(cos[:, 0::2], cos[:, 1::2]) and torch.equal(sin[:, 0::2], -sin[:, 1::2])


def test_patchify_is_unfold_and_has_an_inverse() -> None:
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(patchify(x, 4), F.unfold(x, 4, stride=4).transpose(1, 2))
    assert torch.equal(unpatchify(patchify(x, 4), 4, 8, 12), x)


def test_rms_norm_works_in_fp32() -> None:
    norm = RMSNorm(64)
    torch.nn.init.normal_(norm.weight)
    x = 1000 * torch.randn(3, 64)
    expected = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    half = norm.bfloat16()(x.bfloat16())
    exact = x.bfloat16().float() / x.bfloat16().float().square().mean(-1, keepdim=True).sqrt() * norm.weight.float()
    assert torch.equal(half, exact.bfloat16())
    torch.testing.assert_close(RMSNorm(4)(torch.full((1, 4), 1e-3)), torch.full((1, 4), 1 / math.sqrt(2)))
