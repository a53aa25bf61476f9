"""PixelDiT for classes (paper section 3, Table 7) and for text (section 3.3, Table 8): patches, then pixels.

Design, as measured in the public code (and counted in tests):
- Patches enter through one matrix, without a position table; rotary positions span [0, 16] on both axes for any grid.
- QK-RMSNorm; SwiGLU of hidden width 8/3 D. The head starts at zero.
- SiLU(patch tokens + time) conditions the pixel pathway (`pixel_pathway.py`), their only way to the output.
- Classes: the sum of class and time embeddings drives adaLN, which starts at zero.
- Text: a caption's states are projected, normalised and get a learned position; they are a stream with its own weights
  in a joint attention (MM-DiT, Esser et al. 2024), rotated by their number. Time alone drives adaLN, embedded as
  1000 (1 - t); adaLN does not start at zero.
- Pads are attended to, as in the public model, or masked: then their states are zero, which marks them as pads.
- The last block computes only keys and values of the text. The public model has the rest of that block too, which
  nothing reads.

Shape suffixes: B batch, C channels, N patches, L text tokens, D width, E width of the text states.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.models.layers import (
    Block,
    Prediction,
    RMSNorm,
    TimeEmbedding,
    attention,
    line_rope_table,
    modulate,
    patchify,
    rope_table,
    rotate,
)
from t2i.models.pixel_pathway import ROPE_EXTENT, PixelPathway


class ClassPixelDiT(nn.Module):
    """The denoiser of PixelDiT for class to image, at any size whose sides are multiples of `patch_size`."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        patch_size: int,
        repa_layer: int,
        pixels: PixelPathway,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.head_width = width // heads
        self.repa_layer = repa_layer
        self.patch_in = nn.Linear(3 * patch_size**2, width)
        self.time = TimeEmbedding(width)
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads, cross=False, hidden=8 * width // 3) for _ in range(depth))
        self.pixels = pixels
        self.reset_parameters()

    @property
    def all_blocks(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [*self.blocks, *self.pixels.blocks]

    def reset_parameters(self) -> None:
        """Xavier for the patches, 0.02 for labels and time, zero for adaLN; the head sets itself to zero."""
        nn.init.xavier_uniform_(self.patch_in.weight)
        nn.init.zeros_(self.patch_in.bias)
        for parameter in (*self.time.mlp.parameters(), *self.label.parameters()):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if "adaln." in name:
                nn.init.zeros_(parameter)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor) -> Prediction:
        """Predict from the noisy image `t x + (1 - t) noise`, times in [0, 1] and classes (int64; the number of classes
        is the null class)."""
        # The module that owns a parameter reads it: elsewhere it may be a shard (ZeRO-3, FSDP2).
        label_BD = self.label(label_B)
        dtype = label_BD.dtype
        height, width = x_BCHW.shape[-2:]
        time_BD = self.time(t_B, dtype)
        cond_B1D = F.silu(time_BD + label_BD)[:, None]
        rope = rope_table(
            height // self.patch_size, width // self.patch_size, self.head_width, x_BCHW.device, ROPE_EXTENT
        )
        x = self.patch_in(patchify(x_BCHW, self.patch_size).to(dtype))
        features = x
        for index, block in enumerate(self.blocks, start=1):
            x = block(x, cond_B1D, rope)
            if index == self.repa_layer:
                features = x
        return Prediction(self.pixels(x_BCHW, F.silu(time_BD[:, None] + x)), features)


Rope = tuple[Tensor, Tensor]


class KeysAndValues(nn.Module):
    """The keys and values of an attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.k_norm = RMSNorm(width // heads)

    def forward(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys, normalised and rotated, and values of (B, L, D); each (B, H, L, K)."""
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return rotate(self.k_norm(k), *rope), v


class TextEnd(nn.Module):
    """The text's part of the last block: keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = KeysAndValues(width, heads)
        self.adaln = nn.Linear(width, 2 * width)

    def forward(self, text_BLD: Tensor, cond_B1D: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        return self.attn(modulate(self.norm1(text_BLD), *self.adaln(cond_B1D).chunk(2, dim=-1)), rope)


class JointBlock(nn.Module):
    """Patches and text in one attention, each with its own weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.image = Block(width, heads, cross=False, hidden=8 * width // 3)
        self.text = Block(width, heads, cross=False, hidden=8 * width // 3)

    def forward(
        self, x_BND: Tensor, text_BLD: Tensor, cond_B1D: Tensor, rope: Rope, text_rope: Rope, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The new patches and text. `mask` (B, L + N), bool: keys attended to, the text's first; None: all."""
        text_modulation, modulation = self.text.modulation(cond_B1D), self.image.modulation(cond_B1D)
        of_text = self.text.attn.project(self.text.pre(text_BLD, text_modulation), text_rope)
        of_image = self.image.attn.project(self.image.pre(x_BND, modulation), rope)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_text, of_image, strict=True))
        text_attended, attended = attention(q, k, v, mask).split([text_BLD.shape[1], x_BND.shape[1]], dim=2)
        text_BLD = self.text.post(text_BLD, self.text.attn.merge(text_attended), text_modulation)
        return self.image.post(x_BND, self.image.attn.merge(attended), modulation), text_BLD


class LastJointBlock(nn.Module):
    """A joint block whose text is not read any more."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.image = Block(width, heads, cross=False, hidden=8 * width // 3)
        self.text = TextEnd(width, heads)

    def forward(
        self, x_BND: Tensor, text_BLD: Tensor, cond_B1D: Tensor, rope: Rope, text_rope: Rope, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The new patches, and the text unchanged."""
        modulation = self.image.modulation(cond_B1D)
        q, k, v = self.image.attn.project(self.image.pre(x_BND, modulation), rope)
        text_k, text_v = self.text(text_BLD, cond_B1D, text_rope)
        attended = attention(q, torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2), mask)
        return self.image.post(x_BND, self.image.attn.merge(attended), modulation), text_BLD


class PixelDiT(nn.Module):
    """The denoiser of PixelDiT for text to image, at any size whose sides are multiples of `patch_size`.

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
        text_padding: Literal["attend", "mask"],
        patch_size: int,
        repa_layer: int,
        pixels: PixelPathway,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.masks_text = text_padding == "mask"
        self.head_width = width // heads
        self.repa_layer = repa_layer
        self.patch_in = nn.Linear(3 * patch_size**2, width)
        self.time = TimeEmbedding(width)
        self.text_in = nn.Linear(text_width, width)
        self.text_norm = RMSNorm(width)
        self.text_position = nn.Parameter(torch.empty(1, text_length, width))
        self.blocks = nn.ModuleList(
            [*(JointBlock(width, heads) for _ in range(depth - 1)), LastJointBlock(width, heads)]
        )
        self.pixels = pixels
        self.reset_parameters()

    @property
    def all_blocks(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [*self.blocks, *self.pixels.blocks]

    def reset_parameters(self) -> None:
        """Xavier for the patches, 0.02 for time, 1 for text positions; the head's own is zero, the rest PyTorch's."""
        nn.init.xavier_uniform_(self.patch_in.weight)
        nn.init.zeros_(self.patch_in.bias)
        for parameter in self.time.mlp.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.text_position)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLE: Tensor) -> Prediction:
        """Predict from the noisy image `t x + (1 - t) noise`, times in [0, 1] and states of the text encoder, padded to
        `text_length` tokens; under mask to at most so many, with zeros for pads."""
        # The module that owns a parameter reads it: elsewhere it may be a shard (ZeRO-3, FSDP2).
        dtype = self.text_position.dtype
        device, length = x_BCHW.device, text_BLE.shape[1]
        grid = (x_BCHW.shape[-2] // self.patch_size, x_BCHW.shape[-1] // self.patch_size)
        time_BD = self.time(1000.0 * (1.0 - t_B.float()), dtype)
        cond_B1D = F.silu(time_BD)[:, None]
        text = self.text_norm(self.text_in(text_BLE.to(dtype))) + self.text_position[:, :length]
        text_rope = line_rope_table(length, self.head_width, device)

        x = self.patch_in(patchify(x_BCHW, self.patch_size).to(dtype))
        rope = rope_table(*grid, self.head_width, device, ROPE_EXTENT)
        mask: Tensor | None = None
        if self.masks_text:  # the image's keys are always attended to
            mask = F.pad((text_BLE != 0).any(-1), (0, x.shape[1]), value=True)
        features = x
        for index, block in enumerate(self.blocks, start=1):
            x, text = block(x, text, cond_B1D, rope, text_rope, mask)
            if index == self.repa_layer:
                features = x
        return Prediction(self.pixels(x_BCHW, F.silu(time_BD[:, None] + x)), features)
