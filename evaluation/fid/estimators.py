"""FID, sFID, Inception score, precision and recall from features.

- Means and covariances are accumulated in fp64 over batches as they come: no more than one batch of features is held.
- The trace of the matrix root in the Frechet distance is a sum of singular values. ADM and others take
  `scipy.linalg.sqrtm` of the product of the covariances, which is not symmetric: as exact where both are well
  conditioned, correct to 8 digits where they are nearly singular, with imaginary parts to ignore, and slower.
  Eigenvalues of the product made symmetric are no better, since they are squares.
- Precision and recall need all features of both sets, in fp32; distances are computed block by block. ADM computes them
  in fp16 where none overflows, so its values may differ in the third digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

SPLIT = 5000
"""Images in a split of the Inception score; a set's score is the mean over its splits."""
NEIGHBOUR = 3
"""An image's radius in precision and recall is the distance to this neighbour."""
_BLOCK = 4096
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features."""

    mean: Array
    """(d,)"""
    covariance: Array
    """(d, d), unbiased."""

    @staticmethod
    def of(features: Tensor) -> Gaussian:
        """Of all features (n, d) at once; n is at least 2."""
        moments = Moments(features.shape[1])
        moments.add(features)
        return moments.gaussian()


class Moments:
    """Mean and covariance of features (n, dim) that come in batches, in fp64 (Chan, Golub and LeVeque, 1983)."""

    def __init__(self, dim: int, device: torch.device = _CPU) -> None:
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Add (n, d) features; n is at least 1."""
        features = features.to(self._mean)
        total = self.count + len(features)
        shift = features.mean(0) - self._mean
        # The batches' own scatter and that between their mean and the mean so far, in one product.
        between = shift * math.sqrt(self.count * len(features) / total)
        rows = torch.cat([features - features.mean(0), between[None]])
        self._scatter.addmm_(rows.T, rows)
        self._mean += shift * (len(features) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Of all features so far, at least 2."""
        assert self.count > 1, "one feature has no covariance"
        return Gaussian(self._mean.cpu().numpy(), (self._scatter / (self.count - 1)).cpu().numpy())


def _root(covariance: Array) -> Array:
    """(d, rank), whose product with its transpose is the covariance.

    Eigenvalues that are 0 up to rounding are left out: the root of 1e-16 is 1e-8, and there may be thousands.
    """
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance between Gaussians (Heusel et al. 2017, eq. 6): FID, if the features are pool_3.

    |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)). The last trace is the sum of the singular values of the
    product of roots of A and B.
    """
    product = _root(a.covariance).T @ _root(b.covariance)
    trace = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * trace
    return max(0.0, float(distance))  # rounding may take it below


class InceptionScore:
    """Inception score (Salimans et al. 2016): the mean over consecutive splits of images that come in order.

    The last split may be smaller, and counts like the others, as in ADM's suite.
    """

    def __init__(self) -> None:
        self._splits: list[tuple[int, Tensor, float]] = []  # images, sum of p, sum of p log p

    def add(self, logits: Tensor) -> None:
        """Add (n, classes) logits."""
        while len(logits):
            if not self._splits or self._splits[-1][0] == SPLIT:
                self._splits.append((0, torch.zeros(logits.shape[1], dtype=torch.float64), 0.0))
            count, sum_p, sum_p_log_p = self._splits[-1]
            taken, logits = logits[: SPLIT - count], logits[SPLIT - count :]
            log_p = taken.double().cpu().log_softmax(1)
            p = log_p.exp()
            self._splits[-1] = (count + len(taken), sum_p + p.sum(0), sum_p_log_p + float((p * log_p).sum()))

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits."""
        scores = []
        for count, sum_p, sum_p_log_p in self._splits:
            marginal = sum_p / count
            divergence = sum_p_log_p / count - float(torch.xlogy(marginal, marginal).sum())
            scores.append(math.exp(divergence))
        return float(np.mean(scores)), float(np.std(scores))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, d) and (m, d) to (n, m)."""
    inner = torch.addmm(b.square().sum(1).expand(len(a), -1), a, b.T, alpha=-2.0)
    return (inner + a.square().sum(1, keepdim=True)).clamp_(min=0.0)


def _radii(features: Tensor) -> Tensor:
    """(n, d) to (n,): the squared distance to the neighbour NEIGHBOUR; an image is not its own neighbour."""
    radii = []
    for rows in features.split(_BLOCK):
        nearest = torch.empty(len(rows), 0, device=features.device)
        for columns in features.split(_BLOCK):
            candidates = torch.cat([nearest, _squared_distances(rows, columns)], dim=1)
            k = min(NEIGHBOUR + 1, candidates.shape[1])  # and itself, at 0
            nearest = candidates.topk(k, dim=1, largest=False).values
        radii.append(nearest[:, NEIGHBOUR])
    return torch.cat(radii)


def _covered(features: Tensor, by: Tensor, radii: Tensor) -> float:
    """Share of features (n, d) that lie within the radius (m,) of any of `by` (m, d)."""
    inside = 0
    for rows in features.split(_BLOCK):
        found = torch.zeros(len(rows), dtype=torch.bool, device=features.device)
        for centres, reach in zip(by.split(_BLOCK), radii.split(_BLOCK), strict=True):
            found |= (_squared_distances(rows, centres) <= reach).any(1)
        inside += int(found.sum())
    return inside / len(features)


def precision_recall(reference: Tensor, samples: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019): the share of samples within a radius of the reference,
    and the share of the reference within a radius of the samples.

    Args:
        reference: (n, d), n above NEIGHBOUR.
        samples: (m, d), m above NEIGHBOUR.
    """
    assert min(len(reference), len(samples)) > NEIGHBOUR
    # Centred, which changes no distance but makes the numbers, and so the rounding, smaller.
    middle = reference.double().mean(0).float()
    reference, samples = reference.float() - middle, samples.float() - middle
    precision = _covered(samples, reference, _radii(reference))
    recall = _covered(reference, samples, _radii(samples))
    return precision, recall
