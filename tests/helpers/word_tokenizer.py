"""A tokenizer of a few words, for language models with random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def save_tokenizer(folder: Path, words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Write a tokeniser that knows these words, each once; like Qwen3's, it makes no token of an empty caption."""
    ids = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokens = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer
