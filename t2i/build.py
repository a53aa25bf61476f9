"""From a config to the networks that training and sampling share."""

from __future__ import annotations

from pathlib import Path

import torch

from t2i.config import ModelConfig, RunConfig
from t2i.models.pixelgen import PixelGen
from t2i.models.text import TextEncoder


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type behind `engine.dtype`; auto is bf16 where the device computes in it quickly."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "amx_bf16" in flags or "avx512_bf16" in flags else torch.float32


def build_denoiser(config: ModelConfig, text_width: int, text_length: int) -> PixelGen:
    """The denoiser with fresh weights from torch's default generator."""
    return PixelGen(
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        text_width=text_width,
        text_length=text_length,
        text_depth=config.text_depth,
        patch_size=config.patch_size,
        bottleneck=config.bottleneck,
        repa_layer=config.repa_layer,
    )


def build_text(config: RunConfig, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The frozen text encoder on its device."""
    return TextEncoder(config.text.model, config.text.length, dtype, config.text.cache).to(device)
