"""DeepSpeed ZeRO, stages 0 to 3, behind the engine's interface.

- bf16 weights with fp32 master weights and fp32 gradient accumulation, or fp32 throughout.
- One `backward` a micro-batch: ZeRO loses a loss silently if there are two, so a second one is refused.
- bf16 gradients are added to the fp32 ones as they arise (`immediate_grad_update`): added at the end, they are
  counted twice under accumulation if the module is called without DeepSpeed's wrapper.
- The optimizer itself is told to skip a step, so that weights and moments stay as they are in every stage and dtype.
- DeepSpeed's own checkpoints, schedulers and client state are not used.

DeepSpeed 0.19 implements its stages by four unrelated classes. `ZeroState` is what an engine needs of each:

- stage 0: the parameters themselves, whole on every rank. DeepSpeed accumulates in the weights' dtype here and checks
  neither norm nor overflow in fp32, so the weights are kept in fp32 and cast where they are used (`cast_on_use`).
- stage 1 in bf16: `BF16_Optimizer`, with one flat slice a group; gradients are whole.
- stage 1 in fp32, and stage 2: `DeepSpeedZeroOptimizer`, with one flat slice a group.
- stage 3: every parameter is cut into equal parts, the last one padded; flat sub-groups of such parts.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2i.engine.engine import (
    BUCKET_NUMEL,
    PERSISTENT_NUMEL,
    MicroSteps,
    Piece,
    Shards,
    SkipUpdate,
    StepResult,
    check_update,
)
from t2i.engine.optimizer import Optimizer

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimizer that is not its own


class ZeroState(Protocol):
    """The master weights and gradients of a stage."""

    def pieces(self) -> list[Piece]:
        """This rank's slices of the master weights, in the order of the module's parameters."""

    def grad_norm(self) -> float:
        """Norm of the accumulated gradient over all ranks; not finite if the gradient is not."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's slices of the accumulated gradients, by name; valid before the update only."""

    def sync_params_from_master(self) -> None:
        """Update the network's weights after the master weights were written to."""


def _broadcast_norm(norm: Tensor) -> float:
    """Rank 0's norm of a gradient that all ranks hold whole: another host may sum in another order."""
    dist.broadcast(norm, src=0)
    return float(norm)


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def cast_on_use(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a module read its weights in `dtype`; the weights themselves and their gradients keep their own dtype."""
    for owner in list(module.modules()):
        for name in [name for name, _ in owner.named_parameters(recurse=False)]:
            parametrize.register_parametrization(owner, name, _Cast(dtype), unsafe=True)


class Stage0:
    """Whole fp32 parameters on every rank; rank 0's are primary."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {
            name.replace("parametrizations.", "").removesuffix(".original"): p for name, p in module.named_parameters()
        }

    def pieces(self) -> list[Piece]:
        is_primary = dist.get_rank() == 0
        return [Piece(name, p.shape, 0, p, 0, p.numel(), is_primary) for name, p in self._parameters.items()]

    def grad_norm(self) -> float:
        return _broadcast_norm(torch.nn.utils.get_total_norm([gradient for _, gradient in self.gradients()]))

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.grad) for name, p in self._parameters.items() if p.grad is not None)

    def sync_params_from_master(self) -> None:
        """The weights are the master weights."""


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
            if mapping is not None:  # else this rank holds nothing of the parameter
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
            if p._hp_mapping is not None:  # else this rank holds nothing of the parameter
                yield name, p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)

    def sync_params_from_master(self) -> None:
        self._zero.update_lp_params()


class Bf16Stage1(Stage1And2):
    """A flat slice a group on each rank; every rank has the whole gradient."""

    def _groups(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        return self._zero.fp32_groups_flat_partition, self._zero.bf16_groups

    def grad_norm(self) -> float:
        return _broadcast_norm(torch.nn.utils.get_total_norm(self._zero.fp32_groups_gradients_flat))


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
        return norm if norm >= 0 else math.nan  # as for stage 2

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, safe_get_local_grad(p)) for name, p in self._module.named_parameters())

    def sync_params_from_master(self) -> None:
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


class DeepSpeedEngine:
    """A module under ZeRO.

    Args:
        module: the trainable network, fp32, the same on every rank; frozen networks stay outside.
        optimizer: from `build_optimizer`, over the module's parameters.
        dtype: of weights and arithmetic: bf16 or fp32.
        offload: keep gradients, master weights and moments in host memory; only at zero_stage 3, since at 1 and 2
            DeepSpeed does not clear what a skipped step accumulated in bf16.
        accumulation: micro-steps per optimizer step.
        clip_grad_norm: largest global gradient norm; 0 disables clipping.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        zero_stage: int,
        device: torch.device,
        dtype: torch.dtype,
        offload: bool,
        micro_batch_size: int,
        accumulation: int,
        clip_grad_norm: float,
    ) -> None:
        assert zero_stage == 3 or not offload
        initial = {name: p.detach().float().flatten().clone() for name, p in module.named_parameters()}
        self._optimizer = optimizer
        bf16 = dtype == torch.bfloat16
        if zero_stage == 0 and bf16:
            cast_on_use(module, dtype)
        config = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_grad_norm,
            "zero_optimization": {
                "stage": zero_stage,
                "reduce_bucket_size": BUCKET_NUMEL,  # fp32 numbers in a buffer; the default takes 2 GB
                "allgather_bucket_size": BUCKET_NUMEL,
                "stage3_param_persistence_threshold": PERSISTENT_NUMEL,
                "offload_optimizer": {"device": "cpu" if offload else "none", "pin_memory": device.type == "cuda"},
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": bf16 and zero_stage > 0, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",  # or the fp32 gradients would be summed over ranks in bf16
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-step
        }
        with redirect_stdout(io.StringIO()):  # it prints memory use
            self._engine, *_ = deepspeed.initialize(
                model=module.to(device), optimizer=optimizer, dist_init_required=False, config=config
            )
        # Calls go through DeepSpeed's wrapper: its forward arms the clearing of gradients between micro-steps.
        self.network: nn.Module = self._engine
        self._micro_steps = MicroSteps(self.network, accumulation)
        self._state = zero_state(zero_stage, self._engine.module, self._engine.optimizer, bf16)
        self.shards: Shards = optimizer.register_shards(self._state.pieces())
        for name, shard in self.shards.items():
            # ZeRO made its master weights from bf16 weights; start from the fp32 ones.
            shard.param.copy_(initial[name][shard.start : shard.stop])
        self.sync_params_from_master()

    @property
    def optimizer_steps(self) -> int:
        """Updates applied to the moments."""
        return self._optimizer.optimizer_steps

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None:
        self._optimizer.optimizer_steps = count

    def sync_params_from_master(self) -> None:
        """As `Engine.sync_params_from_master`."""
        self._state.sync_params_from_master()

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; the last of an optimizer step also sums gradients over ranks."""
        self._micro_steps.begin_backward()
        self._engine.backward(loss)
        if not self._micro_steps.complete:
            self._engine.step()

    def step(self, lr: Callable[[bool], float], skip_update: SkipUpdate) -> StepResult:
        """As `Engine.step`."""
        self._micro_steps.finish()
        result = check_update(self._state.grad_norm(), skip_update, self._state.gradients())
        for group in self._optimizer.param_groups:
            group["lr"] = lr(group["muon"])
        self._optimizer.skip_update = result.skip_reason is not None
        self._engine.step()
        self._optimizer.skip_update = False
        return result

    def close(self) -> None:
        """Release hooks and memory, so that the next stage can build its own engine."""
        self._engine.destroy()
