"""Distances of images from held-out ones of the same captions, by the features of networks trained on ImageNet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from feature_distance import Array, kernel_distance, pair_terms, resamples
from pooled_features import pooled_features, vgg16_conv5
from torch import Tensor

from evaluation.fid.estimators import Gaussian, frechet_distance
from evaluation.fid.networks import efficientnet_lite0

RESAMPLES = 1000


def interval(values: Array) -> dict[str, float]:
    """The value of all pictures, and the middle 95 % of those of the resamples."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Distances:
    """Of one set of pictures, by network."""

    kids: dict[str, Array]
    """Times 1000, (1 + RESAMPLES,): KID of all pictures, then of each resample."""
    frechets: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """In JSON's terms."""
        return {"kid": {network: interval(kids) for network, kids in self.kids.items()}, "frechet": self.frechets}

    def kid_change(self, before: Distances) -> dict[str, dict[str, float]]:
        """By network; below 0 these pictures are nearer than those before."""
        return {network: interval(kids - before.kids[network]) for network, kids in self.kids.items()}


class Comparison:
    """Held-out pictures, with which others are compared.

    Args:
        pictures: uint8 (n, 3, H, W).
        vgg16: torchvision's weights.
        side: pixels; what the networks see is resized to it.
    """

    def __init__(self, pictures: Tensor, vgg16: Path, side: int) -> None:
        lite0, _ = efficientnet_lite0(side, torch.device("cpu"))
        self._networks = {
            "efficientnet_lite0": lambda batch: lite0(batch).pooled,
            "vgg16": vgg16_conv5(vgg16, side),
        }
        self._expected = self._features(pictures)
        self._counts = np.concatenate([np.ones((1, len(pictures))), resamples(len(pictures), RESAMPLES)])

    def _features(self, pictures: Tensor) -> dict[str, Array]:
        return {name: pooled_features(network, pictures) for name, network in self._networks.items()}

    def distances(self, pictures: Tensor) -> Distances:
        """Of as many pictures of the same captions, in their order; the resamples are always the same ones."""
        kids, frechets = {}, {}
        for network, features in self._features(pictures).items():
            expected = self._expected[network]
            kids[network] = 1e3 * kernel_distance(pair_terms(features, expected), self._counts)
            frechets[network] = frechet_distance(*(Gaussian.of(torch.from_numpy(x)) for x in (features, expected)))
        return Distances(kids, frechets)
