"""Muon on sharded matrices.

Muon orthogonalises whole matrices. The ranks first sum their slices of a matrix's momentum into the whole; one rank
orthogonalises each matrix; a second sum gives every rank its slice of the result. This works for any engine.

Source: Jordan et al., "Muon: An optimizer for hidden layers" (2024). Updates are scaled to a root mean square of 0.2
as in Liu et al., "Muon is Scalable for LLM Training" (2025), so one learning rate fits all shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from t2i.engine.engine import BUCKET_NUMEL, Piece, all_reduce_sum

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix: singular values end in about [0.7, 1.2].

    Five Newton-Schulz iterations in the dtype of `matrix` (rows, columns).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def muon_step(pieces: Iterable[Piece], state: Mapping[Any, Mapping[str, Tensor]], group: Mapping[str, Any]) -> None:
    """Update the matrices of a parameter group, in buckets of whole matrices that are the same on every rank.

    `pieces` are one a matrix, in the same order on every rank; `state` holds the `momentum` of their tensors.
    """
    bucket: list[Piece] = []
    for piece in pieces:
        if bucket and sum(p.shape.numel() for p in bucket) + piece.shape.numel() > BUCKET_NUMEL:
            _step_bucket(bucket, state, group)
            bucket = []
        bucket.append(piece)
    if bucket:
        _step_bucket(bucket, state, group)


def _step_bucket(bucket: list[Piece], state: Mapping[Any, Mapping[str, Tensor]], group: Mapping[str, Any]) -> None:
    sizes = [piece.shape.numel() for piece in bucket]
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    whole = torch.zeros(sum(sizes), device=bucket[0].tensor.device, dtype=group["work_dtype"])
    for piece, part in zip(bucket, whole.split(sizes), strict=True):
        assert piece.tensor.grad is not None
        gradient, momentum = piece.of(piece.tensor.grad), piece.of(state[piece.tensor]["momentum"])
        momentum.lerp_(gradient, 1.0 - group["momentum"])
        if piece.is_primary:  # Nesterov momentum
            part[piece.start : piece.start + piece.numel] = gradient.lerp(momentum, group["momentum"])
    all_reduce_sum(whole)
    result = torch.zeros_like(whole)
    sources, targets = whole.split(sizes), result.split(sizes)
    for index in range(rank, len(bucket), ranks):
        targets[index].copy_(orthogonalise(sources[index].view(bucket[index].shape)).reshape(-1))
    all_reduce_sum(result)
    for piece, part in zip(bucket, targets, strict=True):
        scale = UPDATE_RMS * max(piece.shape) ** 0.5
        own = part[piece.start : piece.start + piece.numel]
        piece.of(piece.tensor).mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(own * (group["lr"] * scale))
