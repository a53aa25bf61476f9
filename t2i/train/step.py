"""One optimizer step: a global batch through the loss, micro-batch by micro-batch, and the update.

Everything random in it is a function of (seed, stage, slot), so the result depends neither on the number of ranks nor
on the micro-batch size.
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
from t2i.distributed import World, to_device
from t2i.engine.engine import Engine, StepResult, all_reduce_sum
from t2i.models.layers import KEY_BITS, patchify
from t2i.models.pixelgen import ClassPixelGen, PixelGen
from t2i.models.text import Conditioner, stack_conditions


class GlobalMeans:
    """Means of loss terms over the samples of all ranks; terms without a sample are left out. A collective.

    `names` are the same on all ranks, while `terms` may lack one: a rank whose samples are all gated has no perceptual
    term. The copy to the host starts here and is awaited in `read`, so that a step waits for its device only once, for
    the gradient norm.
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
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, plateau, and the schedule's decay."""
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
    """Gradient balancing: keeps the gradient of the perceptual terms as large as that of flow matching.

    PixelGen, appendix A.2. Every `objective.balance_every` steps, the norms of both gradients at the weight of the head
    are measured, and their ratio enters a moving average that multiplies the perceptual terms from the next step on.
    Unlike in the authors' code, the ratio is of the global batch and not of each rank's last micro-batch, the weight is
    in the checkpoint, and a skipped update leaves the weight as it is.

    A step is `begin`, the micro-steps, then `finish`. `head` is the denoiser's last layer, linear, from tokens
    (B, N, D) to patches. Copy the network before: a copy's head would report here too.
    """

    def __init__(self, config: RunConfig, head: nn.Module) -> None:
        self._objective, self._patch_size = config.objective, config.model.patch_size
        self._micro_batches = config.train.batch_size // config.train.micro_batch_size
        self.weight = 1.0
        self._measuring = False
        self._tokens: Tensor | None = None  # what went into the head last
        self._sum: Tensor | None = None  # both gradients at the head's weight (2, P, D)
        head.register_forward_pre_hook(self._see)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._measuring:
            self._tokens = inputs[0].detach()

    def begin(self, step: int) -> GradientHook | None:
        """The objective's gradient hook if step `step` (from 0) is measured."""
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
        """End the step; a measurement counts unless the update was skipped."""
        if not self._measuring:
            return
        assert self._sum is not None
        flow, perceptual = all_reduce_sum(self._sum) / self._micro_batches
        self._measuring, self._sum = False, None
        ratio = norm_ratio(flow, perceptual, self._objective.balance_max)
        if applied and ratio is not None:
            self.weight = smoothed(self.weight, ratio, self._objective.balance_smoothing)


def build_balance(config: RunConfig, denoiser: Denoiser) -> GradientBalance | None:
    if config.objective.balance_from_step is None:
        return None
    assert isinstance(denoiser, PixelGen | ClassPixelGen)  # the config refuses others
    return GradientBalance(config, denoiser.head)


PURPOSES = ("time", "noise", "caption", "dropout")
"""Random numbers that a step draws for each slot; hashed into their keys."""

SkipUpdate = Callable[[float, float], str | None]
"""Given the mean loss of the global batch and the gradient norm: why the update should be skipped, or None."""


class StepOutput(NamedTuple):
    """Outcome of a step, the same on all ranks but for `own_s`."""

    means: dict[str, float]
    """Loss terms by name, over the global batch."""
    result: StepResult
    own_s: float
    """Seconds that this rank spent without waiting for others: encoding its captions, and upload and noise of the first
    micro-batch. A slow device or host shows here; everything else takes as long as on the slowest rank."""


class _Stopwatch:
    """Seconds between two points of a device's work, measured without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times: list[float] = []

    def press(self) -> None:
        """Mark the first point, then the second."""
        if self._events:
            self._events[len(self._times)].record()
        self._times.append(time.perf_counter())

    def seconds(self) -> float:
        """Call it once the work before the second point is done."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._times[1] - self._times[0]


class TrainingStep:
    """The steps of one stage. All ranks take part in each.

    `null_caption` replaces dropped captions: text states (L, E), or a class ().
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

    def __call__(self, batch: Batch, step: int, skip_update: SkipUpdate) -> StepOutput:
        """Train on this rank's share of the global batch of step `step` (from 0)."""
        own = _Stopwatch(self._world.device)
        terms = self._accumulate(batch, step, own)
        pending = GlobalMeans(terms, [*TERMS, *band_names("loss_fm")], self._world.device)
        result = self._engine.step(
            lambda muon: self._rate(step, muon), lambda grad_norm: skip_update(pending.read()["loss"], grad_norm)
        )
        means = pending.read()
        if self._balance is not None:
            means["perceptual_weight"] = self._balance.weight
            self._balance.finish(applied=result.skip_reason is None)
        return StepOutput(means, result, own.seconds())

    def rates(self, step: int) -> dict[str, float]:
        """Learning rates of step `step` (from 0), by their names in the metrics."""
        rates = {"lr": self._rate(step, muon=False)}
        if self._config.optimizer.name == "muon":
            rates["lr_muon"] = self._rate(step, muon=True)
        return rates

    def _rate(self, step: int, muon: bool) -> float:
        optimizer = self._config.optimizer
        return learning_rate(optimizer, step, self._config.train.steps, optimizer.muon_lr if muon else optimizer.lr)

    def _conditions(self, batch: Batch) -> list[Tensor]:
        """Conditions of this rank's share of a batch, with caption dropout.

        One call encodes all captions that are kept, and the result stays for the step: at most share x L x E values.
        Dropout is decided on the host, so that nothing waits for the device.
        """
        dropped = uniform(self._keys["caption"], batch.slots) < self._config.objective.caption_dropout
        kept = [caption for caption, gone in zip(batch.captions, dropped, strict=True) if not gone]
        encoded = iter(self._conditioner(kept))
        return [self._null_caption if gone else next(encoded) for gone in dropped]

    def _dropout_keys(self, slots: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Keys (B,) of the samples' dropout masks, if the network has dropout."""
        if self._config.model.dropout == 0:
            return ()
        keys = hash_u64(self._keys["dropout"], slots) >> np.uint64(64 - KEY_BITS)
        return (to_device(keys.astype(np.int64), self._world.device),)

    def _accumulate(self, batch: Batch, step: int, own: _Stopwatch) -> LossTerms:
        """Run forward and backward on all micro-batches; the sums of this rank's loss terms."""
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
