"""Seconds of a training step by its parts, stamped from outside: the step itself knows nothing of it.

- One part is current at a time, and all time is some part's: the seconds of the parts add up to the whole.
- The backward of a network lies between two identities that autograd passes: the one at its exit, then the one at its
  entry. Autograd goes in reverse order, so the backward passes of two networks do not mix.
- On a GPU each stamp waits for the device, so a step takes longer than it would without.

| part | |
|---|---|
| text | captions to states, the loading of a language model that was released too |
| denoiser forward, backward | the engine's gathering and reducing, and what checkpointing computes again, included |
| lpips forward, backward | both images; the gradient at the predicted one |
| clean features | patch features of the clean images, for P-DINO and alignment |
| pdino forward, backward | patch features of the predicted images |
| repa forward, backward | the projector |
| optimizer | gradient norm, clipping and update |
| ema | |
| other | noise, the losses' own arithmetic, what the caller does |
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from t2i.diffusion.objective import Objective
from t2i.engine.ema import Ema
from t2i.engine.engine import Engine
from t2i.models.text import TextEncoder

OTHER = "other"


class StepClock:
    """A clock of one process; `part` is what it is in, `seconds` what each part has had."""

    def __init__(self, device: torch.device) -> None:
        self.part = OTHER
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._since = time.perf_counter()

    def enter(self, part: str) -> str:
        """Begin a part, and return the one that ends."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        ended, self.part = self.part, part
        self.seconds[ended] += now - self._since
        self._since = now
        return ended

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Make `part` current within a `with`; the previous part continues after it."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as one part."""

        def call(*arguments: Any) -> Any:
            with self.during(part):
                return function(*arguments)

        return call

    def timed_network(self, name: str, without_gradient: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of an image, and more, as two parts, forward and backward; where no gradient is due, as one."""

        def call(image: Tensor, *more: Any) -> Any:
            if not (torch.is_grad_enabled() and image.requires_grad):
                with self.during(without_gradient):
                    return function(image, *more)
            with self.during(f"{name} forward"):
                found = function(self.stamped(image, OTHER), *more)
                if isinstance(found, Tensor):
                    return self.stamped(found, f"{name} backward")
                return [self.stamped(tensor, f"{name} backward") for tensor in found]

        return call

    def stamped(self, tensor: Tensor, part: str) -> Tensor:
        """The same tensor; the part begins once its gradient is known."""
        stamped: Tensor = _Stamp.apply(tensor, self, part)
        return stamped


class _Stamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, clock: StepClock, part: str) -> Tensor:
        ctx.clock, ctx.part = clock, part
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.enter(ctx.part)
        return gradient, None, None


def watch_text(clock: StepClock, text: TextEncoder) -> None:
    """Time an encoder's calls from now on."""
    text.forward = clock.timed("text", text.forward)


def watch_step(clock: StepClock, objective: Objective, engine: Engine, ema: Ema) -> None:
    """Time the functions that a step calls, from now on."""
    distance, features = objective.image_distance, objective.patch_features
    if distance is not None:
        distance.distance = clock.timed_network("lpips", "lpips forward", distance.distance)
    if features is not None:
        features.tokens = clock.timed_network("pdino", "clean features", features.tokens)
    _watch_denoiser(clock, engine.network)
    engine.backward = clock.timed(OTHER, engine.backward)
    engine.step = clock.timed("optimizer", engine.step)
    ema.update = clock.timed("ema", ema.update)


def _watch_denoiser(clock: StepClock, network: nn.Module) -> None:
    """Hooks, as the engine's own are: the engine goes on to see its module."""

    def begin(*_: Any) -> None:
        clock.enter("denoiser forward")

    def end(_: nn.Module, __: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        image, projected = output
        stamped = clock.stamped(image, "denoiser backward")
        clock.enter(OTHER)
        return stamped, projected

    def begin_projector(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        clock.enter("repa forward")
        return (clock.stamped(inputs[0], "denoiser backward"),)

    def end_projector(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        stamped = clock.stamped(output, "repa backward")
        clock.enter("denoiser forward")
        return stamped

    network.register_forward_pre_hook(begin, prepend=True)  # before the engine gathers weights
    network.register_forward_hook(end)
    for name, module in network.named_modules():
        if name.rpartition(".")[2] == "projector":
            module.register_forward_pre_hook(begin_projector)
            module.register_forward_hook(end_projector)
