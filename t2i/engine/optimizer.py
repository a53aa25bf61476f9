"""AdamW, and Muon for matrices, on slices, with a veto.

An engine hands the optimizer fp32 tensors that hold its slices of the parameters: one flat tensor a group, or one
tensor a parameter. AdamW needs nothing else. Muon orthogonalises whole matrices, so the ranks first put their
slices of a matrix's momentum together; each matrix is worked on by one rank, and every rank takes its slice of the
result: two sums over ranks, whatever the engine.

Muon: Jordan et al., "Muon: An optimizer for hidden layers" (2024); updates are scaled to a root mean square of
0.2 as in Liu et al., "Muon is Scalable for LLM Training" (2025), so one learning rate fits all shapes.

State in files that are mapped into memory, for machines whose memory does not hold it.

- The system keeps what there is room for and writes the rest out: slower than memory, but no process is killed for it.
- A file has no name: what is to last is in checkpoints, and a run that is killed leaves nothing behind.
- Its blocks are reserved at once: a page that finds the disk full in mid-training would end the process (SIGBUS).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.errors import UserError
from t2i.engine.engine import BUCKET_NUMEL, Shard, all_reduce_sum

ZerosLike = Callable[[Tensor], Tensor]
"""Makes the zeros that a moment or an average begins as: `torch.zeros_like`, or that of a `StateFolder`."""


@dataclass(frozen=True)
class StateFolder:
    """A folder, made if need be, on whose disk state lies."""

    folder: Path

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros of the shape of an fp32 tensor in host memory, over a file that lives as long as they do.

        Raises:
            UserError: the tensor is on a GPU, or the folder cannot be written to or has no room.
        """
        if tensor.device.type != "cpu":
            raise UserError(
                f"{self._field}: the optimizer's state is on the device {tensor.device.type}, and only what lies in "
                "host memory can be mapped: set engine.offload, or leave engine.offload_dir out"
            )
        assert tensor.dtype == torch.float32
        return self.zeros(tensor.numel()).view(tensor.shape)

    @property
    def _field(self) -> str:
        return f"engine.offload_dir {self.folder}"

    def zeros(self, numel: int) -> Tensor:
        """fp32 zeros (numel,) over a file that lives as long as they do.

        Raises:
            UserError: the folder cannot be written to or has no room.
        """
        if numel == 0:  # nothing cannot be mapped
            return torch.zeros(0)
        field, size = self._field, 4 * numel
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if size > free:  # else the disk would be filled before the system refuses
                raise UserError(
                    f"{field}: {free / 2**30:.3g} GiB are free, and the next part of the optimizer's state needs "
                    f"{size / 2**30:.3g} GiB: give a folder with 28 bytes for each parameter of a rank"
                )
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=numel)
        except OSError as error:
            raise UserError(f"{field}: cannot hold the optimizer's state: {error.strerror}") from error


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


class Piece(NamedTuple):
    """Where this rank's slice of a parameter lies: in the flattened parameter, and in a tensor of the optimizer.

    `tensor` is fp32 and contiguous; it may hold slices of many parameters (ZeRO's flat partitions), one, or none.
    `primary` is False where another rank holds the same slice and speaks for it.
    """

    name: str
    shape: torch.Size
    start: int
    tensor: Tensor
    offset: int
    numel: int
    primary: bool = True

    def of(self, tensor: Tensor) -> Tensor:
        """The slice (numel,) of a tensor that is laid out like `self.tensor`."""
        return tensor.reshape(-1)[self.offset : self.offset + self.numel]


class Optimizer(torch.optim.AdamW):
    """AdamW for groups with `muon` False, Muon for those with True.

    `vetoed` makes the next step leave weights and moments alone: engines call `step` on their own, so this is
    the one place where an update can be stopped in every engine. An engine that has sharded the parameters says
    by `adopt` what became of them. `zeros_like` makes the moments.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        muon_names: frozenset[str],
        betas: tuple[float, float],
        eps: float,
        zeros_like: ZerosLike,
    ) -> None:
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self.vetoed = False
        self.muon_names = muon_names
        self._zeros_like = zeros_like
        self._matrices: dict[Tensor, list[Piece]] = {}

    def adopt(self, pieces: Sequence[Piece]) -> dict[str, Shard]:
        """Create the state of the tensors that hold the parameters; the slices by parameter name.

        Args:
            pieces: one a parameter, in the same order on every rank.
        """
        shards: dict[str, Shard] = {}
        for piece in pieces:
            muon = piece.name in self.muon_names
            if piece.tensor not in self.state:
                self.state[piece.tensor] = initial_state(piece.tensor, muon, self._zeros_like)
            if muon:
                self._matrices.setdefault(piece.tensor, []).append(piece)
            moments = {k: piece.of(t) for k, t in self.state[piece.tensor].items() if k != "step"}
            value = piece.of(piece.tensor.detach())
            shards[piece.name] = Shard(piece.shape, piece.start, value, moments, piece.primary)
        return shards

    @property
    def optimizer_steps(self) -> int:
        """Updates applied to the moments: AdamW's bias correction counts with it."""
        return next(int(state["step"].item()) for state in self.state.values() if "step" in state)

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None:
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(count)

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
        """A bucket of whole matrices at a time; the same buckets on every rank."""
        bucket: list[Piece] = []
        for piece in (piece for tensor in group["params"] for piece in self._matrices[tensor]):
            if sum(p.shape.numel() for p in bucket) + piece.shape.numel() > BUCKET_NUMEL and bucket:
                self._apply_bucket(bucket, group)
                bucket = []
            bucket.append(piece)
        if bucket:
            self._apply_bucket(bucket, group)

    def _apply_bucket(self, bucket: list[Piece], group: dict[str, Any]) -> None:
        """Nesterov momentum on the slices, matrices put together, worked on, and applied by slice."""
        sizes = [piece.shape.numel() for piece in bucket]
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        whole = torch.zeros(sum(sizes), device=bucket[0].tensor.device, dtype=group["work_dtype"])
        for piece, part in zip(bucket, whole.split(sizes), strict=True):
            assert piece.tensor.grad is not None
            gradient, momentum = piece.of(piece.tensor.grad), piece.of(self.state[piece.tensor]["momentum"])
            momentum.lerp_(gradient, 1.0 - group["momentum"])
            if piece.primary:
                part[piece.start : piece.start + piece.numel] = gradient.lerp(momentum, group["momentum"])
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
            piece.of(piece.tensor).mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(mine * (group["lr"] * scale))


def initial_state(tensor: Tensor, muon: bool, zeros_like: ZerosLike) -> dict[str, Tensor]:
    """Zero moments for a tensor, so that a state exists before the first step."""
    if muon:
        return {"momentum": zeros_like(tensor)}
    return {
        "step": torch.zeros((), device=tensor.device),
        "exp_avg": zeros_like(tensor),
        "exp_avg_sq": zeros_like(tensor),
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
    zeros_like: ZerosLike = torch.zeros_like,
) -> Optimizer:
    """An optimizer over a module's parameters; `muon(name)` says which matrices Muon takes, `zeros_like` where the
    moments lie.

    Weight decay is for the matrices of linear layers alone: biases, norms, embeddings and learned positions have none.
    Learning rates are set before every step (`Engine.step`).
    """
    parameters = dict(module.named_parameters())
    muon_names = frozenset(name for name, p in parameters.items() if p.ndim == 2 and muon(name))
    decayed = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    kinds: dict[tuple[bool, float], list[str]] = {}
    for name, p in parameters.items():
        kinds.setdefault((name in muon_names, weight_decay if id(p) in decayed else 0.0), []).append(name)
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in names],
            "names": frozenset(names),
            "muon": by_muon,
            "lr": 0.0,
            "weight_decay": decay,
            "momentum": muon_momentum,
            "work_dtype": work_dtype,
        }
        for (by_muon, decay), names in sorted(kinds.items())
    ]
    return Optimizer(groups, muon_names, betas, eps, zeros_like)
