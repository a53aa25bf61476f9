"""Trains a toy network through ZeRO-1 in several settings and compares with plain PyTorch on the whole batch.

Arguments: folder for checkpoints, and the folder of another world size's checkpoint to read (or "-").
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import nn

from launch.process import joined_world
from t2i.engine.checkpoint import Checkpoint, CheckpointWriter, moments_of, newest, values_of
from t2i.engine.deepspeed import DeepSpeedEngine
from t2i.engine.ema import Ema
from t2i.engine.optimizer import build_optimizer, orthogonalise
from t2i.engine.shards import gather_full

STEPS, BATCH, LR, MUON_LR, CLIP, DECAY = 8, 16, 1e-2, 2e-2, 0.1, 0.9
NAN_STEP, VETO_STEP = 3, 5
BETAS, EPS, MOMENTUM = (0.9, 0.99), 1e-8, 0.95


def network() -> nn.Module:
    torch.manual_seed(0)
    # Sizes that no number of ranks divides, so that slices end inside matrices.
    return nn.Sequential(nn.Linear(11, 33), nn.SiLU(), nn.Linear(33, 13), nn.SiLU(), nn.Linear(13, 7))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 11, generator=generator)
    if step == NAN_STEP:
        inputs[5] = math.nan  # in one rank's share only
    return inputs, torch.randn(BATCH, 7, generator=generator)


def takes_muon(name: str, muon: bool) -> bool:
    return muon and name == "2.weight"


def build(dtype: torch.dtype, accumulation: int, muon: bool, world_size: int) -> DeepSpeedEngine:
    module = network()
    optimizer = build_optimizer(
        module,
        muon=lambda name: takes_muon(name, muon),
        betas=BETAS,
        eps=EPS,
        weight_decay=0.1,
        muon_momentum=MOMENTUM,
        work_dtype=torch.float32,
    )
    return DeepSpeedEngine(
        module,
        optimizer,
        device=torch.device("cpu"),
        dtype=dtype,
        micro_batch_size=BATCH // world_size // accumulation,
        accumulation=accumulation,
        clip_grad_norm=CLIP,
    )


def train(engine, ema, rank, world_size, accumulation, dtype, steps) -> tuple[list[float], list[str | None]]:
    norms, vetoes = [], []
    for step in steps:
        inputs, targets = batch(step)
        for part in torch.arange(BATCH)[rank::world_size].chunk(accumulation):
            output = engine.network(inputs[part].to(dtype)).float()
            engine.micro_step((output - targets[part]).square().mean())
        result = engine.step(
            lambda muon: MUON_LR if muon else LR,
            lambda norm, step=step: "vetoed by the test" if step == VETO_STEP else None,
        )
        if result.vetoed is None:
            ema.update()
        norms.append(result.grad_norm)
        vetoes.append(result.vetoed)
    return norms, vetoes


def reference(muon: bool) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same training in plain PyTorch: norms, weights and average."""
    module = network()
    by_muon = {n: p for n, p in module.named_parameters() if takes_muon(n, muon)}
    others = [p for n, p in module.named_parameters() if n not in by_muon]
    adamw = torch.optim.AdamW(others, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1)
    momenta = {n: torch.zeros_like(p) for n, p in by_muon.items()}
    average = {n: p.detach().clone() for n, p in module.named_parameters()}
    norms = []
    for step in range(STEPS):
        inputs, targets = batch(step)
        module.zero_grad()
        (module(inputs) - targets).square().mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        if step in (NAN_STEP, VETO_STEP):
            continue
        adamw.step()
        with torch.no_grad():
            for name, p in by_muon.items():
                momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * p.grad
                update = MOMENTUM * momenta[name] + (1 - MOMENTUM) * p.grad
                p.mul_(1 - MUON_LR * 0.1).sub_(MUON_LR * 0.2 * max(p.shape) ** 0.5 * orthogonalise(update))
            for name, p in module.named_parameters():
                average[name] = DECAY * average[name] + (1 - DECAY) * p
    return norms, dict(module.named_parameters()), average


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def whole(engine, slices) -> dict[str, torch.Tensor]:
    return dict(gather_full(engine.shards, slices))


def values(engine) -> dict[str, torch.Tensor]:
    return whole(engine, values_of(engine.shards))


def rounded_gradient(engine: DeepSpeedEngine, part: torch.Tensor, accumulation: int) -> bool:
    """Whether the bf16 network's gradient, summed over micro-batches and ranks, was rounded to bf16 on its way."""
    inputs, targets = batch(0)
    for micro in part.chunk(accumulation):
        loss = (engine.network(inputs[micro].bfloat16()).float() - targets[micro]).square().mean()
        engine.micro_step(loss)
    gradients = engine._zero.fp32_groups_gradients_flat
    return all(torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients)


def compare(dtype: torch.dtype, accumulation: int, muon: bool, world) -> dict:
    engine = build(dtype, accumulation, muon, world.size)
    ema = Ema(engine.shards, DECAY)
    start = distance(values(engine), dict(network().named_parameters()))
    norms, vetoes = train(engine, ema, world.rank, world.size, accumulation, dtype, range(STEPS))
    expected_norms, expected, average = reference(muon)
    outcome = {
        "case": f"{str(dtype).removeprefix('torch.')}, accumulation {accumulation}, {'muon' if muon else 'adamw'}",
        "masters_at_start": start,
        "norms": max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True) if math.isfinite(b)),
        "values": distance(values(engine), expected),
        "ema": distance(whole(engine, ema.values), average),
        "vetoes": vetoes,
        "updates": engine.updates,
        "low_precision": max(
            (p.float() - v).abs().max().item()
            for p, v in zip(engine.network.parameters(), values(engine).values(), strict=True)
        ),
    }
    if dtype == torch.bfloat16:
        part = torch.arange(BATCH)[world.rank :: world.size]
        outcome["rounded_gradient"] = rounded_gradient(engine, part, accumulation)
    engine.close()
    return outcome


def resume(folder: Path, other: str, world) -> dict:
    """Save after half of the steps; go on from it, and from another world size's checkpoint, in a fresh engine."""
    dtype, accumulation, muon = torch.float32, 1, True
    engine = build(dtype, accumulation, muon, world.size)
    ema = Ema(engine.shards, DECAY)
    train(engine, ema, world.rank, world.size, accumulation, dtype, range(STEPS // 2))
    writer = CheckpointWriter(folder, rank=world.rank, world_size=world.size, attempt="a", keep=1)
    writer.save(STEPS // 2, engine.shards, ema.values, {"updates": engine.updates})
    # Training goes on while the checkpoint is written: it is a snapshot.
    train(engine, ema, world.rank, world.size, accumulation, dtype, range(STEPS // 2, STEPS))
    writer.wait()
    world.barrier()
    unbroken = values(engine), whole(engine, ema.values)
    engine.close()
    outcome = {}
    for label, source in {"same": folder, "other": None if other == "-" else Path(other)}.items():
        if source is None:
            continue
        path, faults = newest(source)
        assert path is not None and not faults
        checkpoint = Checkpoint(path)
        engine = build(dtype, accumulation, muon, world.size)
        ema = Ema(engine.shards, DECAY)
        kinds = {"value": values_of(engine.shards), "ema": ema.values, **moments_of(engine.shards)}
        checkpoint.read(engine.shards, kinds)
        engine.refresh()
        engine.updates = checkpoint.state["updates"]
        train(engine, ema, world.rank, world.size, accumulation, dtype, range(STEPS // 2, STEPS))
        outcome[label] = {
            "values": distance(values(engine), unbroken[0]),
            "ema": distance(whole(engine, ema.values), unbroken[1]),
        }
        engine.close()
    return outcome


def main() -> None:
    folder, other = Path(sys.argv[1]), sys.argv[2]
    with joined_world() as world:
        cases = [
            compare(dtype, accumulation, muon, world)
            for dtype in (torch.float32, torch.bfloat16)
            for accumulation in (1, 2)
            for muon in (False, True)
        ]
        resumed = resume(folder, other, world)
        if world.is_main:
            print(json.dumps({"cases": cases, "resumed": resumed}))


if __name__ == "__main__":
    main()
