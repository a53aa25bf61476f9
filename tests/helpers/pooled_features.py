"""Pictures to one vector each, by networks trained on ImageNet, for the distances between sets of pictures.

EfficientNet-Lite0 is evaluation/fid's; VGG16 is the ablation's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models import vgg16

from evaluation.fid.networks import imagenet_input

_BATCH = 32
_CONV5 = 30
"""Layers of VGG16's `features` up to the last ReLU before the last pooling."""

Network = Callable[[Tensor], Tensor]
"""Pictures, uint8 (B, 3, H, W), to features (B, d)."""


def vgg16_conv5(weights: Path, side: int) -> Network:
    """The mean over VGG16's conv5_3 of pictures resized to `side`: 512 features. `weights` are torchvision's."""
    layers = vgg16(weights=None).features[:_CONV5]
    found = torch.load(weights, map_location="cpu", weights_only=True)
    layers.load_state_dict({name: found[f"features.{name}"] for name in layers.state_dict()})
    layers.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return lambda pictures: layers(imagenet_input(pictures, side)).mean((2, 3))


@torch.no_grad()
def pooled_features(network: Network, pictures: Tensor) -> NDArray[np.float64]:
    """uint8 (n, 3, H, W) to (n, d), some at a time."""
    return torch.cat([network(batch) for batch in pictures.split(_BATCH)]).double().numpy()
