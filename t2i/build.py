"""From a config to the networks that training and sampling share: denoiser, projector, text encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.randomness import key
from t2i.config.run import ModelConfig, RunConfig
from t2i.diffusion.perceptual import PatchFeatures
from t2i.models.layers import Prediction, Projector
from t2i.models.pixel_pathway import PixelPathway
from t2i.models.pixeldit import ClassPixelDiT, PixelDiT
from t2i.models.pixelgen import ClassPixelGen, PixelGen
from t2i.models.text import ClassLabels, Conditioner, TextEncoder


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `engine.dtype`; auto is bf16 on devices that compute it fast, else fp32."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "amx_bf16" in flags or "avx512_bf16" in flags else torch.float32


Denoiser = PixelGen | ClassPixelGen | PixelDiT | ClassPixelDiT


def build_denoiser(config: ModelConfig, text_width: int, text_length: int) -> Denoiser:
    """The denoiser with fresh weights from torch's default generator. Networks of classes ignore the width E and the
    number of tokens L of a caption's states."""
    shared: dict[str, Any] = {
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "patch_size": config.patch_size,
        "repa_layer": config.repa_layer,
    }
    if config.condition == "class":
        shared["classes"] = config.classes
    else:
        shared |= {"text_width": text_width, "text_length": text_length, "text_padding": config.text_padding}
    if config.family == "pixeldit":
        pixels = PixelPathway(
            width=config.width,
            depth=config.pixel.depth,
            patch_size=config.patch_size,
            pixel_width=config.pixel.width,
            attention=config.pixel_attention if config.pixel.attention else None,
            cut=config.pixel.cut,
            modulation=config.pixel.modulation,
            post_modulation=config.pixel.post_modulation,
        )
        return (
            ClassPixelDiT(**shared, pixels=pixels) if config.condition == "class" else PixelDiT(**shared, pixels=pixels)
        )
    shared["bottleneck"] = config.bottleneck
    if config.condition == "text":
        return PixelGen(**shared, text_depth=config.text_depth)
    return ClassPixelGen(
        **shared,
        context_tokens=config.context_tokens,
        context_start=config.context_start,
        dropout=config.dropout,
    )


def build_projector(config: ModelConfig, target: int) -> Projector:
    """A fresh projector from the denoiser's features to an encoder of width `target`."""
    return Projector(config.width, config.repa_width or config.width, target)


class TrainingNetwork(nn.Module):
    """Everything that is trained: the denoiser and the REPA projector."""

    def __init__(self, denoiser: Denoiser, projector: Projector | None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.projector = projector

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in the order in which they run."""
        return self.denoiser.all_blocks

    def forward(self, x_t: Tensor, t: Tensor, *condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """The denoiser's output (B, 3, H, W) and projected features (B, N, width), None without a projector.

        `condition`: the captions' states or labels and, for a denoiser with dropout, its keys.
        """
        prediction: Prediction = self.denoiser(x_t, t, *condition)
        projected = self.projector(prediction.features) if self.projector is not None else None
        return prediction.output, projected


def build_network(config: RunConfig, text_width: int, features: PatchFeatures | None) -> TrainingNetwork:
    """The network to train, with weights that depend on the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "weights"))
        denoiser = build_denoiser(config.model, text_width, config.text.length)
        aligned = features is not None and config.objective.repa_weight > 0
        projector = build_projector(config.model, features.width) if aligned and features else None
    return TrainingNetwork(denoiser, projector)


def build_conditioner(
    config: RunConfig, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> Conditioner:
    """The frozen text encoder, perhaps compiled, or the class labels, on its device."""
    if config.model.condition == "class":
        return ClassLabels(config.model.classes, device)
    return build_text(config, device, dtype, compiled)


def build_text(config: RunConfig, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> TextEncoder:
    """The frozen text encoder on its device."""
    text, padding = config.text, config.model.text_padding
    return TextEncoder(
        text.model,
        text.length,
        dtype,
        text.cache,
        padding=padding,
        reload_every_step=text.reload_every_step,
        compiled=compiled,
        instruction=text.instruction,
    ).to(device)


def condition_identity(config: RunConfig) -> str:
    """The settings that captions' conditions depend on besides the text encoder's weights, in words; saved with the
    null caption, so that a run resumes only with the same."""
    if config.model.condition == "class":
        return f"model.classes {config.model.classes}"
    padding = " under model.text_padding mask" if config.model.text_padding == "mask" else ""
    digest = hashlib.sha256(config.text.instruction.encode()).hexdigest()[:12]
    instruction = f" after the text.instruction of SHA-256 {digest}..." if config.text.instruction else ""
    return f"text.length {config.text.length}{padding}{instruction}"
