"""One step with gradient balancing through several engines: the weight it comes to, and that of plain PyTorch."""

import json

import torch
import torch.distributed as dist
from cases import BATCH, GATE, LR, PATCH, TEMPLATE, Case, StubDistance, StubFeatures, build, loss_of, share

from launch.process import joined_world, quiet
from t2i.config.run import RunConfig
from t2i.diffusion.objective import LossWeights, Objective
from t2i.train.step import GradientBalance

CASES = [
    Case("zero0", torch.bfloat16, 2),
    Case("zero1", torch.float32, 2),
    Case("zero2", torch.float32, 1),
    Case("zero3", torch.float32, 2, persistent=0),
    Case("zero3", torch.bfloat16, 1),
    Case("fsdp", torch.float32, 2),
    Case("fsdp", torch.float32, 2, checkpointed=True),
]
STEP = 2  # every other sample is gated: all of rank 1's


def measured(case: Case) -> float:
    engine = build(case)
    head = next(module for name, module in engine.network.named_modules() if name.endswith("denoiser.head"))
    parts = share(case)
    config = RunConfig.model_validate(
        {
            "model": {"patch_size": PATCH},
            "objective": {"balance_from_step": 0, "balance_every": 1, "balance_smoothing": 0.0},
            "train": {"batch_size": BATCH, "micro_batch_size": len(parts[0])},
        }
    )
    balance = GradientBalance(config, head)
    gradient_hook = balance.begin(0)
    for part in parts:
        loss = loss_of(engine.network, STEP, part, len(parts) * dist.get_world_size(), gradient_hook=gradient_hook)
        engine.backward(loss)
    result = engine.step(lambda _: LR, lambda _: None)
    balance.finish(result.skip_reason is None)
    engine.close()
    return balance.weight


def two_backwards() -> float:
    """Of flow matching alone, and of all that there is with the perceptual terms, on the whole batch."""
    gradients = []
    for perceptual in (0.0, 0.5):
        objective = Objective(LossWeights(perceptual, perceptual, 0.0, GATE, 0.05), StubDistance(), StubFeatures())
        loss = loss_of(TEMPLATE, STEP, torch.arange(BATCH), 1, objective)
        gradients.append(torch.autograd.grad(loss, TEMPLATE.denoiser.head.weight)[0])
    flow, both = gradients
    return float(flow.norm() / ((both - flow).norm() + 1e-4))


def main() -> None:
    with joined_world() as world:
        quiet(world.rank)
        torch.set_num_threads(1)
        expected = two_backwards()
        found = {str(case): measured(case) for case in CASES}
        weights = world.gather(found)
    if world.is_rank0:
        print(json.dumps({"expected": expected, "found": weights}))


if __name__ == "__main__":
    main()
