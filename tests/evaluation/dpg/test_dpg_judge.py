"""Judges of each kind, tiny and with random weights: what they answer is what the model says, called by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import save_blip, save_llava, save_vilt
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BlipForQuestionAnswering,
    LlavaForConditionalGeneration,
    ViltForQuestionAnswering,
)

from data.errors import UserError
from evaluation.dpg.judge import load

CPU = torch.device("cpu")
QUESTIONS = ("Is there a dog?", "Is the collar red?", "a cat?")
NOISE = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)) for seed in range(3)
]
PICTURES = [*NOISE, *(Image.new("RGB", (32, 32), color) for color in ("red", "blue", "white"))]


def answers(folder: Path) -> list[str]:
    judge = load(str(folder), CPU)
    assert judge.name == str(folder)
    return [judge.answer(picture, question) for picture in PICTURES for question in QUESTIONS]


@torch.no_grad()
def test_a_classifier(tmp_path: Path) -> None:
    folder = save_vilt(tmp_path / "vilt")
    model = ViltForQuestionAnswering.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    expected = []
    for picture in PICTURES:
        for question in QUESTIONS:
            torch.manual_seed(0)
            logits = model(**processor(picture, question, return_tensors="pt")).logits[0].tolist()
            expected.append(["yes", "no", "red"][logits.index(max(logits))])
    assert len(set(expected)) > 1
    assert answers(folder) == expected


def test_answers_depend_on_no_generator_and_disturb_none(tmp_path: Path) -> None:
    judge = load(str(save_vilt(tmp_path / "vilt")), CPU)  # sees 6 of the 16 patches, those that it draws
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [judge.answer(picture, question) for picture in PICTURES for question in QUESTIONS]
    assert torch.equal(torch.get_rng_state(), state)
    for seed in range(8):
        torch.manual_seed(seed)
        assert [judge.answer(picture, question) for picture in PICTURES for question in QUESTIONS] == first


@torch.no_grad()
def test_a_model_that_writes(tmp_path: Path) -> None:
    folder = save_blip(tmp_path / "blip")
    model, processor = BlipForQuestionAnswering.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    expected = []
    for picture in PICTURES:
        for question in QUESTIONS:
            inputs = processor(picture, question, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=10)
            expected.append(processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    assert len(set(expected)) > 3
    assert answers(folder) == expected


@torch.no_grad()
def test_a_chat_model(tmp_path: Path) -> None:
    folder = save_llava(tmp_path / "llava")
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor, tokenizer = AutoProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    for picture in PICTURES:
        for question in QUESTIONS:
            words = f"<image> {question} Answer with yes or no. <assistant>"
            inputs = processor(images=picture, text=words, return_tensors="pt")
            ids = inputs["input_ids"]
            for _ in range(10):  # greedy, without a cache
                logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
                logits[..., tokenizer.convert_tokens_to_ids("<image>")] = -torch.inf  # as its settings say
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
            written = ids[0, inputs["input_ids"].shape[1] :]
            expected.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    assert len(set(expected)) > 3
    assert answers(folder) == expected


def test_the_hash_is_of_the_weights(tmp_path: Path) -> None:
    folder, copy = save_vilt(tmp_path / "vilt"), save_vilt(tmp_path / "copy")
    digest = load(str(folder), CPU).weights_blake2b
    assert load(str(copy), CPU).weights_blake2b == digest
    model = ViltForQuestionAnswering.from_pretrained(copy)
    with torch.no_grad():
        model.classifier[-1].bias[0] += 1e-6
    model.save_pretrained(copy)
    changed = load(str(copy), CPU).weights_blake2b
    assert changed != digest
    model.to(torch.bfloat16).save_pretrained(copy)
    assert load(str(copy), CPU).weights_blake2b not in (digest, changed)


def test_what_is_no_judge(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--judge .*nothing cannot be loaded: "):
        load(str(tmp_path / "nothing"), CPU)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"--judge .* \(BertConfig\) is no model that answers questions about im"):
        load(str(tmp_path), CPU)
