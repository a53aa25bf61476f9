"""GenEval's networks with tiny random weights, as folders of transformers'."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

_LETTERS = "abcdefghijklmnopqrstuvwxyz-"


def save_mask2former(folder: Path, classes: int = 80) -> Path:
    """Write a network of 12 queries."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12,
        num_labels=classes,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def save_clip(folder: Path, activation: str = "quick_gelu") -> Path:
    """Write a CLIP of 32 x 32 pictures whose tokens are letters."""
    vocabulary = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({token: n for n, token in enumerate(vocabulary)}, [])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    common = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "initializer_factor": 10.0,  # else all sentences are alike
    }  # fmt: skip
    text = {
        "vocab_size": len(vocabulary), "max_position_embeddings": 77, "hidden_act": activation,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {"image_size": 32, "patch_size": 8, "hidden_act": activation}
    config = CLIPConfig(text_config=common | text, vision_config=common | vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    return folder
