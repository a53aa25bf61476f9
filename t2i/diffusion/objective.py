"""The loss of one micro-batch: flow matching + gated perceptual terms + representation alignment.

`L = L_FM + b (0.1 L_LPIPS + 0.01 L_P-DINO) + w L_REPA` (PixelGen eq. 6, where b = 1), one scalar for one backward.

- Every mean is over the *global* batch. Flow matching and alignment average over all samples, the perceptual terms over
  the ungated ones (t at or above perceptual_t_min), whose global number follows from the slots. The engine averages
  gradients over `micro_batches` (ranks x accumulation steps), so a micro-batch contributes `sum_i l_i / N_global *
  micro_batches`.
- The perceptual networks run on ungated samples only; the clean image's patch features serve both P-DINO and REPA.
  Gating never changes a collective.
- Gradient balancing (b) needs the gradients of L_FM and of the perceptual terms separately: they are computed at the
  network's output and their sum is passed on, so there is still one backward pass through each network.
- Their norms are compared at the head, the last linear layer y = h W' + b from tokens h (B, N, D) to patches y (B, N,
  P). A loss's gradient at W (P, D) is the sum over tokens of dL/dy h'. Gradients, not their norms, add up over
  micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from t2i.diffusion.flow import Array, PredictionKind, flow_matching_loss, image_from_velocity, interpolate
from t2i.diffusion.perceptual import ImageDistance, PatchFeatures, cosine_distance
from t2i.distributed import to_device

EPSILON = 1e-4
"""Added to the norm that divides."""


def head_gradients(tokens_BND: Tensor, *patches_BNP: Tensor) -> Tensor:
    """Gradients (k, P, D) of k losses at the head's weight, fp32, from the head's input and each loss's gradient at its
    output. The order of the P values does not matter to norms."""
    at_patches = torch.cat([patches.float() for patches in patches_BNP], dim=-1).flatten(0, 1)
    return (at_patches.T @ tokens_BND.float().flatten(0, 1)).unflatten(0, (len(patches_BNP), -1))


def norm_ratio(numerator: Tensor, denominator: Tensor, most: float) -> float | None:
    """Ratio of the norms of two gradients, at most `most`; None if the second is zero. Not finite if a gradient is
    not."""
    if not denominator.any():
        return None
    ratio = numerator.double().norm() / (denominator.double().norm() + EPSILON)
    return float(ratio.clamp(max=most))


def smoothed(weight: float, ratio: float, smoothing: float) -> float:
    """Exponential moving average: `smoothing` of the old weight and the rest of the new ratio."""
    return smoothing * weight + (1.0 - smoothing) * ratio


BANDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
TERMS = ("loss", "loss_fm", "loss_lpips", "loss_pdino", "loss_repa")


GradientHook = Callable[[Tensor, Tensor], None]
"""Gets the gradients of L_FM and of the perceptual terms (b = 1) at the output, (b, 3, H, W) each."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms, and their thresholds; a weight of 0 leaves the term and its network out."""

    lpips: float
    pdino: float
    repa: float
    perceptual_t_min: float
    t_eps: float
    pdino_gated: bool = True
    """Whether P-DINO is gated by perceptual_t_min, or is a mean over all samples."""
    pdino_layers: tuple[int, ...] = ()
    """Layers of the feature network, from 1, that P-DINO averages over; empty: the last. REPA always uses the last."""
    repa_grid: int | None = None
    """Side of the grid of patches on which REPA compares; None: the model's grid."""


@dataclass
class LossTerms:
    """Sums and counts of each term over samples, detached, for the metrics."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, count: int) -> None:
        total = total.detach().float()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + count

    def merge(self, other: LossTerms) -> None:
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])


def band_names(term: str) -> list[str]:
    """Metric names of a term by band of t, e.g. `loss_fm_t0.2-0.4`."""
    return [f"{term}_t{low}-{high}" for low, high in pairwise(BANDS)]


def add_bands(terms: LossTerms, term: str, losses: Tensor, t: Array) -> None:
    """Add per-sample losses (B,) by band of their times t (B,), which are on the host."""
    bands = np.clip(np.searchsorted(BANDS, t, side="right") - 1, 0, len(BANDS) - 2)
    counts = np.bincount(bands, minlength=len(BANDS) - 1)
    sums = losses.new_zeros(len(counts)).index_add_(0, to_device(bands, losses.device), losses.detach())
    for name, total, count in zip(band_names(term), sums, counts.tolist(), strict=True):
        if count > 0:
            terms.add(name, total, count)


def with_gradient(value: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """The scalar `value`, as a function of `at` with this gradient."""
    return value.detach() + ((at - at.detach()) * gradient).sum()


@dataclass(frozen=True)
class _Subset:
    """Some samples of a micro-batch: their number, and their rows on the device (None: all of them)."""

    count: int
    rows: Tensor | None

    @classmethod
    def from_mask(cls, mask: NDArray[np.bool_], device: torch.device) -> _Subset:
        rows = np.flatnonzero(mask)
        return cls(len(rows), None if len(rows) == len(mask) else to_device(rows, device))

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor.index_select(0, self.rows)


_EMPTY = _Subset(0, None)


@dataclass(frozen=True)
class _MicroBatch:
    """The terms of a micro-batch, the samples that each is computed on, and the factors from a sum over samples to the
    micro-batch's share of the loss."""

    terms: LossTerms
    everyone: _Subset
    ungated: _Subset
    pdino: _Subset
    per_sample: float
    per_ungated: float


class Objective:
    """The loss of PixelGen; with no weight on perceptual terms, that of PixelDiT (section 3.4).

    `image_distance` (LPIPS or a stand-in) is needed for `weights.lpips` > 0, `patch_features` (DINOv2 or a stand-in)
    for `weights.pdino` or `weights.repa` > 0. `prediction` is the denoiser's; the perceptual terms get the image that
    it implies.
    """

    def __init__(
        self,
        weights: LossWeights,
        image_distance: ImageDistance | None,
        patch_features: PatchFeatures | None,
        prediction: PredictionKind = "image",
    ) -> None:
        assert weights.lpips == 0 or image_distance is not None
        assert weights.pdino == weights.repa == 0 or patch_features is not None
        self.weights = weights
        self.prediction = prediction
        self.image_distance = image_distance
        self.patch_features = patch_features
        self._last = patch_features.depth if patch_features is not None else 0
        self._layers = weights.pdino_layers or (self._last,)
        assert max(self._layers) <= self._last or weights.pdino == 0

    def __call__(
        self,
        output: Tensor,
        projected: Tensor | None,
        image: Tensor,
        noise: Tensor,
        t: Array,
        *,
        grid: tuple[int, int],
        batch_size: int,
        ungated: int,
        micro_batches: int,
        perceptual_weight: float = 1.0,
        gradient_hook: GradientHook | None = None,
    ) -> tuple[Tensor, LossTerms]:
        """Loss of one micro-batch, and its terms; the term "loss" is the loss with b = 1.

        Args:
            output: the denoiser's (b, 3, H, W), fp32.
            projected: its features after the projector (b, N, width); None without alignment.
            image: the clean image (b, 3, H, W) in [-1, 1]; `noise` has its shape.
            t: times (b,) on the host.
            grid: rows and columns of the model's patches.
            batch_size: samples in the global batch.
            ungated: samples of the global batch with t >= perceptual_t_min.
            micro_batches: micro-batches in the global batch, over all ranks.
            perceptual_weight: b.
            gradient_hook: called with the two gradients before this returns.
        """
        weights, everyone = self.weights, _Subset(len(t), None)
        above_t_min = _Subset.from_mask(t >= weights.perceptual_t_min, image.device)
        part = _MicroBatch(
            LossTerms(),
            everyone,
            above_t_min,
            pdino=_EMPTY if weights.pdino == 0 else above_t_min if weights.pdino_gated else everyone,
            per_sample=micro_batches / batch_size,
            per_ungated=micro_batches / max(ungated, 1),
        )
        # With a hook, the terms depend on a copy of the output, and the sum of their gradients at it is passed on.
        source = output if gradient_hook is None else output.detach().requires_grad_()
        times = to_device(t, image.device)
        flow = self._flow(part, source, image, noise, t, times)
        clean = self._clean_features(part, image, grid)
        predicted = source
        if self.prediction == "velocity":
            predicted = image_from_velocity(source, interpolate(image, noise, times), times)
        perceptual = self._lpips(part, predicted, image) + self._pdino(part, predicted, clean, grid)
        alignment = self._repa(part, projected, image, clean, grid)
        # With b = 1: the spike guard compares the loss with its past, which must not move with b.
        part.terms.add("loss", (flow + perceptual + alignment) / part.per_sample, len(t))
        loss = flow + perceptual_weight * perceptual
        if gradient_hook is not None:
            gradients = [_gradient(flow, source), _gradient(perceptual, source)]
            gradient_hook(*gradients)
            loss = with_gradient(loss, output, gradients[0] + perceptual_weight * gradients[1])
        return loss + alignment, part.terms

    def _flow(self, part: _MicroBatch, output: Tensor, image: Tensor, noise: Tensor, t: Array, times: Tensor) -> Tensor:
        flow = flow_matching_loss(output, image, noise, times, self.prediction, self.weights.t_eps)
        part.terms.add("loss_fm", flow.sum(), len(t))
        add_bands(part.terms, "loss_fm", flow, t)
        return flow.sum() * part.per_sample

    def _lpips(self, part: _MicroBatch, predicted: Tensor, image: Tensor) -> Tensor:
        seen = part.ungated
        if self.weights.lpips == 0 or seen.count == 0:
            return predicted.new_zeros(())
        assert self.image_distance is not None
        distance = self.image_distance.distance(seen.of(predicted), seen.of(image)).sum()
        part.terms.add("loss_lpips", distance, seen.count)
        return self.weights.lpips * distance * part.per_ungated

    def _aligned_here(self, grid: tuple[int, int]) -> bool:
        """Whether alignment compares on the model's grid, and so shares P-DINO's clean features."""
        side = self.weights.repa_grid
        return self.weights.repa > 0 and (side is None or (side, side) == grid)

    def _clean_features(self, part: _MicroBatch, image: Tensor, grid: tuple[int, int]) -> dict[int, Tensor]:
        """Features of the clean images by layer: of all samples for alignment, else of P-DINO's."""
        shared = self._aligned_here(grid)
        described = part.everyone if shared else part.pdino
        if described.count == 0:
            return {}
        assert self.patch_features is not None
        layers = {*(self._layers if self.weights.pdino > 0 else ()), *([self._last] if shared else ())}
        with torch.no_grad():
            found = self.patch_features.tokens(described.of(image), grid, sorted(layers))
        return dict(zip(sorted(layers), found, strict=True))

    def _pdino(self, part: _MicroBatch, predicted: Tensor, clean: dict[int, Tensor], grid: tuple[int, int]) -> Tensor:
        compared = part.pdino
        if compared.count == 0:
            return predicted.new_zeros(())
        assert self.patch_features is not None
        tokens = self.patch_features.tokens(compared.of(predicted), grid, self._layers)
        if self._aligned_here(grid):  # the features are of all samples
            clean = {layer: compared.of(clean[layer]) for layer in self._layers}
        by_layer = [cosine_distance(a, clean[n]) for n, a in zip(self._layers, tokens, strict=True)]
        distance = torch.stack(by_layer).mean(0).sum()
        part.terms.add("loss_pdino", distance, compared.count)
        per = part.per_ungated if self.weights.pdino_gated else part.per_sample
        return self.weights.pdino * distance * per

    def _repa(
        self,
        part: _MicroBatch,
        projected: Tensor | None,
        image: Tensor,
        clean: dict[int, Tensor],
        grid: tuple[int, int],
    ) -> Tensor | float:
        if self.weights.repa == 0:
            return 0.0
        assert projected is not None
        if not self._aligned_here(grid):
            assert self.patch_features is not None and self.weights.repa_grid is not None
            square = (self.weights.repa_grid, self.weights.repa_grid)
            with torch.no_grad():
                clean = {self._last: self.patch_features.tokens(image, square, [self._last])[0]}
            features_BDHW = projected.float().transpose(1, 2).unflatten(-1, grid)
            resized = F.interpolate(features_BDHW, square, mode="bilinear")
            projected = resized.flatten(2).transpose(1, 2)
        alignment = cosine_distance(projected, clean[self._last]).sum()
        part.terms.add("loss_repa", alignment, part.everyone.count)
        return self.weights.repa * alignment * part.per_sample


def _gradient(loss: Tensor, at: Tensor) -> Tensor:
    """Zeros if the loss does not depend on `at`, as when all samples are gated."""
    return torch.autograd.grad(loss, at)[0] if loss.requires_grad else torch.zeros_like(at)
