"""Frozen networks of any size with random weights, in the folders that training loads them from: their cost, not their
results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, Dinov2Config, PreTrainedTokenizerFast, Qwen3Config

QWEN3_1B7 = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
DINOV2_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 518, "patch_size": 14}


def _once(path: Path, write: Callable[[Path], object]) -> Path:
    """What `write` makes at a path, unless it is there; never half of it."""
    if not path.exists():
        partial = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        write(partial)
        partial.rename(path)
    return path


def qwen(folder: Path, settings: dict[str, Any], captions: Iterable[str]) -> Path:
    """A Qwen3 in bf16, and a tokeniser that knows the words of these captions."""
    words = ["<pad>", "<eos>", "<unk>", *sorted({word for caption in captions for word in caption.split()})]

    def write(partial: Path) -> None:
        tokens = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
        tokens.pre_tokenizer = Whitespace()
        special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(partial)
        AutoModel.from_config(Qwen3Config(**settings), dtype=torch.bfloat16).save_pretrained(partial)

    return _once(folder, write)


def dinov2(folder: Path, settings: dict[str, Any]) -> Path:
    """A DINOv2 in fp32."""
    return _once(folder, lambda partial: AutoModel.from_config(Dinov2Config(**settings)).save_pretrained(partial))


def vgg16(path: Path) -> Path:
    """VGG16's convolutions; LPIPS takes no more."""

    def write(partial: Path) -> None:
        weights = torchvision.models.vgg16().features.state_dict()
        torch.save({f"features.{name}": value for name, value in weights.items()}, partial)

    return _once(path, write)
