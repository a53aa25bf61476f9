"""Trains the small PixelGen of `cases.py` through every engine and compares with plain PyTorch on the whole batch.

Arguments: folder for checkpoints, and the folder of another world size's checkpoints to read (or "-").
"""

import dataclasses
import json
import math
import sys
from functools import cache
from pathlib import Path

import torch
from cases import (
    BETAS,
    CLIP,
    ENGINES,
    STEPS,
    Case,
    Trace,
    build,
    distance,
    loss_of,
    make_ema,
    plain_loss,
    reference,
    relative,
    share,
    train,
    train_step,
    whole,
)

from launch.process import joined_world, quiet
from t2i.engine.checkpoint import Checkpoint, CheckpointWriter, checkpoints, moments_of, params_of
from t2i.engine.ema import Ema
from t2i.engine.engine import Engine

cached_reference = cache(reference)
HALF = STEPS // 2


def matrix(world_size: int) -> list[Case]:
    """Every engine in both dtypes, with and without accumulation, and in each of its settings."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if world_size == 4:
        plain = [Case(engine) for engine in ENGINES]
        return [*plain, Case("fsdp", dp_replicate=2), Case("fsdp", muon=True, dp_replicate=2), Case("zero3", muon=True)]
    cases = [Case(e, dtype, accumulation) for e in ENGINES for dtype in (fp32, bf16) for accumulation in (1, 2)]
    if world_size == 1:
        return cases
    for engine in ENGINES:
        cases += [Case(engine, muon=True), Case(engine, clip=0), Case(engine, checkpointed=True)]
    cases += [Case(e, bf16, 2, checkpointed=True, persistent=0) for e in ("zero0", "zero3", "fsdp")]
    cases += [Case("zero3", fp32, 2, muon=True, persistent=0)]
    cases += [Case("zero3", offload=True), Case("zero3", bf16, 2, offload=True)]
    cases += [Case("fsdp", reshard=False), Case("fsdp", bf16, 2, dp_replicate=2)]
    return cases


def refusals(engine: Engine, case: Case) -> list[bool]:
    """Whether a step that is too early, a second backward and a micro-step too many are refused."""
    outcomes = []

    def refused(call) -> bool:
        try:
            call()
        except RuntimeError:
            return True
        return False

    micro_batches = case.accumulation
    outcomes.append(refused(lambda: engine.step(lambda _: 0.0, lambda _: None)))
    for part in share(case):
        loss = loss_of(engine.network, 0, part, micro_batches)
        engine.backward(loss)
        outcomes.append(refused(lambda loss=loss: engine.backward(loss)))
    loss = loss_of(engine.network, 0, share(case)[0], micro_batches)
    outcomes.append(refused(lambda: engine.backward(loss)))
    return outcomes


def compare(case: Case) -> dict:
    engine = build(case)
    ema = make_ema(engine, case)
    start = distance(whole(engine, params_of(engine.shards)), cached_reference(torch.float32, False, CLIP).start)
    losses, norms, reasons = train(engine, ema, case, range(STEPS))
    expected: Trace = cached_reference(case.dtype, case.muon, case.clip)
    params = whole(engine, params_of(engine.shards))
    with torch.no_grad():
        found_loss = loss_of(engine.network, 0, torch.arange(8), 1).item()
        loss = plain_loss(params, case.dtype, 0).item()
    outcome = {
        "case": str(case),
        "exact": case.dtype == torch.float32,
        "masters_at_start": start,
        "losses": relative(losses, expected.losses),
        "norms": relative(norms, expected.norms),
        "params": distance(params, expected.params),
        "ema": distance(whole(engine, ema.params), expected.ema),
        "reasons": reasons,
        "optimizer_steps": engine.optimizer_steps,
        "weights_are_masters": abs(found_loss / loss - 1),
    }
    engine.close()
    return outcome


def second_backward(case: Case) -> dict:
    engine = build(case)
    outcome = {"case": str(case), "refused": refusals(engine, case)}
    engine.close()
    return outcome


def rounded_share(case: Case) -> float:
    """Share of a gradient's numbers that bf16 holds: all, where it was summed over micro-steps or ranks in bf16."""
    engine = build(case)
    train_step(engine, case, 0)
    moments = [shard.state["exp_avg"] for shard in engine.shards.values()]
    gradient = torch.cat(moments) / (1 - BETAS[0])
    gradient = gradient[gradient != 0]
    rounded = (gradient - gradient.bfloat16()).abs() < 1e-5 * gradient.abs()
    engine.close()
    return rounded.float().mean().item()


def mapped_differences(case: Case) -> dict:
    """What moments and EMA in files change of the weights, and whether they lie there."""
    traces, shared = [], []
    for kind in (case, dataclasses.replace(case, mapped=True)):
        engine = build(kind)
        ema = make_ema(engine, kind)
        losses, norms, _ = train(engine, ema, kind, range(STEPS))
        traces.append(Trace(losses, norms, whole(engine, params_of(engine.shards)), whole(engine, ema.params), {}))
        moments = [moment for shard in engine.shards.values() for moment in shard.state.values()]
        tensors = (*moments, *ema.params.values())  # empty slices have no file
        shared.append({tensor.is_shared() for tensor in tensors if tensor.untyped_storage().nbytes()})
        engine.close()
    return {"case": str(case), **differences(*traces), "shared": [list(found) for found in shared]}


def restore(case: Case, folder: Path) -> tuple[Engine, Ema]:
    engine = build(case)
    ema = make_ema(engine, case)
    checkpoint = Checkpoint(checkpoints(folder)[-1])
    kinds = {"param": params_of(engine.shards), "ema": ema.params, **moments_of(engine.shards)}
    checkpoint.read(engine.shards, kinds)
    engine.sync_params_from_master()
    engine.optimizer_steps = checkpoint.state["optimizer_steps"]
    return engine, ema


def go_on(case: Case, folder: Path) -> Trace:
    """The second half of the steps, from a checkpoint."""
    engine, ema = restore(case, folder)
    losses, norms, _ = train(engine, ema, case, range(HALF, STEPS))
    trace = Trace(losses, norms, whole(engine, params_of(engine.shards)), whole(engine, ema.params), {})
    engine.close()
    return trace


def save_and_go_on(case: Case, folder: Path, world) -> Trace:
    """Save after half of the steps; the rest of the unbroken run, which goes on while the checkpoint is written."""
    engine = build(case)
    ema = make_ema(engine, case)
    train(engine, ema, case, range(HALF))
    writer = CheckpointWriter(folder, rank=world.rank, world_size=world.size, attempt_id="a", keep=1)
    writer.save(HALF, engine.shards, ema.params, {"optimizer_steps": engine.optimizer_steps})
    losses, norms, _ = train(engine, ema, case, range(HALF, STEPS))
    writer.wait()
    world.barrier()
    trace = Trace(losses, norms, whole(engine, params_of(engine.shards)), whole(engine, ema.params), {})
    engine.close()
    return trace


def differences(found: Trace, expected: Trace) -> dict:
    return {
        "losses": relative(found.losses, expected.losses[-len(found.losses) :]),
        "norms": relative(found.norms, expected.norms[-len(found.norms) :]),
        "params": distance(found.params, expected.params),
        "ema": distance(found.ema, expected.ema),
    }


def resume(folder: Path, other: Path | None, world) -> list[dict]:
    """Each engine goes on from its own checkpoint, from another engine's, and from another world size's."""
    outcomes = []
    cases = [Case(engine, muon=True) for engine in ENGINES]
    if world.size == 2:
        cases += [Case(engine, torch.bfloat16, 2) for engine in ENGINES]
        cases += [Case("fsdp", muon=True, dp_replicate=2), Case("zero3", torch.bfloat16, 2, offload=True)]
        cases += [Case("zero1", torch.bfloat16, 2, mapped=True), Case("fsdp", muon=True, mapped=True)]
    for case in cases:
        unbroken = save_and_go_on(case, folder / str(case), world)
        again = go_on(case, folder / str(case))
        outcomes.append({"case": str(case), "from": "itself", **differences(again, unbroken)})
    expected = cached_reference(torch.float32, True, CLIP)
    for index, engine in enumerate(ENGINES):
        case = Case(engine, muon=True)
        sources = [folder / str(dataclasses.replace(case, engine=ENGINES[index - 1]))]
        if other is not None:
            sources.append(other / str(dataclasses.replace(case, engine=ENGINES[index - 2])))
        for source in sources:
            found = go_on(case, source)
            outcomes.append({"case": str(case), "from": str(source), **differences(found, expected)})
    return outcomes


def main() -> None:
    folder = Path(sys.argv[1])
    other = None if sys.argv[2] == "-" else Path(sys.argv[2])
    with joined_world() as world:
        quiet(world.rank)
        torch.set_num_threads(1)  # a team of threads costs far more than these small products
        outcome: dict = {"cases": [compare(case) for case in matrix(world.size)]}
        if world.size == 2:
            bf16 = [Case(engine, torch.bfloat16, 2, clip=0) for engine in ENGINES]
            outcome["rounded"] = {str(case): rounded_share(case) for case in bf16}
            outcome["mapped"] = [mapped_differences(Case(engine, torch.bfloat16, 2)) for engine in ENGINES]
            outcome["refused"] = [second_backward(Case(engine, accumulation=2)) for engine in ENGINES]
        outcome["resumed"] = resume(folder, other, world)
        plain = [cached_reference(torch.float32, False, clip).params for clip in (CLIP, 0)]
        outcome["clipping_shows"] = distance(plain[0], plain[1])
        assert all(math.isfinite(case["params"]) for case in outcome["cases"])
        if world.is_rank0:
            print(json.dumps(outcome))


if __name__ == "__main__":
    main()
