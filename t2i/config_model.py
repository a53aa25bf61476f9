"""The part of the config that says which network is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from t2i.config_base import Section

_ONLY = {"class": ("text_depth", "text_padding"), "text": ("classes", "context_tokens", "context_start", "dropout")}
"""Fields that do nothing under a condition."""


class ModelConfig(Section):
    """The denoiser."""

    condition: Literal["text", "class"] = "text"
    """What is drawn: text takes a caption's states, class a number below `classes`, which is a sample's caption."""
    patch_size: int = Field(16, gt=0)
    """Side of a square patch, in pixels; the resolution is a multiple of it."""
    width: int = Field(1536, gt=0)
    """Width D of the transformer; a multiple of 4 and of heads."""
    depth: int = Field(16, gt=0)
    """Image blocks."""
    heads: int = Field(24, gt=0)
    """Attention heads; width / heads is a multiple of 4."""
    text_depth: int = Field(4, ge=0)
    """Of condition text: trainable blocks that refine the frozen text states."""
    text_padding: Literal["attend", "mask"] = "attend"
    """Of condition text: attend encodes a caption's pads and attends to them, as the public PixelGen does; mask leaves
    them out, and computes no more of them than rounds the longest caption up to a multiple of 32 tokens (the metrics'
    TFLOP/s and MFU count all of them)."""
    bottleneck: int = Field(256, ge=0)
    """Width between the two matrices of the patch embedding; 0, of condition class alone: one matrix."""
    repa_layer: int = Field(8, gt=0)
    """Number of the block (from 1) whose output is aligned with the patch features."""
    classes: int = Field(1000, gt=0)
    """Of condition class: how many there are, numbered from 0; one more stands for none."""
    context_tokens: int = Field(32, gt=0)
    """Of condition class: tokens of the class that join the image's."""
    context_start: int = Field(8, ge=0)
    """Of condition class: blocks before they do."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of condition class: share of values that the middle half of the blocks drops while training."""

    @model_validator(mode="after")
    def _widths(self) -> ModelConfig:
        if self.width % self.heads or self.width // self.heads % 4 or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 x heads ({4 * self.heads})")
        if self.repa_layer > self.depth:
            raise ValueError(f"repa_layer {self.repa_layer} must be at most depth ({self.depth})")
        return self

    @model_validator(mode="after")
    def _fits_condition(self) -> ModelConfig:
        for field in _ONLY[self.condition]:
            value, default = getattr(self, field), type(self).model_fields[field].default
            if value != default:
                raise ValueError(
                    f"{field} {value} does nothing under condition {self.condition}: leave it at {default}"
                )
        if self.condition == "text" and self.bottleneck == 0:
            raise ValueError("bottleneck 0 is for condition class: give a width of at least 1")
        if self.condition == "class" and self.context_start >= self.depth:
            raise ValueError(f"context_start {self.context_start} must be below depth ({self.depth})")
        return self
