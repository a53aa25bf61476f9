"""DeepSpeed ZeRO, stages 0 to 3, behind the interface that the trainer uses.

- bf16 weights with fp32 masters and fp32 gradient accumulation, or fp32 throughout.
- One `backward` a micro-batch: ZeRO loses a loss silently where there are two, so a second one is refused.
- bf16 gradients are added to the fp32 ones as they arise (`immediate_grad_update`): added at the end, they were
  counted twice under accumulation wherever the module was called without the wrapper.
- The global gradient norm is known before weights move; a vetoed or non-finite update reaches neither weights
  nor moments, in any stage and dtype: our optimizer is told, whatever DeepSpeed thinks of the update.
- Master weights, moments and their places are handed out as slices by parameter name (`shards`).

DeepSpeed's own checkpoints, schedulers and client state are not used.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from contextlib import redirect_stdout

import deepspeed
import torch
from torch import Tensor, nn

from t2i.engine.interface import MicroSteps, StepResult, not_finite
from t2i.engine.optimizer import Optimizer
from t2i.engine.shards import BUCKET_NUMEL, Shards
from t2i.engine.zero import cast_on_use, zero_state

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimizer that is not its own

PERSISTENT_NUMEL = 100_000  # parameters up to this size stay whole on every rank under ZeRO-3


class DeepSpeedEngine:
    """A module under ZeRO.

    Args:
        module: the trainable network, fp32, the same on every rank; frozen networks stay outside.
        optimizer: from `build_optimizer`, over the module's parameters.
        zero_stage: 0 shards nothing over ranks, 1 the optimizer, 2 gradients too, 3 weights too.
        device: of this rank.
        dtype: of weights and arithmetic: bf16 or fp32.
        offload: at zero_stage 3, hold gradients, masters and moments in host memory. At 1 and 2 DeepSpeed keeps what a
            vetoed step accumulated in bf16.
        micro_batch_size: samples a micro-step.
        accumulation: micro-steps an optimizer step.
        clip_grad_norm: largest global gradient norm; 0 is none.
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
                "reduce_bucket_size": BUCKET_NUMEL,  # a buffer of so many fp32 numbers; the default takes 2 GB
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
        with redirect_stdout(io.StringIO()):  # it prints its memory at every turn
            self._engine, *_ = deepspeed.initialize(
                model=module.to(device), optimizer=optimizer, dist_init_required=False, config=config
            )
        # Calls go through DeepSpeed's wrapper: its forward arms the clearing of gradients between micro-steps.
        self.network: nn.Module = self._engine
        self._micro_steps = MicroSteps(self.network, accumulation)
        self._state = zero_state(zero_stage, self._engine.module, self._engine.optimizer, bf16)
        self.shards: Shards = optimizer.adopt(self._state.pieces())
        for name, shard in self.shards.items():
            # ZeRO made its masters from bf16 weights; start from the fp32 ones.
            shard.value.copy_(initial[name][shard.start : shard.stop])
        self.refresh()

    @property
    def updates(self) -> int:
        """Updates applied to the moments."""
        return self._optimizer.updates

    @updates.setter
    def updates(self, count: int) -> None:
        self._optimizer.updates = count

    def refresh(self) -> None:
        """Bring the network's weights up to date after the masters (`shards`) were written to."""
        self._state.refresh()

    def micro_step(self, loss: Tensor) -> None:
        """Backward of one micro-batch; the last of an optimizer step also sums gradients over ranks."""
        self._micro_steps.begin_backward()
        self._engine.backward(loss)
        if not self._micro_steps.complete:
            self._engine.step()

    def step(self, lr: Callable[[bool], float], veto: Callable[[float], str | None]) -> StepResult:
        """Apply the accumulated gradient, unless it is not finite or vetoed."""
        self._micro_steps.finish()
        norm = self._state.grad_norm()
        finite = math.isfinite(norm)
        reason = veto(norm) if finite else f"the gradient norm is {norm}"
        bad = () if finite else not_finite(self._state.gradients())
        for group in self._optimizer.param_groups:
            group["lr"] = lr(group["muon"])
        self._optimizer.vetoed = reason is not None
        self._engine.step()
        self._optimizer.vetoed = False
        return StepResult(norm, reason, bad)

    def close(self) -> None:
        """Release hooks and memory, so that the next stage can build its own engine."""
        self._engine.destroy()
