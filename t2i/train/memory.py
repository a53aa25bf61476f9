"""Whether a stage fits: the planner's estimate of it against what a rank's device has.

A stage is refused only where what every step needs, the networks with their state and the activations of their blocks,
is more than there is. The rest of the estimate is an upper bound, and leads to a notice.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from dataclasses import dataclass

import torch

from data.errors import UserError
from t2i.config import RunConfig
from t2i.plan_memory import checkpoint_bytes, total
from t2i.plan_stage import CAPTION_CACHE, StageMemory, engine_of
from t2i.plan_trained import PARTS
from t2i.train.processes import World

TIGHT = 0.9
"""Share of a device's memory from which its estimate is worth a notice."""
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes that a stage takes."""

    least: int
    """Of a rank's device: the networks, their state, and what autograd keeps of the blocks."""
    expected: int
    """Of a rank's device at the fullest moment, rather too many."""
    checkpoint: int
    """Of one checkpoint on disk."""


def estimate(config: RunConfig, ranks: int, dtype: torch.dtype) -> Estimate:
    """What a stage takes.

    Args:
        config: its settings.
        ranks: in all.
        dtype: of weights and arithmetic.

    Raises:
        UserError: what a network consists of is not known here.
    """
    engine, micro = config.engine, config.train.micro_batch_size
    memory = StageMemory.of(config, max(1, ranks // engine.replicas), dtype.itemsize)
    name = engine_of(engine)
    static = memory.static(name)
    away = sum(static.pop(part) for part in ("masters", "moments", "average")) if engine.offload else 0
    # A compiled block may keep less than an eager one.
    kept = memory.activations(micro, True if engine.compile else engine.checkpoint_blocks)
    # Activations go as gradients come, and a text encoder that is released is gone before either.
    passing = max(static.pop("gradients"), sum(kept[part] for part in PARTS), memory.released_bytes)
    static.pop(CAPTION_CACHE, None)  # there may not be as many captions
    return Estimate(
        least=total(static) + passing,
        expected=memory.device_bytes(name, micro, engine.checkpoint_blocks) - away,
        checkpoint=checkpoint_bytes(memory.network),
    )


def remedy(config: RunConfig) -> str:
    """What makes a stage take less memory, naming fields."""
    engine, train = config.engine, config.train
    ways = []
    if engine.name == "deepspeed" and engine.zero_stage < 3:
        ways.append(f"raise engine.zero_stage ({engine.zero_stage}) or set engine.name to fsdp")
    if engine.name == "deepspeed" and engine.zero_stage == 3 and not engine.offload:
        ways.append("set engine.offload")
    if engine.replicas > 1:
        ways.append(f"lower engine.replicas ({engine.replicas})")
    if train.micro_batch_size > 1:
        ways.append(f"lower train.micro_batch_size ({train.micro_batch_size})")
    if config.model.family == "pixeldit" and not engine.checkpoint_blocks:
        ways.append("set engine.checkpoint_blocks to pixel or, which takes still less, to true")
    elif engine.checkpoint_blocks is not True:
        ways.append("set engine.checkpoint_blocks to true")
    return ", or ".join([*ways, "take more ranks or larger devices"])


def check_memory(config: RunConfig, stage: str, found: Estimate, available: int) -> str | None:
    """Compare an estimate with what a rank's device has.

    Args:
        config: the stage's settings.
        stage: its name.
        found: its estimate.
        available: bytes.

    Returns:
        A notice where it may be tight.

    Raises:
        UserError: the stage cannot fit.
    """
    has = f"a rank has {available / GIB:.3g} GiB"
    if found.least > available:
        raise UserError(
            f"stage {stage} needs {found.least / GIB:.3g} GiB for its networks, their state and its blocks' "
            f"activations alone, and {has}: {remedy(config)}"
        )
    if found.expected > TIGHT * available:
        return (
            f"the memory of stage {stage} may be tight: up to {found.expected / GIB:.3g} GiB are expected, and {has}; "
            f"if that is not enough, {remedy(config)}"
        )
    return None


def device_bytes(world: World) -> int:
    """Memory of a rank's device, the least over all ranks; on CPUs, a host's by its ranks. A collective."""
    if world.device.type == "cuda":
        mine = torch.cuda.get_device_properties(world.device).total_memory
    else:
        mine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    everywhere = world.gather((socket.gethostname(), mine))
    ranks = Counter(host for host, _ in everywhere)
    return min(has if world.device.type == "cuda" else has // ranks[host] for host, has in everywhere)
