"""PixelDiT, the class-conditional denoiser: patches, then pixels (paper section 3, configurations of Table 7).

Design, as measured in the public code (and counted in tests):
- Patches enter through one matrix, without a position table; rotary positions span [0, 16] on both axes whatever the
  grid.
- Class and time embeddings are added up and drive adaLN in every patch block, whose scales follow one SiLU.
- QK-RMSNorm; SwiGLU of hidden width 8/3 D.
- The patches' tokens and time, added up, after a SiLU, condition the pixel pathway (`pixel_pathway.py`); nothing else
  of them reaches the output.
- adaLN and the head start at zero, so the network's first output is exactly zero; the rest as PyTorch has it.

Shape suffixes: B batch, C channels, N patches, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from t2i.models.layers import TimeEmbedding, patchify, rope_table
from t2i.models.pixel_pathway import ROPE_EXTENT, PixelPathway
from t2i.models.transformer import Block, Prediction


class ClassPixelDiT(nn.Module):
    """The denoiser of PixelDiT for class to image.

    Any image whose sides are multiples of `patch_size`.

    Args:
        depth: N, patch blocks.
        pixels: the pixel pathway.
    """

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
        """Xavier for the patches, 0.02 for labels and time, zero for adaLN; the head has its own, also zero."""
        nn.init.xavier_uniform_(self.patch_in.weight)
        nn.init.zeros_(self.patch_in.bias)
        for parameter in (*self.time.mlp.parameters(), *self.label.parameters()):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if "adaln." in name:
                nn.init.zeros_(parameter)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor) -> Prediction:
        """Predict, in the sense of the config's model.prediction.

        Args:
            x_BCHW: the noisy image `t x + (1 - t) noise`.
            t_B: times in [0, 1]; 0 is noise, 1 the image.
            label_B: classes, int64; the number of classes is the null class.
        """
        # Each parameter is read by the module that owns it: elsewhere it may be a shard (ZeRO-3, FSDP2).
        label_BD = self.label(label_B)
        dtype = label_BD.dtype
        height, width = x_BCHW.shape[-2:]
        time_BD = self.time(t_B, dtype)
        given_B1D = F.silu(time_BD + label_BD)[:, None]
        rope = rope_table(
            height // self.patch_size, width // self.patch_size, self.head_width, x_BCHW.device, ROPE_EXTENT
        )
        x = self.patch_in(patchify(x_BCHW, self.patch_size).to(dtype))
        features = x
        for index, block in enumerate(self.blocks, start=1):
            x = block(x, given_B1D, rope)
            if index == self.repa_layer:
                features = x
        return Prediction(self.pixels(x_BCHW, F.silu(time_BD[:, None] + x)), features)
