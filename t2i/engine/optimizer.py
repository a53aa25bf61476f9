"""AdamW, and Muon for matrices, on slices of parameters; and optimizer state in memory-mapped files.

An engine hands the optimizer fp32 tensors that hold its slices of the parameters: one flat tensor a group, or one
tensor a parameter.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import UserError
from data.files import name_in_errors
from t2i.engine.engine import Piece, Shard
from t2i.engine.muon import muon_step

ZerosLike = Callable[[Tensor], Tensor]
"""Makes the zeros that a moment or EMA begins as: `torch.zeros_like`, or `OffloadDir.zeros_like`."""


@dataclass(frozen=True)
class OffloadDir:
    """A folder, made if need be, whose files hold fp32 state, for machines whose memory does not hold it.

    The files are memory-mapped: the kernel keeps in memory what fits and writes out the rest, which is slower, but no
    process is killed for lack of memory. They have no names, so a killed run leaves nothing behind.
    """

    folder: Path

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros of the shape of an fp32 tensor in host memory, over a file that exists as long as they do.

        Raises:
            UserError: the tensor is on a GPU, or the folder cannot be written to or has no room.
        """
        if tensor.device.type != "cpu":
            raise UserError(
                f"engine.offload_dir {self.folder}: the optimizer's state is on the device {tensor.device.type}, and "
                "only state in host memory can be mapped: set engine.offload, or leave engine.offload_dir out"
            )
        assert tensor.dtype == torch.float32
        return self.zeros(tensor.numel()).view(tensor.shape)

    def zeros(self, numel: int) -> Tensor:
        """fp32 zeros (numel,) over a file that exists as long as they do.

        Raises:
            UserError: the folder cannot be written to or has no room.
        """
        if numel == 0:  # an empty file cannot be mapped
            return torch.zeros(0)
        field, size = f"engine.offload_dir {self.folder}", 4 * numel
        with name_in_errors(field, "used for the optimizer's state"):
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if size > free:  # else the disk would be filled before the system refuses
                raise UserError(
                    f"{field}: {free / 2**30:.3g} GiB are free, and the next part of the optimizer's state needs "
                    f"{size / 2**30:.3g} GiB: give a folder with 28 bytes for each parameter of a rank"
                )
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Reserved at once: a page that finds the disk full during training would end the process (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=numel)


class Optimizer(torch.optim.AdamW):
    """AdamW for groups with `muon` False, Muon for those with True.

    `skip_update` makes the next step leave weights and moments alone. Engines call `step` on their own, so this is
    the one place where an update can be stopped in every engine.
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
        self.skip_update = False
        self._muon_names = muon_names
        self._zeros_like = zeros_like
        self._matrices: dict[Tensor, list[Piece]] = {}

    def register_shards(self, pieces: Sequence[Piece]) -> dict[str, Shard]:
        """Create the moments of the tensors that an engine holds the parameters in; return the shards by name.

        `pieces` are one a parameter, in the same order on every rank.
        """
        shards: dict[str, Shard] = {}
        for piece in pieces:
            muon = piece.name in self._muon_names
            if piece.tensor not in self.state:
                self.state[piece.tensor] = initial_state(piece.tensor, muon, self._zeros_like)
            if muon:
                self._matrices.setdefault(piece.tensor, []).append(piece)
            moments = {k: piece.of(t) for k, t in self.state[piece.tensor].items() if k != "step"}
            param = piece.of(piece.tensor.detach())
            shards[piece.name] = Shard(piece.shape, piece.start, param, moments, piece.is_primary)
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
        if self.skip_update:
            return
        groups = self.param_groups  # read at each step: an engine may present its groups one at a time
        self.param_groups = [g for g in groups if not g["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["muon"]:
                muon_step([piece for t in group["params"] for piece in self._matrices[t]], self.state, group)


def initial_state(tensor: Tensor, muon: bool, zeros_like: ZerosLike) -> dict[str, Tensor]:
    """Zero moments, so that a state exists before the first step."""
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
    """An optimizer over a module's parameters; Muon takes the matrices for whose name `muon` is true.

    Only the matrices of linear layers have weight decay: biases, norms, embeddings and learned positions have none.
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
