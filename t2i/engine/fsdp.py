"""FSDP2 (`fully_shard`) behind the engine's interface.

- One sharded unit for each transformer block and one for the rest. The fp32 shards are the master weights; blocks are
  gathered in the compute dtype, and their gradients reduced in fp32, into fp32 shards, after every micro-step.
- A parameter is cut along its first axis, so a rank's shard is a contiguous slice of the flattened tensor. The
  optimizer works on the local shards as plain tensors.
- With `dp_replicate` above 1 the shards are replicated (HSDP): gathers stay inside a group of ranks / dp_replicate
  ranks, and the first group saves the state.
- FSDP2 has no gradient norm, clipping or skipped updates: they are implemented here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from t2i.engine.engine import (
    HasBlocks,
    MicroSteps,
    Piece,
    Shards,
    SkipUpdate,
    StepResult,
    all_reduce_sum,
    check_update,
)
from t2i.engine.optimizer import Optimizer


def _mesh(device: torch.device, dp_replicate: int) -> DeviceMesh:
    ranks = dist.get_world_size()
    if dp_replicate == 1:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    assert ranks % dp_replicate == 0, "the config is checked against the number of ranks"
    return init_device_mesh(device.type, (dp_replicate, ranks // dp_replicate), mesh_dim_names=("replica", "shard"))


class FsdpEngine:
    """A module under FSDP2.

    Args:
        module: the trainable network, fp32, the same on every rank; frozen networks stay outside.
        optimizer: from `build_optimizer`, over the module's parameters.
        dtype: of gathered weights and arithmetic: bf16 or fp32.
        accumulation: micro-steps per optimizer step.
        clip_grad_norm: largest global gradient norm; 0 disables clipping.
        reshard_after_forward: whether a block's weights are dropped after its forward pass and gathered again for
            its backward pass (like ZeRO-3), or stay until then (like ZeRO-2).
        dp_replicate: groups of ranks that each hold the whole state; divides the number of ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        device: torch.device,
        dtype: torch.dtype,
        accumulation: int,
        clip_grad_norm: float,
        reshard_after_forward: bool,
        dp_replicate: int,
    ) -> None:
        self._optimizer = optimizer
        self._accumulation = accumulation
        self._clip_grad_norm = clip_grad_norm
        mesh = _mesh(device, dp_replicate)
        settings: dict[str, Any] = {
            "mesh": mesh,
            # Inputs keep their types: times and tables are fp32 on purpose.
            "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        }
        module.to(device)
        blocks: HasBlocks = module  # type: ignore[assignment]
        for block in blocks.blocks:
            fully_shard(block, reshard_after_forward=reshard_after_forward, **settings)
        fully_shard(module, reshard_after_forward=False, **settings)  # the backward pass begins with its weights
        self.network = module
        self._micro_steps = MicroSteps(module, accumulation)
        self._parameters: dict[str, DTensor] = dict(module.named_parameters())  # type: ignore[arg-type]
        self._pieces = [self._piece(name, p, mesh) for name, p in self._parameters.items()]
        for group in optimizer.param_groups:
            group["params"] = [p.tensor for p in self._pieces if p.name in group["names"]]
        self.shards: Shards = optimizer.register_shards(self._pieces)

    def _piece(self, name: str, parameter: DTensor, mesh: DeviceMesh) -> Piece:
        """This rank's rows of a parameter: the same number on every rank, but fewer or none on the last ranks."""
        detached: Any = parameter.detach()
        local = detached.to_local()
        rows = math.ceil(parameter.shape[0] / mesh["shard"].size())
        row = min(rows * mesh.get_local_rank("shard"), parameter.shape[0])
        start = row * parameter.shape[1:].numel()
        is_primary = mesh.ndim == 1 or mesh.get_local_rank("replica") == 0
        return Piece(name, parameter.shape, start, local, 0, local.numel(), is_primary)

    @property
    def optimizer_steps(self) -> int:
        """Updates applied to the moments."""
        return self._optimizer.optimizer_steps

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None:
        self._optimizer.optimizer_steps = count

    def sync_params_from_master(self) -> None:
        """Drop gathered weights: the next forward pass gathers them from the master weights."""
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; its gradients are averaged over ranks at once."""
        self._micro_steps.begin_backward()
        (loss / self._accumulation).backward()

    def step(self, lr: Callable[[bool], float], skip_update: SkipUpdate) -> StepResult:
        """As `Engine.step`."""
        self._micro_steps.finish()
        gradients = self._local_gradients()
        primary = [gradients[piece.name] for piece in self._pieces if piece.is_primary]
        squared = torch.zeros((), device=self._pieces[0].tensor.device)
        if primary:
            squared += torch.nn.utils.get_total_norm(primary).square()
        norm = float(all_reduce_sum(squared).sqrt())
        result = check_update(norm, skip_update, gradients.items())
        if result.skip_reason is None:
            if self._clip_grad_norm > 0:
                torch._foreach_mul_(list(gradients.values()), min(1.0, self._clip_grad_norm / (norm + 1e-6)))
            for group in self._optimizer.param_groups:
                group["lr"] = lr(group["muon"])
            self._optimizer.step()
        self.network.zero_grad()
        for piece in self._pieces:
            piece.tensor.grad = None
        return result

    def _local_gradients(self) -> dict[str, Tensor]:
        """This rank's gradients by name, which are also set on the optimizer's tensors."""
        gradients = {}
        for piece in self._pieces:
            gradient = self._parameters[piece.name].grad
            assert isinstance(gradient, DTensor), f"{piece.name} has no gradient"
            gradients[piece.name] = piece.tensor.grad = gradient.to_local()
        return gradients

    def close(self) -> None:
        """Nothing outlives the last reference to the engine."""
