"""A tiny random Gemma 2 with a sentencepiece tokeniser trained like Gemma's, in a folder as transformers saves it."""

from __future__ import annotations

from pathlib import Path

import sentencepiece
import torch
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

_COLORS = ["red", "blue", "green", "yellow", "black", "white"]
_THINGS = ["circle", "square", "star", "cat", "dog", "apple", "street", "photo"]
_SENTENCES = [f"A {thing} of {color} things: two {other}s beside a {color} {thing}, at 12 o'clock."
              for color in _COLORS for thing in _THINGS for other in _THINGS]  # fmt: skip
INSTRUCTION = "Enhance the prompt of a picture.\n- Keep the colors and the things.\nUser Prompt: "


def save_gemma(folder: Path, width: int = 24) -> Path:
    """Write model and tokeniser, and beside them tokenizer.model, as it was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*_SENTENCES, *[INSTRUCTION.replace("\n", " ")] * 50]),
        model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=480, byte_fallback=True,
        split_digits=True, allow_whitespace_only_pieces=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
        eos_piece="<eos>", bos_piece="<bos>", user_defined_symbols=["<mask>"], num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    trained = GemmaTokenizer.convert_to_native_format(vocab_file=str(folder / "tokenizer.model"))
    tokenizer = GemmaTokenizer(**trained, add_bos_token=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # Weights so large that the attention's soft cap and a query's scale tell; the second layer sees all tokens.
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, initializer_range=0.7, attn_logit_softcapping=5.0,
    )  # fmt: skip
    Gemma2Model(config).save_pretrained(folder)
    return folder
