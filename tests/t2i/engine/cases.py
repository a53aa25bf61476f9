"""A small PixelGen with its whole objective, trained by plain PyTorch on the whole batch and by every engine.

Samples are split over ranks and micro-steps; perceptual losses apply to all samples of a batch, to none, or to those
of some ranks. One step's loss is not finite on one rank, one step is skipped.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from t2i.build import TrainingNetwork
from t2i.diffusion.objective import GradientHook, LossWeights, Objective
from t2i.engine import deepspeed
from t2i.engine.ema import Ema
from t2i.engine.engine import Engine, gather_full, prepare_blocks
from t2i.engine.fsdp import FsdpEngine
from t2i.engine.muon import orthogonalise
from t2i.engine.optimizer import OffloadDir, ZerosLike, build_optimizer
from t2i.models.layers import Projector, patchify
from t2i.models.pixelgen import PixelGen

STEPS, BATCH, DECAY = 10, 8, 0.9
NAN_STEP, SKIPPED_STEP = 4, 6
LR, MUON_LR, CLIP, WEIGHT_DECAY, BETAS, EPS, MOMENTUM = 1e-3, 2e-3, 0.5, 0.1, (0.9, 0.99), 1e-8, 0.95
PATCH, SIDE, TEXT_LENGTH, TEXT_WIDTH, FEATURES, GATE = 4, 8, 3, 6, 5, 0.3
ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp")


class StubDistance:
    """In place of LPIPS: something that is not linear in the image."""

    def distance(self, image: Tensor, reference: Tensor) -> Tensor:
        return (image.sigmoid() - reference.sigmoid()).square().flatten(1).mean(1)


class StubFeatures:
    """In place of DINO: patches by a fixed random matrix."""

    width, depth = FEATURES, 1

    def tokens(self, image: Tensor, grid: tuple[int, int], layers: Sequence[int]) -> list[Tensor]:
        matrix = torch.randn(3 * PATCH**2, FEATURES, generator=torch.Generator().manual_seed(9))
        return [patchify(image, PATCH).tanh() @ matrix]


OBJECTIVE = Objective(LossWeights(0.5, 0.5, 0.5, GATE, 0.05), StubDistance(), StubFeatures())


def network() -> TrainingNetwork:
    """Widths that few numbers of ranks divide, so that slices end inside matrices; no weight is zero."""
    torch.manual_seed(0)
    denoiser = PixelGen(
        width=24,
        depth=2,
        heads=2,
        text_width=TEXT_WIDTH,
        text_length=TEXT_LENGTH,
        text_depth=1,
        patch_size=PATCH,
        bottleneck=7,
        repa_layer=1,
    )
    module = TrainingNetwork(denoiser, Projector(24, 24, FEATURES))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return module


TEMPLATE = network()


def takes_muon(name: str) -> bool:
    return ".attn." in name


def times(step: int) -> np.ndarray:
    """Open for all, shut for all, open for every other sample (so for half of the ranks), anything."""
    shift = 0.1 * (np.arange(BATCH) % 3)
    if step % 4 == 3:
        return np.random.default_rng(step).uniform(0, 1, BATCH)
    is_open = {0: np.ones(BATCH, bool), 1: np.zeros(BATCH, bool), 2: np.arange(BATCH) % 2 == 0}[step % 4]
    return np.where(is_open, 0.7 + shift, 0.05 + shift)


def loss_of(
    call: Callable[..., Any],
    step: int,
    part: Tensor,
    micro_batches: int,
    objective: Objective = OBJECTIVE,
    gradient_hook: GradientHook | None = None,
) -> Tensor:
    """The objective of some samples of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    image = torch.rand(BATCH, 3, SIDE, SIDE, generator=generator) * 2 - 1
    noise = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    text = torch.randn(BATCH, TEXT_LENGTH, TEXT_WIDTH, generator=generator)
    host_t = times(step)
    t = torch.from_numpy(host_t).float()
    x_t = t[:, None, None, None] * image + (1 - t[:, None, None, None]) * noise
    predicted, projected = call(x_t[part], t[part], text[part])
    if step == NAN_STEP:  # in one rank's share only, and not on the way to the head
        projected = projected * torch.where(part == 1, math.nan, 1.0)[:, None, None]
    loss, _ = objective(
        predicted,
        projected,
        image[part],
        noise[part],
        host_t[part.numpy()],
        grid=(SIDE // PATCH, SIDE // PATCH),
        batch_size=BATCH,
        ungated=int((host_t >= GATE).sum()),
        micro_batches=micro_batches,
        gradient_hook=gradient_hook,
    )
    return loss


class Trace(NamedTuple):
    """What ten steps leave behind; losses are of the global batch."""

    losses: list[float]
    norms: list[float]
    params: dict[str, Tensor]
    ema: dict[str, Tensor]
    start: dict[str, Tensor]


def plain_loss(params: dict[str, Tensor], dtype: torch.dtype, step: int) -> Tensor:
    """Loss of a step's whole batch by a plain network with these weights, rounded to `dtype`."""
    rounded = {name: param.to(dtype) for name, param in params.items()}

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(TEMPLATE, rounded, inputs)

    return loss_of(call, step, torch.arange(BATCH), 1)


def reference(dtype: torch.dtype, muon: bool, clip: float) -> Trace:
    """Plain PyTorch on the whole batch: fp32 masters, weights rounded to `dtype` for the network."""
    module = network()
    named = dict(module.named_parameters())
    momenta = {n: torch.zeros_like(p) for n, p in named.items() if muon and p.ndim == 2 and takes_muon(n)}
    others = {n: p for n, p in named.items() if n not in momenta}
    assert {n for n, p in others.items() if p.ndim > 2} == {"denoiser.text_position"}
    groups = [  # decay is for matrices alone
        {"params": [p for p in others.values() if (p.ndim == 2) == decays], "weight_decay": WEIGHT_DECAY * decays}
        for decays in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    start = {n: p.detach().clone() for n, p in named.items()}
    ema = dict(start)
    losses, norms = [], []
    for step in range(STEPS):
        module.zero_grad()
        loss = plain_loss(named, dtype, step)
        loss.backward()
        losses.append(loss.item())
        norms.append(float(nn.utils.clip_grad_norm_(named.values(), clip or math.inf)))
        if step in (NAN_STEP, SKIPPED_STEP):
            continue
        adamw.step()
        with torch.no_grad():
            for name, momentum in momenta.items():
                p = named[name]
                momentum.mul_(MOMENTUM).add_((1 - MOMENTUM) * p.grad)
                update = orthogonalise(MOMENTUM * momentum + (1 - MOMENTUM) * p.grad)
                p.mul_(1 - MUON_LR * WEIGHT_DECAY).sub_(MUON_LR * 0.2 * max(p.shape) ** 0.5 * update)
            for name, p in named.items():
                ema[name] = DECAY * ema[name] + (1 - DECAY) * p
    return Trace(losses, norms, {n: p.detach() for n, p in named.items()}, ema, start)


@dataclass(frozen=True)
class Case:
    """One way to train: an engine with its settings. The module's own dtype is fp32."""

    engine: str
    dtype: torch.dtype = torch.float32
    accumulation: int = 1
    muon: bool = False
    clip: float = CLIP
    checkpointed: bool = False
    compiled: bool = False
    reshard: bool = True
    dp_replicate: int = 1
    persistent: int = 100_000
    offload: bool = False
    mapped: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("muon", "checkpointed", "compiled", "offload", "mapped") if getattr(self, name)]
        flags += [] if self.reshard else ["no reshard"]
        flags += [] if self.dp_replicate == 1 else [f"{self.dp_replicate} replicas"]
        flags += [] if self.clip else ["no clipping"]
        flags += [] if self.persistent else ["nothing persistent"]
        return f"{self.engine} {str(self.dtype).removeprefix('torch.')} x{self.accumulation} {' '.join(flags)}".strip()


def zeros_like(case: Case) -> ZerosLike:
    """Where the case's moments and EMA are; files leave nothing behind in the folder."""
    return OffloadDir(Path(tempfile.gettempdir())).zeros_like if case.mapped else torch.zeros_like


def make_ema(engine: Engine, case: Case) -> Ema:
    return Ema(engine.shards, DECAY, zeros_like(case))


def build(case: Case) -> Engine:
    module = network()
    prepare_blocks(module, compiled=case.compiled, checkpointed=module.blocks if case.checkpointed else [])
    optimizer = build_optimizer(
        module,
        muon=takes_muon if case.muon else lambda _: False,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        muon_momentum=MOMENTUM,
        work_dtype=torch.float32,
        zeros_like=zeros_like(case),
    )
    device = torch.device("cpu")
    common = {"device": device, "dtype": case.dtype, "accumulation": case.accumulation, "clip_grad_norm": case.clip}
    if case.engine == "fsdp":
        return FsdpEngine(
            module, optimizer, reshard_after_forward=case.reshard, dp_replicate=case.dp_replicate, **common
        )
    deepspeed.PERSISTENT_NUMEL = case.persistent
    micro = BATCH // dist.get_world_size() // case.accumulation
    return deepspeed.DeepSpeedEngine(
        module,
        optimizer,
        zero_stage=int(case.engine[-1]),
        offload=case.offload,
        micro_batch_size=micro,
        **common,
    )


def share(case: Case) -> list[Tensor]:
    """This rank's samples, by micro-step."""
    return list(torch.arange(BATCH)[dist.get_rank() :: dist.get_world_size()].chunk(case.accumulation))


def train_step(engine: Engine, case: Case, step: int) -> tuple[float, float, str | None]:
    """Loss over the global batch, gradient norm, and why no update."""
    total = torch.zeros(())
    micro_batches = case.accumulation * dist.get_world_size()
    for part in share(case):
        loss = loss_of(engine.network, step, part, micro_batches)
        engine.backward(loss)
        total += loss.detach() / micro_batches
    result = engine.step(
        lambda muon: MUON_LR if muon else LR,
        lambda norm: "skipped by the test" if step == SKIPPED_STEP else None,
    )
    dist.all_reduce(total)
    reason = result.skip_reason
    if not math.isfinite(result.grad_norm):
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, list(result.not_finite))
        reason = f"{reason} in {' '.join(sorted({name for part in parts for name in part}))}"
    return float(total), result.grad_norm, reason


def train(engine: Engine, ema: Ema, case: Case, steps: range) -> tuple[list[float], list[float], list[str | None]]:
    outcomes = []
    for step in steps:
        outcomes.append(train_step(engine, case, step))
        if outcomes[-1][2] is None:
            ema.update()
    losses, norms, reasons = (list(column) for column in zip(*outcomes, strict=True))
    return losses, norms, reasons


def whole(engine: Engine, slices: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(gather_full(engine.shards, slices))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def relative(found: list[float], expected: list[float]) -> float:
    """Largest relative difference where the reference is finite; both must be finite at the same steps."""
    assert [math.isfinite(x) for x in found] == [math.isfinite(x) for x in expected], (found, expected)
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True) if math.isfinite(b))
