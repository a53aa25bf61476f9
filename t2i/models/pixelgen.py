"""PixelGen for text (paper section 3) and for classes (section 4.2): a noisy image in, the clean image out.

Design, as measured in the public models (and counted in tests); that for classes is JiT's (Li and He, 2025):
- Patches enter through a bottleneck (768 -> 256 -> D for patch 16; XL for classes has one matrix) plus a fixed sin-cos
  position table. QK-RMSNorm; SwiGLU of hidden width 4 D, for classes 8/3 D; 2-D rotary embedding.
- adaLN and the head start at zero, so the first output is exactly zero. The head runs in fp32: a bf16 image would be
  off by up to 0.04 in velocity near t = 1.
- Text: trainable, time-modulated self-attention blocks refine the text encoder's states. Image blocks attend to image
  and text keys at once; each projects the refined text with its own matrix, and the text never reads the image. Time
  alone drives adaLN. Pads are attended to, as in the public model, or masked: then their states are zero.
- Classes: the sum of class and time embeddings drives adaLN in every block and in the head. After some blocks, 32
  copies of the class embedding with learned positions join the image's tokens; they are not rotated, and are removed
  before the head. The middle half of the blocks has dropout, after attention and inside the MLP.

Shape suffixes: B batch, C channels, N image tokens, L text tokens, D width, E width of the text states.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.models.layers import (
    Attention,
    Block,
    Fp32Linear,
    Prediction,
    RMSNorm,
    SwiGLU,
    TimeEmbedding,
    axial_rope_table,
    derive,
    dropout,
    modulate,
    patchify,
    rope_table,
    sincos_table,
    unpatchify,
)


class ClassBlock(nn.Module):
    """A transformer block with dropout of `rate`; class and time drive its adaLN."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, cross=False, bias=True)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, 8 * width // 3, bias=True)
        self.adaln = nn.Linear(width, 6 * width)

    def forward(
        self, x_BND: Tensor, cond_B1D: Tensor, rope: tuple[Tensor, Tensor], dropout_B: Tensor | None = None
    ) -> Tensor:
        """`dropout_B`: the samples' dropout keys in this block; None drops nothing."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(cond_B1D).chunk(6, dim=-1)

        def drop(values: Tensor, place: int) -> Tensor:
            return values if dropout_B is None else dropout(values, derive(dropout_B, place), self.rate)

        attended = self.attn(modulate(self.norm1(x_BND), shift1, scale1), rope)
        x_BND = x_BND + gate1 * drop(attended, 0)
        made = self.mlp(modulate(self.norm2(x_BND), shift2, scale2), lambda hidden: drop(hidden, 1))
        return x_BND + gate2 * made


class ClassPixelGen(nn.Module):
    """The denoiser of PixelGen for class to image (paper Table 7), for sides that are multiples of `patch_size`.

    `bottleneck` 0 makes the patch embedding one matrix; the class's tokens join before block `context_start`.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        patch_size: int,
        bottleneck: int,
        context_tokens: int,
        context_start: int,
        dropout: float,
        repa_layer: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.head_width = width // heads
        self.context_start = context_start
        self.repa_layer = repa_layer
        patch_values = 3 * patch_size**2
        self.patch_down = nn.Linear(patch_values, bottleneck, bias=False) if bottleneck else None
        self.patch_up = nn.Linear(bottleneck or patch_values, width)
        self.time = TimeEmbedding(width, max_period=10000.0)
        self.label = nn.Embedding(classes + 1, width)
        self.context_position = nn.Parameter(torch.empty(1, context_tokens, width))
        self.dropping = range(depth // 4, depth // 4 * 3) if dropout > 0 else range(0)
        self.blocks = nn.ModuleList(ClassBlock(width, heads, dropout) for _ in range(depth))
        self.head_norm = RMSNorm(width)
        self.head_adaln = nn.Linear(width, 2 * width)
        self.head = Fp32Linear(width, patch_values)
        self.reset_parameters()

    @property
    def all_blocks(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [*self.blocks]

    def reset_parameters(self) -> None:
        """Xavier for matrices, zero for biases, adaLN and the head; 0.02 for labels, time and context positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (*self.time.mlp.parameters(), *self.label.parameters(), self.context_position):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if "adaln." in name or name.startswith("head."):
                nn.init.zeros_(parameter)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor, dropout_B: Tensor | None = None) -> Prediction:
        """Predict the clean image from the noisy image `t x + (1 - t) noise`, times in [0, 1], classes (int64; the
        number of classes is the null class) and dropout keys (int64 below 2**62; None, as in evaluation, drops
        nothing)."""
        # The module that owns a parameter reads it: elsewhere it may be a shard (ZeRO-3, FSDP2).
        dtype = self.context_position.dtype
        height, width = x_BCHW.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        label_B1D = self.label(label_B)[:, None]
        cond_B1D = F.silu(self.time(t_B, dtype)[:, None] + label_B1D)

        patches = patchify(x_BCHW, self.patch_size).to(dtype)
        x = self.patch_up(self.patch_down(patches) if self.patch_down is not None else patches)
        x = x + sincos_table(*grid, x.shape[-1], x.device).to(dtype)
        rope, context = axial_rope_table(*grid, self.head_width, 0, x.device), 0
        features = x
        for index, block in enumerate(self.blocks):
            if index == self.context_start:
                tokens = label_B1D + self.context_position
                x, context = torch.cat([tokens, x], dim=1), tokens.shape[1]
                rope = axial_rope_table(*grid, self.head_width, context, x.device)
            keys = derive(dropout_B, index) if dropout_B is not None and index in self.dropping else None
            x = block(x, cond_B1D, rope, keys)
            if index + 1 == self.repa_layer:
                features = x[:, context:]

        shift, scale = self.head_adaln(cond_B1D).chunk(2, dim=-1)
        x = modulate(self.head_norm(x[:, context:].float()), shift.float(), scale.float())
        return Prediction(unpatchify(self.head(x), self.patch_size, height, width), features)


class PixelGen(nn.Module):
    """The denoiser of PixelGen for text to image (paper Table 7), for sides that are multiples of `patch_size`.

    `text_padding`: attend reads a caption's pads like its tokens; mask leaves out the rows of states that are zero.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        text_width: int,
        text_length: int,
        text_depth: int,
        patch_size: int,
        bottleneck: int,
        repa_layer: int,
        text_padding: Literal["attend", "mask"] = "attend",
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.masks_text = text_padding == "mask"
        self.head_width = width // heads
        self.repa_layer = repa_layer
        patch_values = 3 * patch_size**2
        self.patch_down = nn.Linear(patch_values, bottleneck, bias=False)
        self.patch_up = nn.Linear(bottleneck, width)
        self.time = TimeEmbedding(width)
        self.text_in = nn.Linear(text_width, width)
        self.text_norm = RMSNorm(width)
        self.text_position = nn.Parameter(torch.empty(1, text_length, width))
        self.text_blocks = nn.ModuleList(Block(width, heads, cross=False, hidden=4 * width) for _ in range(text_depth))
        self.blocks = nn.ModuleList(Block(width, heads, cross=True, hidden=4 * width) for _ in range(depth))
        self.head = Fp32Linear(width, patch_values)
        self.reset_parameters()

    @property
    def all_blocks(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [*self.text_blocks, *self.blocks]

    def reset_parameters(self) -> None:
        """Xavier for matrices, zero for biases, adaLN and the head; 0.02 for time and text positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in self.time.mlp.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.text_position, std=0.02)
        zeroed = [block.adaln for block in (*self.text_blocks, *self.blocks)] + [self.head]
        for linear in zeroed:
            nn.init.zeros_(linear.weight)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLE: Tensor) -> Prediction:
        """Predict the clean image from the noisy image `t x + (1 - t) noise`, times in [0, 1] and states of the text
        encoder, padded to `text_length` tokens; under mask to at most so many, with zeros for pads."""
        # The module that owns a parameter reads it: elsewhere it may be a shard (ZeRO-3, FSDP2).
        dtype = self.text_position.dtype
        height, width = x_BCHW.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        time_B1D = F.silu(self.time(t_B, dtype))[:, None]

        position: Tensor = self.text_position
        text_mask: Tensor | None = None
        if self.masks_text:
            position, text_mask = position[:, : text_BLE.shape[1]], (text_BLE != 0).any(-1)
        text = self.text_norm(self.text_in(text_BLE.to(dtype))) + position
        for block in self.text_blocks:
            text = block(text, time_B1D, mask=text_mask)

        x = self.patch_up(self.patch_down(patchify(x_BCHW, self.patch_size).to(dtype)))
        x = x + sincos_table(*grid, x.shape[-1], x.device).to(dtype)
        rope = rope_table(*grid, self.head_width, x.device)
        # The image's keys are always attended to.
        mask = F.pad(text_mask, (x.shape[1], 0), value=True) if text_mask is not None else None
        features = x
        for index, block in enumerate(self.blocks, start=1):
            x = block(x, time_B1D, rope, text, mask)
            if index == self.repa_layer:
                features = x

        x = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
        return Prediction(unpatchify(self.head(x), self.patch_size, height, width), features)
