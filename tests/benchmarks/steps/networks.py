"""Frozen networks of any size with random weights, in the folders that training loads them from: their cost, not their
results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, Dinov2Config, PreTrainedTokenizerFast, Qwen3Config

from data.packing import shapes
from t2i.plan.counts import KNOWN_FEATURES, KNOWN_TEXT

QWEN3_1B7 = {name: value for name, value in KNOWN_TEXT["Qwen/Qwen3-1.7B"].items() if name != "model_type"} | {
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
DINOV2_B = KNOWN_FEATURES["facebook/dinov2-base"] | {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}

VOCABULARY_SCENES = 2000
"""Drawn scenes whose captions the tokeniser knows all words of."""


def _once(cache: Path, name: str, settings: dict[str, Any], write: Callable[[Path], object]) -> Path:
    """What `write` makes of these settings, unless it is there; never half of it."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    path = cache / f"{name}-{digest}"
    if not path.exists():
        partial = path.with_name(f".{path.name}.partial")
        cache.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        write(partial)
        partial.rename(path)
    return path


def qwen(cache: Path, settings: dict[str, Any]) -> Path:
    """A folder with a Qwen3 in bf16, and a tokeniser of the scenes' words."""
    captions = [shapes.scene(0, number).caption for number in range(VOCABULARY_SCENES)]
    words = ["<pad>", "<eos>", "<unk>", *sorted({word for caption in captions for word in caption.split()})]

    def write(partial: Path) -> None:
        tokens = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
        tokens.pre_tokenizer = Whitespace()
        special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(partial)
        AutoModel.from_config(Qwen3Config(**settings), dtype=torch.bfloat16).save_pretrained(partial)

    return _once(cache, "qwen3", {**settings, "words": words}, write)


def dinov2(cache: Path, settings: dict[str, Any]) -> Path:
    """A folder with a DINOv2 in fp32."""

    def write(partial: Path) -> None:
        AutoModel.from_config(Dinov2Config(**settings)).save_pretrained(partial)

    return _once(cache, "dinov2", settings, write)


def vgg16(cache: Path) -> Path:
    """A file with VGG16's convolutions; LPIPS takes no more."""

    def write(partial: Path) -> None:
        weights = torchvision.models.vgg16().features.state_dict()
        torch.save({f"features.{name}": value for name, value in weights.items()}, partial)

    return _once(cache, "vgg16", {}, write)
