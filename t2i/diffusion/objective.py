"""The loss of one micro-batch: flow matching + gated perceptual terms + representation alignment.

`L = L_FM + 0.1 L_LPIPS + 0.01 L_P-DINO + w L_REPA` (PixelGen eq. 6), one scalar for one backward.

- Every mean is over the *global* batch. Flow matching and alignment average over all samples, the perceptual
  terms over the un-gated ones (t at or above the gate), whose global number is known from the slots. The engine
  averages gradients over `micro_batches` (ranks x accumulation steps), so a micro-batch contributes
  `sum_i l_i / N_global * micro_batches`.
- The perceptual networks see un-gated samples only; the clean image's patch features serve both P-DINO and REPA.
- No term of a gated sample reaches its gradient. Gating selects samples; it never changes a collective.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from t2i.diffusion.flow import Array, flow_matching_loss
from t2i.diffusion.perceptual import ImageDistance, PatchFeatures, cosine_distance

BANDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
TERMS = ("loss", "loss_fm", "loss_lpips", "loss_pdino", "loss_repa")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms and the two thresholds; a weight of 0 leaves the term and its network out."""

    lpips: float
    pdino: float
    repa: float
    gate: float
    min_noise: float


@dataclass
class Terms:
    """Sums and counts of each term over samples, detached: what the metrics are made of."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, count: int) -> None:
        total = total.detach().float()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + count

    def merge(self, other: Terms) -> None:
        """Enter another micro-batch's terms."""
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])


def band_names(term: str) -> list[str]:
    """Names of a term restricted to the bands of t, e.g. `loss_fm_t0.2-0.4`."""
    return [f"{term}_t{low}-{high}" for low, high in pairwise(BANDS)]


def add_bands(terms: Terms, term: str, losses: Tensor, t: Array) -> None:
    """Enter per-sample losses (B,) by band of their host times t (B,)."""
    bands = np.clip(np.searchsorted(BANDS, t, side="right") - 1, 0, len(BANDS) - 2)
    for band, name in enumerate(band_names(term)):
        index = np.flatnonzero(bands == band)
        if len(index) > 0:
            terms.add(name, losses.detach()[index].sum(), len(index))


class Objective:
    """The loss of PixelGen for an x-predicting denoiser.

    Args:
        weights: of the terms.
        image_distance: LPIPS or a stand-in; needed where `weights.lpips` > 0.
        patch_features: DINOv2 or a stand-in; needed where `weights.pdino` or `weights.repa` > 0.
    """

    def __init__(
        self, weights: LossWeights, image_distance: ImageDistance | None, patch_features: PatchFeatures | None
    ) -> None:
        assert weights.lpips == 0 or image_distance is not None
        assert weights.pdino == weights.repa == 0 or patch_features is not None
        self.weights = weights
        self.image_distance = image_distance
        self.patch_features = patch_features

    def __call__(
        self,
        predicted: Tensor,
        projected: Tensor | None,
        image: Tensor,
        t: Array,
        *,
        grid: tuple[int, int],
        batch_size: int,
        ungated: int,
        micro_batches: int,
    ) -> tuple[Tensor, Terms]:
        """Loss of one micro-batch.

        Args:
            predicted: the denoiser's image (b, 3, H, W), fp32.
            projected: its features after the projector (b, N, width); None without alignment.
            image: the clean image (b, 3, H, W) in [-1, 1].
            t: times (b,) on the host.
            grid: rows and columns of the model's patches.
            batch_size: samples in the global batch.
            ungated: samples of the global batch with t >= gate.
            micro_batches: micro-batches in the global batch, over all ranks.
        """
        w = self.weights
        terms = Terms()
        per_sample = micro_batches / batch_size
        per_ungated = micro_batches / max(ungated, 1)
        open_gate = np.flatnonzero(t >= w.gate)
        times = torch.from_numpy(t).to(predicted.device)

        flow = flow_matching_loss(predicted, image, times, w.min_noise)
        loss = flow.sum() * per_sample
        terms.add("loss_fm", flow.sum(), len(t))
        add_bands(terms, "loss_fm", flow, t)

        if w.lpips > 0 and len(open_gate) > 0:
            assert self.image_distance is not None
            distance = self.image_distance.distance(predicted[open_gate], image[open_gate]).sum()
            loss = loss + w.lpips * distance * per_ungated
            terms.add("loss_lpips", distance, len(open_gate))

        # Alignment needs the features of every clean image, P-DINO those of un-gated ones.
        described = np.arange(len(t)) if w.repa > 0 else open_gate if w.pdino > 0 else open_gate[:0]
        if len(described) > 0:
            assert self.patch_features is not None
            with torch.no_grad():
                target = self.patch_features.tokens(image[described], grid)
            if w.pdino > 0 and len(open_gate) > 0:
                tokens = self.patch_features.tokens(predicted[open_gate], grid)
                distance = cosine_distance(tokens, target[np.searchsorted(described, open_gate)]).sum()
                loss = loss + w.pdino * distance * per_ungated
                terms.add("loss_pdino", distance, len(open_gate))
            if w.repa > 0:
                assert projected is not None
                alignment = cosine_distance(projected, target).sum()
                loss = loss + w.repa * alignment * per_sample
                terms.add("loss_repa", alignment, len(t))

        terms.add("loss", loss / per_sample, len(t))
        return loss, terms
