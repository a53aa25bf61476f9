"""A tiny random Qwen3 whose tokeniser, like the real one's, makes no token of an empty caption."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

_WORDS = ["<pad>", "<eos>", "<unk>", "a", "photo", "of", "red", "circle", "green", "apple", "dog"]


def save_qwen(folder: Path, width: int = 20) -> Path:
    """Write model and tokeniser; the states are `width` wide."""
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(_WORDS), hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, eos_token_id=1,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(folder)
    return folder
