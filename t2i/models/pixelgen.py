"""PixelGen, the text-conditioned denoiser: a noisy image and a caption's states in, the clean image out.

Design, as measured in the public model (and counted in tests):
- Patches enter through a bottleneck (768 -> 256 -> D for patch 16) plus a fixed sin-cos position table.
- The frozen language model's states are refined by trainable, time-modulated blocks of self-attention.
- A caption's pads are attended to, as in the public model, or masked: then they are zero in the states, which alone
  say where they are, and there may be any number of them.
- Image blocks attend from image queries to image keys and text keys at once; each block projects the
  refined text with its own matrix, and the image never writes back to the text.
- adaLN is driven by time alone; QK-RMSNorm; SwiGLU of hidden width 4 D; 2-D rotary embedding on the image.
- adaLN and the head start at zero, so the network's first output is exactly zero.
- The head runs in fp32: a bf16 image would be off by up to 0.04 in velocity near t = 1.

Shape suffixes: B batch, C channels, N image tokens, L text tokens, D width, E width of the text states.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.models.layers import (
    Fp32Linear,
    RMSNorm,
    TimeEmbedding,
    patchify,
    rope_table,
    sincos_table,
    unpatchify,
)
from t2i.models.transformer import Block, Prediction


class PixelGen(nn.Module):
    """The denoiser of PixelGen for text to image (paper section 3, configuration of Table 7).

    Any image whose sides are multiples of `patch_size`; the position tables are computed for its grid.

    Args:
        text_length: tokens of a caption's states, or under mask the most of them.
        text_padding: attend reads a caption's pads like its tokens; mask leaves out the rows of states that are zero.
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
        """Predict the clean image.

        Args:
            x_BCHW: the noisy image `t x + (1 - t) noise`.
            t_B: times in [0, 1]; 0 is noise, 1 the image.
            text_BLE: states of the frozen language model, padded to `text_length` tokens, pads included; under mask,
                zeros in the pads' place, and at most `text_length` of all.
        """
        # Each parameter is read by the module that owns it: elsewhere it may be a shard (ZeRO-3, FSDP2).
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
        # Of the joined keys, the image's take part in any case.
        mask = F.pad(text_mask, (x.shape[1], 0), value=True) if text_mask is not None else None
        features = x
        for index, block in enumerate(self.blocks, start=1):
            x = block(x, time_B1D, rope, text, mask)
            if index == self.repa_layer:
                features = x

        x = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
        return Prediction(unpatchify(self.head(x), self.patch_size, height, width), features)
