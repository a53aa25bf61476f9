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

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.models.layers import (
    Fp32Linear,
    RMSNorm,
    SwiGLU,
    TimeEmbedding,
    attention,
    modulate,
    patchify,
    rope_table,
    rotate,
    sincos_table,
    unpatchify,
)


class Prediction(NamedTuple):
    """What a denoiser returns: the predicted clean image (B, C, H, W) in fp32, in [-1, 1] once trained, and
    the features (B, N, D) of the block that representation alignment taps."""

    image: Tensor
    features: Tensor


class Attention(nn.Module):
    """Self-attention with QK-RMSNorm; with `cross`, its keys and values are joined by those of a context."""

    def __init__(self, width: int, heads: int, cross: bool, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.context_kv = nn.Linear(width, 2 * width, bias=False) if cross else None
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts D) -> parts tensors (B, H, N, K)."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`mask` (B, M), bool: keys that take part, the context's last; None: all."""
        q, k, v = self._heads(self.qkv(x), 3)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.context_kv is not None:
            assert context is not None
            context_k, context_v = self._heads(self.context_kv(context), 2)
            k = torch.cat([k, self.k_norm(context_k)], dim=2)
            v = torch.cat([v, context_v], dim=2)
        return self.out(attention(q, k, v, mask).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """A transformer block modulated by time; `cross` makes it an image block that also reads the text."""

    def __init__(self, width: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, cross)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, 4 * width)
        self.adaln = nn.Linear(width, 6 * width)

    def forward(
        self,
        x_BND: Tensor,
        time_B1D: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(time_B1D).chunk(6, dim=-1)
        x_BND = x_BND + gate1 * self.attn(modulate(self.norm1(x_BND), shift1, scale1), rope, context, mask)
        return x_BND + gate2 * self.mlp(modulate(self.norm2(x_BND), shift2, scale2))


def muon_takes(name: str) -> bool:
    """Whether Muon is to update a parameter: the matrices of attention and MLP, not adaLN, embeddings or head."""
    return ".attn." in name or (".mlp." in name and ".time." not in name)


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
        self.text_blocks = nn.ModuleList(Block(width, heads, cross=False) for _ in range(text_depth))
        self.blocks = nn.ModuleList(Block(width, heads, cross=True) for _ in range(depth))
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
