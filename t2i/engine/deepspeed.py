"""DeepSpeed ZeRO-1 behind the interface that the trainer uses.

- bf16 weights with fp32 masters and fp32 gradient accumulation, or fp32 throughout.
- One `backward` a micro-batch: ZeRO loses a loss silently where there are two.
- bf16 gradients are added to the fp32 ones as they arise (`immediate_grad_update`): added at the end, they were
  counted twice under accumulation wherever the module was called without the wrapper.
- The global gradient norm is known before weights move; a vetoed or non-finite update reaches neither weights
  nor moments, in either dtype.
- Master weights, moments and their places are handed out as slices by parameter name (`shards`).

DeepSpeed's own checkpoints, schedulers and client state are not used.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from t2i.engine.optimizer import MatrixSlice, Optimizer, initial_state
from t2i.engine.shards import Shard

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimizer that is not its own


class StepResult(NamedTuple):
    """Outcome of one optimizer step: the global gradient norm before clipping, and why the update was not
    applied (None: it was)."""

    grad_norm: float
    vetoed: str | None


class DeepSpeedEngine:
    """A module under ZeRO-1.

    Args:
        module: the trainable network, fp32, the same on every rank; frozen networks stay outside.
        optimizer: from `build_optimizer`, over the module's parameters.
        device: of this rank.
        dtype: of weights and arithmetic: bf16 or fp32.
        micro_batch_size: samples a micro-step.
        accumulation: micro-steps an optimizer step.
        clip_grad_norm: largest global gradient norm.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch_size: int,
        accumulation: int,
        clip_grad_norm: float,
    ) -> None:
        initial = {name: p.detach().float().flatten().clone() for name, p in module.named_parameters()}
        self._optimizer = optimizer
        self._accumulation = accumulation
        self._micro_step = 0
        config = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_grad_norm,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",  # or the fp32 gradients would be summed over ranks in bf16
            "steps_per_print": None,
        }
        with redirect_stdout(io.StringIO()):  # it prints its memory at every turn
            self._engine, *_ = deepspeed.initialize(
                model=module.to(device), optimizer=optimizer, dist_init_required=False, config=config
            )
        # Calls go through DeepSpeed's wrapper: its forward arms the clearing of gradients between micro-steps.
        self.network: nn.Module = self._engine
        self._module: nn.Module = self._engine.module
        self._zero: Any = self._engine.optimizer
        # In bf16 with fp32 gradients ZeRO-1 is DeepSpeed's BF16_Optimizer, in fp32 its DeepSpeedZeroOptimizer.
        self._is_bf16 = dtype == torch.bfloat16
        self.shards = self._name_shards()
        for name, shard in self.shards.items():
            # ZeRO made its masters from bf16 weights; start from the fp32 ones.
            shard.value.copy_(initial[name][shard.start : shard.stop])
        self.refresh()

    def _name_shards(self) -> dict[str, Shard]:
        """Create the optimizer's state and cut it and the masters into slices by parameter name."""
        zero = self._zero
        partitions = zero.fp32_groups_flat_partition if self._is_bf16 else zero.single_partition_of_fp32_groups
        low_precision = zero.bf16_groups if self._is_bf16 else zero.bit16_groups
        groups = self._optimizer.param_groups
        for flat, group in zip(partitions, groups, strict=True):
            self._optimizer.state[flat] = initial_state(flat, group["muon"])
        group_of = {id(p): i for i, params in enumerate(low_precision) for p in params}
        shards: dict[str, Shard] = {}
        for name, parameter in self._module.named_parameters():
            index = group_of[id(parameter)]
            flat, mapping = partitions[index], getattr(parameter, "_hp_mapping", None)
            start = flat_start = numel = 0
            if mapping is not None:  # None: this rank holds nothing of the parameter
                start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                flat_start = mapping.hp_fragment_address.start
            held = slice(flat_start, flat_start + numel)
            moments = {k: t[held] for k, t in self._optimizer.state[flat].items() if t.shape == flat.shape}
            shards[name] = Shard(parameter.shape, start, flat.detach()[held], moments)
            if groups[index]["muon"]:
                groups[index]["layout"].append(MatrixSlice(parameter.shape, start, flat_start, numel))
        return shards

    def refresh(self) -> None:
        """Bring the network's weights up to date after the masters (`shards`) were written to."""
        self._zero.update_lp_params()

    @property
    def updates(self) -> int:
        """Updates applied to the moments: AdamW's bias correction counts with it."""
        steps = [s["step"] for s in self._optimizer.state.values() if "step" in s]
        return int(steps[0].item())

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(count)

    def micro_step(self, loss: Tensor) -> None:
        """Backward of one micro-batch; the last of an optimizer step also sums gradients over ranks."""
        self._engine.backward(loss)
        self._micro_step += 1
        if self._micro_step % self._accumulation:
            self._engine.step()

    def _grad_norm(self) -> float:
        if self._is_bf16:
            return float(torch.nn.utils.get_total_norm(self._zero.fp32_groups_gradients_flat))
        norm = float(self._zero.scaled_global_norm())
        return norm if norm >= 0 else math.nan  # ZeRO reports a non-finite norm as -1

    def step(self, lr: Callable[[bool], float], veto: Callable[[float], str | None]) -> StepResult:
        """Apply the accumulated gradient, unless it is not finite or vetoed.

        Args:
            lr: learning rate of a group; the argument says whether it is Muon's.
            veto: sees the global gradient norm before weights move; a reason stops the update.
        """
        norm = self._grad_norm()
        reason = veto(norm) if math.isfinite(norm) else f"the gradient norm is {norm}"
        for group in self._optimizer.param_groups:
            group["lr"] = lr(group["muon"])
        self._optimizer.vetoed = reason is not None
        self._engine.step()
        self._optimizer.vetoed = False
        return StepResult(norm, reason)

    def close(self) -> None:
        """Release hooks and memory, so that the next stage can build its own engine."""
        self._engine.destroy()
