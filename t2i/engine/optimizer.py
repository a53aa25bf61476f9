"""AdamW, and Muon for matrices, on flat slices, with a veto.

An engine hands the optimizer one flat fp32 tensor a group. AdamW needs nothing else. Muon orthogonalises whole
matrices, so the ranks first put their slices of a matrix's momentum together; each matrix is worked on by one
rank, and every rank takes its slice of the result: two sums over ranks, whatever the engine.

Muon: Jordan et al., "Muon: An optimizer for hidden layers" (2024); updates are scaled to a root mean square of
0.2 as in Liu et al., "Muon is Scalable for LLM Training" (2025), so one learning rate fits all shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2i.engine.shards import BUCKET_NUMEL, all_reduce_sum

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values end in about [0.7, 1.2].

    Five Newton-Schulz iterations in the dtype of `matrix` (rows, columns).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


@dataclass(frozen=True)
class MatrixSlice:
    """Where this rank's slice of a matrix lies: in the flattened matrix, and in the group's flat tensor."""

    shape: torch.Size
    start: int
    flat_start: int
    numel: int


class Optimizer(torch.optim.AdamW):
    """AdamW for groups with `muon` False, Muon for those with True.

    `vetoed` makes the next step leave weights and moments alone: engines call `step` on their own, so this is
    the one place where an update can be stopped in every engine. A Muon group's `layout`, its matrices in order as
    `MatrixSlice`s, is filled by the engine once it has sharded the parameters.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self.vetoed = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.vetoed:
            return
        # An engine may present its groups one at a time, so they are taken as they stand now.
        groups = self.param_groups
        self.param_groups = [g for g in groups if not g["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)

    def _muon_step(self, group: dict[str, Any]) -> None:
        """Nesterov momentum on the flat slice, then a bucket of whole matrices at a time."""
        (flat,) = group["params"]
        momentum = self.state[flat]["momentum"]
        momentum.lerp_(flat.grad, 1.0 - group["momentum"])
        update = flat.grad.lerp(momentum, group["momentum"])
        flat.mul_(1.0 - group["lr"] * group["weight_decay"])
        bucket: list[MatrixSlice] = []
        for piece in group["layout"]:
            if sum(p.shape.numel() for p in bucket) + piece.shape.numel() > BUCKET_NUMEL and bucket:
                self._apply_bucket(flat, update, bucket, group)
                bucket = []
            bucket.append(piece)
        self._apply_bucket(flat, update, bucket, group)

    def _apply_bucket(self, flat: Tensor, update: Tensor, bucket: list[MatrixSlice], group: dict[str, Any]) -> None:
        sizes = [piece.shape.numel() for piece in bucket]
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        whole = torch.zeros(sum(sizes), device=flat.device, dtype=group["work_dtype"])
        for piece, part in zip(bucket, whole.split(sizes), strict=True):
            part[piece.start : piece.start + piece.numel] = update[piece.flat_start : piece.flat_start + piece.numel]
        all_reduce_sum(whole)
        result = torch.zeros_like(whole)
        for index, (piece, source, target) in enumerate(
            zip(bucket, whole.split(sizes), result.split(sizes), strict=True)
        ):
            if index % ranks == rank:
                target.copy_(orthogonalise(source.view(piece.shape)).reshape(-1))
        all_reduce_sum(result)
        for piece, part in zip(bucket, result.split(sizes), strict=True):
            scale = UPDATE_RMS * max(piece.shape) ** 0.5
            mine = part[piece.start : piece.start + piece.numel]
            flat[piece.flat_start : piece.flat_start + piece.numel].sub_(mine * (group["lr"] * scale))


def initial_state(flat: Tensor, muon: bool) -> dict[str, Tensor]:
    """Zero moments for a flat tensor, so that a state exists before the first step."""
    if muon:
        return {"momentum": torch.zeros_like(flat)}
    return {
        "step": torch.zeros((), device=flat.device),
        "exp_avg": torch.zeros_like(flat),
        "exp_avg_sq": torch.zeros_like(flat),
    }


def build_optimizer(
    module: nn.Module,
    *,
    muon: Callable[[str], bool],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    muon_momentum: float,
    work_dtype: torch.dtype,
) -> Optimizer:
    """An optimizer over a module's parameters; `muon(name)` says which matrices Muon takes.

    Learning rates are set before every step (`Engine.step`).
    """
    groups: list[dict[str, Any]] = []
    for by_muon in (False, True):
        named = [(name, p) for name, p in module.named_parameters() if (p.ndim == 2 and muon(name)) == by_muon]
        if named:
            groups.append(
                {
                    "params": [p for _, p in named],
                    "muon": by_muon,
                    "lr": 0.0,
                    "weight_decay": weight_decay,
                    "momentum": muon_momentum,
                    "work_dtype": work_dtype,
                    "layout": [],
                }
            )
    return Optimizer(groups, betas, eps)
