"""Rank of the test that measures static memory: bytes a parameter that each engine holds, by engine and dtype.

ZeRO-1 is the trainer's engine; ZeRO-2 and ZeRO-3 are DeepSpeed, FSDP2 is PyTorch, set up alike.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from t2i.engine.deepspeed import DeepSpeedEngine
from t2i.engine.ema import Ema
from t2i.engine.optimizer import Optimizer, build_optimizer
from t2i.models.pixelgen import PixelGen
from t2i.plan_memory import BUCKET, FP32

SMALL_BUCKET = 10_000
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def live_bytes() -> int:
    """Of all tensors, each storage once. The meta device holds nothing; DeepSpeed's bucket is not static memory."""
    gc.collect()
    found: dict[int, int] = {}
    for it in gc.get_objects():
        if not issubclass(type(it), Tensor):
            continue
        for tensor in (it, it.grad if it.is_leaf else None):
            local = getattr(tensor, "_local_tensor", tensor)
            if local is not None and local.device.type == "cpu":
                storage = local.untyped_storage()
                if storage.nbytes() < FP32 * BUCKET:
                    found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def network() -> PixelGen:
    sizes = {"width": 96, "depth": 3, "heads": 2, "text_depth": 1, "patch_size": 4, "bottleneck": 24, "repa_layer": 2}
    return PixelGen(text_width=32, text_length=8, **sizes)


def loss_of(net: Callable[..., object]) -> Tensor:
    out = net(torch.randn(1, 3, 16, 16), torch.rand(1), torch.randn(1, 8, 32))
    return out.image.square().mean() + out.features.float().square().mean()  # type: ignore[attr-defined]


def optimizer(net: nn.Module, dtype: torch.dtype) -> Optimizer:
    return build_optimizer(
        net, muon=lambda _: False, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, muon_momentum=0.9, work_dtype=dtype
    )


def zero1(dtype: torch.dtype) -> Callable[[], None]:
    net = network()
    engine = DeepSpeedEngine(
        net,
        optimizer(net, dtype),
        zero_stage=1,
        device=torch.device("cpu"),
        dtype=dtype,
        micro_batch_size=1,
        accumulation=2,
        clip_grad_norm=1.0,
    )
    average = Ema(engine.shards, 0.9)

    def half_step(last: bool) -> None:
        engine.micro_step(loss_of(engine.network))
        if last:
            engine.step(lambda muon: 1e-3, lambda norm: None)
            average.update()

    return steps(half_step)


def zero(stage: int, dtype: torch.dtype) -> Callable[[], None]:
    net = network()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": SMALL_BUCKET,
            "stage3_prefetch_bucket_size": SMALL_BUCKET,
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=net, optimizer=optimizer(net, dtype), dist_init_required=False, config=config
        )

    def half_step(last: bool) -> None:
        engine.backward(loss_of(engine))
        engine.step()

    return steps(half_step)


def fsdp2(dtype: torch.dtype) -> Callable[[], None]:
    net = network()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in (*net.text_blocks, *net.blocks):
        fully_shard(block, mp_policy=policy)
    fully_shard(net, mp_policy=policy)
    adam = torch.optim.AdamW(net.parameters(), fused=True)

    def half_step(last: bool) -> None:
        loss_of(net).backward()
        if last:
            adam.step()
            adam.zero_grad()

    return steps(half_step)


def steps(half_step: Callable[[bool], None]) -> Callable[[], None]:
    """A step, and half of one: moments are there, and gradients wait; what is returned keeps it all alive."""
    for last in (False, True, False):
        half_step(last)
    return lambda: half_step(True)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo", verbose=False)
    engines: dict[str, Callable[[torch.dtype], Callable[[], None]]] = {
        "zero1": zero1,
        "zero2": lambda dtype: zero(2, dtype),
        "zero3": lambda dtype: zero(3, dtype),
        "fsdp2": fsdp2,
    }
    parameters = sum(p.numel() for p in network().parameters())
    measured = {}
    for name, build in engines.items():
        for dtype_name, dtype in DTYPES.items():
            before = live_bytes()
            held = build(dtype)
            measured[f"{name} {dtype_name}"] = (live_bytes() - before) / parameters
            held()  # ends the step; only then may the engine go
            del held
    if dist.get_rank() == 0:
        print(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
