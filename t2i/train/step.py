"""One optimizer step: a global batch through the loss, micro-batch by micro-batch, and the update.

Everything random in it is a function of (seed, stage, slot), so its mathematics knows neither the number of ranks nor
the micro-batch.

Means of the loss's terms over the samples of all ranks.

What depends on the step or the slot alone: learning rates and times. Pure functions.

Gradient balancing: the perceptual terms pull at the head as hard as flow matching does (PixelGen, appendix A.2).

Every so many steps the norms of both gradients at the head's weight are measured, over the global batch, and their
ratio enters a moving average that multiplies the perceptual terms from the next step on. A measurement costs two small
matrix products: see `t2i/diffusion/objective.py`.

It differs from the public code where that is at odds with itself: the ratio is of the global batch, not of each rank's
last micro-batch, so that all ranks share one weight; the weight is in the checkpoint; a vetoed update leaves it alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.loader import Batch
from data.randomness import hash_u64, key, uniform
from t2i.build import Denoiser
from t2i.config.run import RunConfig
from t2i.config.train import ObjectiveConfig, OptimizerConfig
from t2i.diffusion.flow import Array, interpolate, logit_normal, shift_time, slot_noise, to_unit_range
from t2i.diffusion.objective import (
    TERMS,
    GradientHook,
    LossTerms,
    Objective,
    band_names,
    head_gradients,
    norm_ratio,
    smoothed,
)
from t2i.distributed import World
from t2i.engine.engine import Engine, StepResult, all_reduce_sum
from t2i.models.layers import KEY_BITS, patchify, to_device
from t2i.models.pixelgen import ClassPixelGen, PixelGen
from t2i.models.text import Conditioner, stack_conditions


class GlobalMeans:
    """Means of the named terms, by one sum over ranks; terms without a sample are left out. All ranks make it.

    They are on their way to the host once this is made, and waited for when they are read: a step waits for its device
    once, where it needs the gradient norm, which is later.

    Args:
        terms: this rank's.
        names: given, since a rank whose samples are all gated has no perceptual term.
        device: where the sums are.
    """

    def __init__(self, terms: LossTerms, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        nothing = torch.zeros((), device=device)
        sums = torch.stack([terms.sums.get(name, nothing) for name in names]).double()
        counts = np.array([terms.counts.get(name, 0) for name in names], np.float64)
        table = all_reduce_sum(torch.stack([sums, to_device(counts, device)]))
        self._arrived: torch.cuda.Event | None = None
        self._table: Tensor = table
        if device.type == "cuda":
            self._table = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._table.copy_(table, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> dict[str, float]:
        """The means by name."""
        if self._arrived is not None:
            self._arrived.synchronize()
        sums, counts = self._table.numpy()
        return {name: float(s / c) for name, s, c in zip(self._names, sums, counts, strict=True) if c > 0}


def learning_rate(config: OptimizerConfig, step: int, steps: int, peak: float) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, plateau, and what the schedule lowers it by."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        return peak * warm * config.step_down_factor ** sum(step >= round(at * steps) for at in config.step_down_at)
    decay_steps = round(config.decay_fraction * steps)
    progress = (step - (steps - decay_steps)) / decay_steps if decay_steps else 0.0
    progress = min(max(progress, 0.0), 1.0)
    if config.schedule == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    return peak * warm * (1.0 - (1.0 - config.final_lr_fraction) * progress)


def training_times(config: ObjectiveConfig, quantile: Array) -> Array:
    """Times t of the training density at quantiles in (0, 1)."""
    return shift_time(logit_normal(quantile, config.logit_mean, config.logit_std), config.shift)


class GradientBalance:
    """The multiplier of the perceptual terms in one stage. All ranks take part.

    A step is `begin`, the micro-steps, then `finish`.

    Args:
        config: of the stage, with `objective.balance_from_step`.
        head: the denoiser's last layer, a linear one from tokens (B, N, D) to the values of their patches. Copies of
            the network are to be made before: they would report here too.
    """

    def __init__(self, config: RunConfig, head: nn.Module) -> None:
        self._objective, self._patch_size = config.objective, config.model.patch_size
        self._micro_batches = config.train.batch_size // config.train.micro_batch_size
        self.weight = 1.0
        self._measuring = False
        self._tokens: Tensor | None = None  # what went into the head last
        self._sum: Tensor | None = None  # both gradients at the head's weight (2, P, D)
        head.register_forward_pre_hook(self._see)

    @property
    def state(self) -> dict[str, Any]:
        """A copy of everything that outlives a step."""
        return {"weight": self.weight}

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on from what `state` was at a checkpoint."""
        self.weight = state["weight"]

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._measuring:
            self._tokens = inputs[0].detach()

    def begin(self, step: int) -> GradientHook | None:
        """What the objective is to show the step's gradients to, if they are measured.

        Args:
            step: steps before this one.
        """
        start = self._objective.balance_from_step
        assert start is not None
        self._measuring = step >= start and step % self._objective.balance_every == 0
        return self._add if self._measuring else None

    def _add(self, flow: Tensor, perceptual: Tensor) -> None:
        assert self._tokens is not None, "the head has not run"
        found = head_gradients(self._tokens, patchify(flow, self._patch_size), patchify(perceptual, self._patch_size))
        self._sum = found if self._sum is None else self._sum + found
        self._tokens = None

    def finish(self, applied: bool) -> None:
        """End the step; a measurement counts unless its update was vetoed."""
        if not self._measuring:
            return
        assert self._sum is not None
        flow, perceptual = all_reduce_sum(self._sum) / self._micro_batches
        self._measuring, self._sum = False, None
        ratio = norm_ratio(flow, perceptual, self._objective.balance_max)
        if applied and ratio is not None:
            self.weight = smoothed(self.weight, ratio, self._objective.balance_smoothing)


def build_balance(config: RunConfig, denoiser: Denoiser) -> GradientBalance | None:
    """The stage's balancing, where its config asks for it."""
    if config.objective.balance_from_step is None:
        return None
    assert isinstance(denoiser, PixelGen | ClassPixelGen)  # the config says so
    return GradientBalance(config, denoiser.head)


PURPOSES = ("time", "noise", "caption", "dropout")
"""What a step draws for each slot."""

Veto = Callable[[float, float], str | None]
"""(mean loss of the global batch, gradient norm) to the reason why the update must not be applied, or None."""


class Trained(NamedTuple):
    """What a step came to: the means of the loss's terms over the global batch, alike on all ranks, and the update."""

    means: dict[str, float]
    result: StepResult
    own_s: float
    """Seconds that this rank took for what it does without waiting for others: the captions of its share, upload and
    noise of the first micro-batch. A slow device or host shows here; all else is as slow as the slowest rank."""


class _Stopwatch:
    """Seconds between two points of the work on a device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times: list[float] = []

    def press(self) -> None:
        """The first point, then the second."""
        if self._events:
            self._events[len(self._times)].record()
        self._times.append(time.perf_counter())

    def seconds(self) -> float:
        """Once the work behind the second point is done."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._times[1] - self._times[0]


class TrainingStep:
    """Makes the steps of one stage. All ranks take part in each.

    Args:
        config: the stage's settings.
        stage: its name.
        world: this process.
        conditioner: reads captions.
        null_caption: what stands for no caption: states (L, E), or a class ().
        objective: the loss.
        engine: the network that is trained.
        balance: multiplies the perceptual terms; None: nothing does.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        world: World,
        conditioner: Conditioner,
        null_caption: Tensor,
        objective: Objective,
        engine: Engine,
        balance: GradientBalance | None = None,
    ) -> None:
        self._config, self._world = config, world
        self._conditioner, self._null_caption = conditioner, null_caption
        self._objective, self._engine, self._balance = objective, engine, balance
        self._keys = {purpose: key(config.seed, stage, purpose) for purpose in PURPOSES}

    def __call__(self, batch: Batch, step: int, veto: Veto) -> Trained:
        """Train on this rank's share of a global batch.

        Args:
            step: steps before this one.
        """
        own = _Stopwatch(self._world.device)
        terms = self._accumulate(batch, step, own)
        pending = GlobalMeans(terms, [*TERMS, *band_names("loss_fm")], self._world.device)
        result = self._engine.step(lambda muon: self._rate(step, muon), lambda norm: veto(pending.read()["loss"], norm))
        means = pending.read()
        if self._balance is not None:
            means["perceptual_weight"] = self._balance.weight
            self._balance.finish(applied=result.vetoed is None)
        return Trained(means, result, own.seconds())

    def rates(self, step: int) -> dict[str, float]:
        """Learning rates of a step, by their names in the metrics."""
        rates = {"lr": self._rate(step, muon=False)}
        if self._config.optimizer.name == "muon":
            rates["lr_muon"] = self._rate(step, muon=True)
        return rates

    def _rate(self, step: int, muon: bool) -> float:
        optimizer = self._config.optimizer
        return learning_rate(optimizer, step, self._config.train.steps, optimizer.muon_lr if muon else optimizer.lr)

    def _conditions(self, batch: Batch) -> list[Tensor]:
        """Conditions of this rank's share of a batch, the null caption where caption dropout takes one.

        The rest are encoded in one call, each caption once, and stay for the step: at most share x L x E values. Who is
        dropped is known on the host, so that nothing waits for the device.
        """
        dropped = uniform(self._keys["caption"], batch.slots) < self._config.objective.caption_dropout
        kept = [caption for caption, gone in zip(batch.captions, dropped, strict=True) if not gone]
        encoded = iter(self._conditioner(kept))
        return [self._null_caption if gone else next(encoded) for gone in dropped]

    def _dropout_keys(self, slots: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Keys (B,) of the samples' dropout masks; nothing where the network has no dropout."""
        if self._config.model.dropout == 0:
            return ()
        keys = hash_u64(self._keys["dropout"], slots) >> np.uint64(64 - KEY_BITS)
        return (to_device(keys.astype(np.int64), self._world.device),)

    def _accumulate(self, batch: Batch, step: int, own: _Stopwatch) -> LossTerms:
        """All micro-steps; the sums of this rank's loss terms."""
        own.press()
        conditions = self._conditions(batch)
        config, size, device = self._config, self._config.train.batch_size, self._world.device
        first = int(batch.slots[0]) // size * size
        all_times = training_times(config.objective, uniform(self._keys["time"], range(first, first + size)))
        ungated = int((all_times >= config.objective.perceptual_t_min).sum())
        t = all_times[batch.slots - first]
        balance, terms = self._balance, LossTerms()
        gradient_hook = balance.begin(step) if balance is not None else None
        micro, patch = config.train.micro_batch_size, config.model.patch_size
        for part, pixels in batch.micro_batches(micro):
            image = to_unit_range(pixels.to(device, non_blocking=True))
            times = to_device(t[part].astype(np.float32), device)
            scale = config.objective.noise_scale
            noise = slot_noise(self._keys["noise"], batch.slots[part], image.shape[1:], device, scale)
            condition = stack_conditions(conditions[part])
            masks = self._dropout_keys(batch.slots[part])
            if part.start == 0:
                own.press()
            output, projected = self._engine.network(interpolate(image, noise, times), times, condition, *masks)
            loss, part_terms = self._objective(
                output,
                projected,
                image,
                noise,
                t[part],
                grid=(image.shape[2] // patch, image.shape[3] // patch),
                batch_size=size,
                ungated=ungated,
                micro_batches=size // micro,
                perceptual_weight=balance.weight if balance is not None else 1.0,
                gradient_hook=gradient_hook,
            )
            self._engine.backward(loss)
            terms.merge(part_terms)
        return terms
