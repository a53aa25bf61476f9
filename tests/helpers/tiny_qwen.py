"""A tiny random Qwen3 whose tokeniser, like the real one's, makes no token of an empty caption."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3Model
from word_tokenizer import save_tokenizer

_WORDS = ["a", "photo", "of", "red", "circle", "green", "apple", "dog"]


def save_qwen(folder: Path, width: int = 20, seed: int = 0) -> Path:
    """Write model and tokeniser; the states are `width` wide."""
    tokenizer = save_tokenizer(folder, _WORDS)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(folder)
    return folder
