"""One optimizer step: a global batch through the loss, micro-batch by micro-batch, and the update.

Everything random in it is a function of (seed, stage, slot), so its mathematics knows neither the number of ranks nor
the micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.loader import Batch
from data.randomness import hash_u64, key, uniform
from t2i.config import RunConfig
from t2i.diffusion.flow import interpolate, to_unit_range
from t2i.diffusion.noise import slot_noise
from t2i.diffusion.objective import TERMS, Objective, Terms, band_names
from t2i.engine.interface import Engine, StepResult
from t2i.models.conditions import Conditioner, stack_conditions
from t2i.models.dropout import KEY_BITS
from t2i.train.balance import GradientBalance
from t2i.train.means import GlobalMeans
from t2i.train.processes import World
from t2i.train.schedule import learning_rate, training_times
from t2i.upload import upload

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
        return (upload(keys.astype(np.int64), self._world.device),)

    def _accumulate(self, batch: Batch, step: int, own: _Stopwatch) -> Terms:
        """All micro-steps; the sums of this rank's loss terms."""
        own.press()
        conditions = self._conditions(batch)
        config, size, device = self._config, self._config.train.batch_size, self._world.device
        first = int(batch.slots[0]) // size * size
        all_times = training_times(config.objective, uniform(self._keys["time"], range(first, first + size)))
        ungated = int((all_times >= config.objective.gate).sum())
        t = all_times[batch.slots - first]
        balance, terms = self._balance, Terms()
        watch = balance.begin(step) if balance is not None else None
        micro, patch = config.train.micro_batch_size, config.model.patch_size
        for part, pixels in batch.micro_batches(micro):
            image = to_unit_range(pixels.to(device, non_blocking=True))
            times = upload(t[part].astype(np.float32), device)
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
                watch=watch,
            )
            self._engine.micro_step(loss)
            terms.merge(part_terms)
        return terms
