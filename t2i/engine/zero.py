"""Where each ZeRO stage of DeepSpeed keeps its fp32 masters and gradients, and how it takes up changed masters.

DeepSpeed 0.19 implements its stages by four unrelated classes; what an engine needs of each is gathered here:

- stage 0: the parameters themselves, whole on every rank. DeepSpeed accumulates in the weights' dtype here and
  has neither norm nor guard in fp32, so the weights are kept in fp32 and cast where they are used (`cast_on_use`).
- stage 1 in bf16 with fp32 gradients: `BF16_Optimizer`, with a flat slice a group; gradients are whole.
- stage 1 in fp32, and stage 2: `DeepSpeedZeroOptimizer`, with a flat slice a group.
- stage 3: every parameter is cut into equal parts, the last one padded; flat sub-groups of such parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2i.engine.optimizer import Piece


class ZeroState(Protocol):
    """The masters and gradients of a stage."""

    def pieces(self) -> list[Piece]:
        """Where this rank's slices of the masters lie, in the order of the module's parameters."""

    def grad_norm(self) -> float:
        """Norm of the accumulated gradient over all ranks; not finite where the gradient is not."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of each parameter's accumulated gradient, by name; before the update alone."""

    def refresh(self) -> None:
        """Take up masters that were written to."""


def _first_ranks(norm: Tensor) -> float:
    """Rank 0's norm of a gradient that all ranks have whole; another host may add in another order."""
    dist.broadcast(norm, src=0)
    return float(norm)


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def cast_on_use(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep a module's weights as they are and hand them out in `dtype`; their gradients arrive in their own."""
    for owner in list(module.modules()):
        for name in [name for name, _ in owner.named_parameters(recurse=False)]:
            parametrize.register_parametrization(owner, name, _Cast(dtype), unsafe=True)


def _plain_name(name: str) -> str:
    return name.replace("parametrizations.", "").removesuffix(".original")


class Stage0:
    """Whole fp32 parameters on every rank; rank 0 speaks for them."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {_plain_name(name): p for name, p in module.named_parameters()}

    def pieces(self) -> list[Piece]:
        primary = dist.get_rank() == 0
        return [Piece(name, p.shape, 0, p, 0, p.numel(), primary) for name, p in self._parameters.items()]

    def grad_norm(self) -> float:
        return _first_ranks(
            torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        )

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.grad) for name, p in self._parameters.items() if p.grad is not None)

    def refresh(self) -> None:
        """The weights are the masters."""


class Stage1And2:
    """A flat slice a group on each rank."""

    def __init__(self, module: nn.Module, zero: Any) -> None:
        self._module = module
        self._zero = zero

    def _groups(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        return self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups

    def pieces(self) -> list[Piece]:
        partitions, groups = self._groups()
        group_of = {id(p): i for i, parameters in enumerate(groups) for p in parameters}
        found = []
        for name, p in self._module.named_parameters():
            mapping = getattr(p, "_hp_mapping", None)
            start = offset = numel = 0
            if mapping is not None:  # None: this rank holds nothing of the parameter
                start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                offset = mapping.hp_fragment_address.start
            found.append(Piece(name, p.shape, start, partitions[group_of[id(p)]], offset, numel))
        return found

    def grad_norm(self) -> float:
        norm = float(self._zero.scaled_global_norm())
        return norm if norm >= 0 else math.nan  # a non-finite norm of one group is reported as -1

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        p: Any
        for name, p in self._module.named_parameters():
            if p._hp_mapping is not None:  # None: this rank holds nothing of the parameter
                yield name, p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)

    def refresh(self) -> None:
        self._zero.update_lp_params()


class Bf16Stage1(Stage1And2):
    """A flat slice a group on each rank; every rank has the whole gradient."""

    def _groups(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        return self._zero.fp32_groups_flat_partition, self._zero.bf16_groups

    def grad_norm(self) -> float:
        return _first_ranks(torch.nn.utils.get_total_norm(self._zero.fp32_groups_gradients_flat))


class Stage3:
    """Equal parts of every parameter, the last one padded."""

    def __init__(self, module: nn.Module, zero: Any) -> None:
        self._module = module
        self._zero = zero

    def pieces(self) -> list[Piece]:
        found = []
        p: Any
        for name, p in self._module.named_parameters():
            group, offset, part = self._zero.grad_position[self._zero.get_param_id(p)]
            start = min(dist.get_rank() * part, p.ds_numel)
            numel = min(part, p.ds_numel - start)
            found.append(Piece(name, p.ds_shape, start, self._zero.fp32_partitioned_groups_flat[group], offset, numel))
        return found

    def grad_norm(self) -> float:
        norm = float(combine_grad_norm_groups(self._zero._get_norm_groups()))
        return norm if norm >= 0 else math.nan

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, safe_get_local_grad(p)) for name, p in self._module.named_parameters())

    def refresh(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:  # small ones, whole on every rank
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def zero_state(stage: int, module: nn.Module, zero: Any, bf16: bool) -> ZeroState:
    """The state of an initialised DeepSpeed engine; `zero` is its `optimizer`."""
    if stage == 0:
        return Stage0(module)
    if stage == 3:
        return Stage3(module, zero)
    return Bf16Stage1(module, zero) if stage == 1 and bf16 else Stage1And2(module, zero)
