"""The config's section about the network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from t2i.config.base import Section, Unused

_ClassPixelGen = Unused(family="pixeldit", condition="text")


class PixelConfig(Section):
    """The pixel pathway of PixelDiT: blocks over single pixels, conditioned by the patches' tokens."""

    depth: int = Field(4, gt=0)
    """Pixel blocks (M of Table 3)."""
    width: int = Field(16, gt=0)
    """Width of a pixel's token; a multiple of 4."""
    attention: bool = True
    """Whether pixels attend, compacted to few tokens a patch; false is the paper's ablation (Table 6)."""
    attention_width: Annotated[int | None, Unused(attention=False)] = Field(None, gt=0)
    """Width of that attention; none takes model.width, as for classes. The public text model has 1152."""
    attention_heads: Annotated[int | None, Unused(attention=False)] = Field(None, gt=0)
    """Its heads; none takes model.heads. The public text model has 16."""
    tokens_per_patch: Annotated[int, Unused(attention=False)] = Field(1, gt=0)
    """Tokens that a patch's pixels are compacted to, each for an equal part of the patch: a power of two, 1, 2 or 4 in
    the paper (section C.3); patch_size squared is no compaction (Table 6)."""
    modulation: Literal["pixel", "patch", "additive"] = "pixel"
    """How a patch's token conditions its pixels: pixel gives each its own adaLN; patch gives all the same (B of Table
    5); additive has no adaLN, the token is added to the compacted tokens (section G.2)."""
    post_modulation: bool = False
    """Scale and shift a branch's output in place of its input, without gates: the authors' later remedy for loss
    spikes. Not with modulation additive."""

    @property
    def cut(self) -> tuple[int, int]:
        """Rows and columns of the parts of a patch, one token a part."""
        halvings = self.tokens_per_patch.bit_length() - 1
        return 2 ** (halvings // 2), 2 ** (halvings - halvings // 2)

    @model_validator(mode="after")
    def _goes_together(self) -> PixelConfig:
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4")
        if self.tokens_per_patch & (self.tokens_per_patch - 1):
            raise ValueError(f"tokens_per_patch {self.tokens_per_patch} must be a power of two")
        if self.modulation == "additive" and (self.post_modulation or not self.attention):
            raise ValueError("modulation additive needs attention, which the token enters by, and no post_modulation")
        return self


class ModelConfig(Section):
    """The denoiser."""

    family: Literal["pixelgen", "pixeldit"] = "pixelgen"
    """pixelgen: patches alone. pixeldit: patches, then pixels (`pixel`)."""
    condition: Literal["text", "class"] = "text"
    """text: the network reads a caption's states; class: a number below `classes`, which is the sample's caption."""
    prediction: Literal["image", "velocity"] = "image"
    """What the network predicts: the clean image (PixelGen, JiT), or the velocity image - noise (PixelDiT)."""
    patch_size: int = Field(16, gt=0)
    """Side of a square patch, in pixels; the resolution is a multiple of it."""
    width: int = Field(1536, gt=0)
    """Width D of the transformer; a multiple of 4 and of heads."""
    depth: int = Field(16, gt=0)
    """Image blocks; with family pixeldit, patch blocks (N of Table 3)."""
    heads: int = Field(24, gt=0)
    """Attention heads; width / heads is a multiple of 4."""
    text_depth: Annotated[int, Unused(family="pixeldit", condition="class")] = Field(4, ge=0)
    """Trainable blocks that refine the text encoder's states; only family pixelgen, condition text."""
    text_padding: Annotated[Literal["attend", "mask"], Unused(condition="class")] = "attend"
    """attend encodes a caption's pads and attends to them, as the public models do; mask leaves them out, and computes
    only those that round the longest caption up to a multiple of 32 tokens (TFLOP/s and MFU in the metrics count all).
    Only condition text."""
    bottleneck: Annotated[int, Unused(family="pixeldit")] = Field(256, ge=0)
    """Width between the two matrices of the patch embedding; 0, only for condition class: one matrix. Only family
    pixelgen."""
    repa_layer: int = Field(8, gt=0)
    """Block (from 1) whose output is aligned with the patch features."""
    repa_width: int | None = Field(None, gt=0)
    """Width inside the projector of that alignment; none takes width. PixelDiT from text has 2048."""
    classes: Annotated[int, Unused(condition="text")] = Field(1000, gt=0)
    """Number of classes, numbered from 0; one more is the null class. Only condition class."""
    context_tokens: Annotated[int, _ClassPixelGen] = Field(32, gt=0)
    """Tokens of the class that join the image's; only family pixelgen, condition class."""
    context_start: Annotated[int, _ClassPixelGen] = Field(8, ge=0)
    """Blocks before they join; only family pixelgen, condition class."""
    dropout: Annotated[float, _ClassPixelGen] = Field(0.0, ge=0, lt=1)
    """Share of values that the middle half of the blocks drops in training; only family pixelgen, condition class."""
    pixel: Annotated[PixelConfig, Unused(family="pixelgen")] = PixelConfig()
    """The pixel pathway; only family pixeldit."""

    @property
    def pixel_attention(self) -> tuple[int, int]:
        """Width and heads of the pixel pathway's attention."""
        return self.pixel.attention_width or self.width, self.pixel.attention_heads or self.heads

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        _check_heads("width", self.width, "heads", self.heads)
        if self.repa_layer > self.depth:
            raise ValueError(f"repa_layer {self.repa_layer} must be at most depth ({self.depth})")
        if self.family == "pixeldit":
            named = "pixel.attention_heads" if self.pixel.attention_heads else "heads"
            _check_heads("pixel.attention_width", self.pixel_attention[0], named, self.pixel_attention[1])
            if any(self.patch_size % parts for parts in self.pixel.cut):
                raise ValueError(
                    f"pixel.tokens_per_patch {self.pixel.tokens_per_patch} must cut a patch of {self.patch_size} x "
                    f"{self.patch_size} pixels into equal parts"
                )
        if self.condition == "text" and self.bottleneck == 0:
            raise ValueError("bottleneck 0 is for condition class: give a width of at least 1")
        if self.family == "pixelgen" and self.condition == "class" and self.context_start >= self.depth:
            raise ValueError(f"context_start {self.context_start} must be below depth ({self.depth})")
        return self


def _check_heads(width_name: str, width: int, heads_name: str, heads: int) -> None:
    if width % heads or width // heads % 4 or width % 4:
        raise ValueError(f"{width_name} {width} must be a multiple of 4 x {heads_name} ({4 * heads})")
