"""PixelDiT in both forms: the public sizes, and small ones with their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from released_pixeldit import DiTSizes, dit_file, dit_forward
from torch import Tensor

from t2i.config.loading import validate_config
from t2i.config.run import RunConfig
from t2i.released.checkpoint import Checkpoint

B = DiTSizes(768, 12, 12, 2, 16, 16, (768, 12), 768, 768, classes=1000)
L = DiTSizes(1024, 22, 16, 4, 16, 16, (1024, 16), 1024, 768, classes=1000)
XL = DiTSizes(1152, 26, 16, 4, 16, 16, (1152, 16), 1152, 768, classes=1000)
T2I = DiTSizes(1536, 14, 24, 2, 16, 16, (1152, 16), 2048, 768, text_width=2304, text_length=300)
TINY_CLASS = DiTSizes(48, 3, 3, 2, 8, 4, (48, 3), 48, 11, classes=5)
TINY_TEXT = DiTSizes(48, 3, 3, 2, 8, 4, (32, 2), 24, 11, text_width=20, text_length=7)
TINY = {
    "class": TINY_CLASS,
    "class, post-modulation": replace(TINY_CLASS, post=True),
    "text": TINY_TEXT,
    "text, post-modulation": replace(TINY_TEXT, post=True),
}


def dit_config(s: DiTSizes, **model: Any) -> RunConfig:
    """The config of a network, which taps its second block, of pictures of 5 x 5 patches."""
    pixel = {"depth": s.pixel_blocks, "width": s.pixel_width, "post_modulation": s.post}
    pixel |= {"attention_width": s.attention[0], "attention_heads": s.attention[1]}
    sizes: dict[str, Any] = {"family": "pixeldit", "prediction": "velocity", "patch_size": s.patch, "width": s.hidden}
    sizes |= {"depth": s.blocks, "heads": s.heads, "repa_layer": 2, "repa_width": s.projector, "pixel": pixel}
    sizes |= {"condition": "class", "classes": s.classes} if s.classes else {}
    tree = {"model": {**sizes, **model}, "data": {"resolution": 5 * s.patch}}
    if not s.classes:
        tree["text"] = {"length": s.text_length}
    return validate_config(tree, where="the test")


def dit_stored(path: Path, weights: dict[str, Tensor], ema: dict[str, Tensor]) -> Checkpoint:
    torch.save(dit_file(weights, ema), path)
    return Checkpoint(path)


@dataclass(frozen=True)
class Given:
    """What a network is given, in our sense, for two pictures that are not square."""

    x: Tensor
    t: Tensor
    condition: Tensor

    @classmethod
    def of(cls, s: DiTSizes) -> Given:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(2, 3, 5 * s.patch, 3 * s.patch, generator=generator)
        text = torch.randn(2, s.text_length, s.text_width, generator=generator)
        return cls(x, torch.tensor([0.15, 0.8]), torch.tensor([1, s.classes]) if s.classes else text)


def dit_velocity(w: dict[str, Tensor], s: DiTSizes, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's answer in our sense, image - noise at t = 1 for the image, and the features of block 2."""
    if s.classes:
        return dit_forward(w, s, x, t, y, 2)
    output, features = dit_forward(w, s, x, 1000 * (1 - t), y, 2)
    return -output, features
