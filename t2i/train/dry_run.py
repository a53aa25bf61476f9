"""One optimizer step on noise before the first real one, so that shapes, kernels and memory are tried at once.

An engine's vetoed step reaches neither weights nor moments, and all that is random belongs to slots: nothing of a dry
run is left.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from data.errors import UserError
from data.loader import Batch
from data.randomness import key, uniform
from t2i.config import RunConfig
from t2i.plan_networks import open_share
from t2i.plan_stage import open_samples
from t2i.train.memory import remedy
from t2i.train.observe import memory_gib
from t2i.train.processes import World
from t2i.train.schedule import training_times
from t2i.train.step import TrainingStep


def made_up_batch(config: RunConfig, stage: str, step: int, world: World) -> Batch:
    """A rank's share of a batch of noise in the stage's full shape, the largest bucket's, for the step that comes.

    Its slots are of that step, dealt out so that in each micro-batch as many samples are over the gate as will ever be.
    Its caption fills text.length: none takes more memory.
    Deterministic; no generator is touched.

    Args:
        config: the stage's settings.
        stage: its name.
        step: steps done.
    """
    train, (height, width) = config.train, config.data.largest
    share = train.batch_size // world.size
    slots = np.arange(step * train.batch_size, (step + 1) * train.batch_size)
    over = training_times(config.objective, uniform(key(config.seed, stage, "time"), slots)) >= config.objective.gate
    wanted = open_samples(train.micro_batch_size, open_share(config.objective))
    seen, unseen = (slots[chosen] if chosen.any() else slots for chosen in (over, ~over))
    dealt = np.concatenate([np.resize(seen, wanted), np.resize(unseen, train.micro_batch_size - wanted)])
    pixels = np.random.default_rng(world.rank).integers(0, 256, (share, 3, height, width), np.uint8)
    return Batch(
        pixels=[torch.from_numpy(pixels)],
        captions=["" if config.model.condition == "class" else "a " * config.text.length] * share,
        ids=[f"made up/{number}" for number in range(share)],
        slots=np.resize(dealt, share),
        state={},
        set_aside=[],
        wait_s=0.0,
    )


def no_update(loss: float, grad_norm: float) -> str:
    """The veto of a dry run."""
    return "dry run"


def dry_run(train: TrainingStep, config: RunConfig, stage: str, world: World) -> str:
    """Run a stage's first step on noise, and veto its update. All ranks take part.

    Args:
        train: makes the stage's steps.
        config: the stage's settings.
        stage: its name.
        world: this process.

    Returns:
        A sentence with its seconds and the peak of memory so far.

    Raises:
        UserError: the device has not enough memory.
    """
    began = time.perf_counter()
    try:
        train(made_up_batch(config, stage, 0, world), 0, no_update)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(
            f"the stage's step does not fit into the device's memory ({reason}): {remedy(config)}"
        ) from error
    seconds = time.perf_counter() - began
    return f"a dry step took {seconds:.1f} s and {memory_gib(world.device):.2f} GiB"
