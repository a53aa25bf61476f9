"""What gradient balancing costs a step that measures: forward and backward of a micro-batch with and without, in turn.

    python tests/benchmarks/balance.py

Prints one JSON object for the demo's network at 48 px with its frozen networks: milliseconds of this process's CPU time
a plain step takes (median), and how many times that a measuring one does (median over neighbours).
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
import torch

from t2i.build import TrainingNetwork
from t2i.config.run import RunConfig
from t2i.diffusion.objective import LossWeights, Objective
from t2i.diffusion.perceptual import EfficientNetLite
from t2i.models.layers import Projector
from t2i.models.pixelgen import PixelGen
from t2i.train.step import GradientBalance

SAMPLES, SIDE, PATCH, WIDTH, ROUNDS = 8, 48, 4, 192, 20


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    frozen = EfficientNetLite()
    objective = Objective(LossWeights(0.1, 0.01, 0.5, 0.3, 0.05), frozen, frozen)
    denoiser = PixelGen(
        width=WIDTH, depth=6, heads=3, text_width=384, text_length=24, text_depth=1, patch_size=PATCH, bottleneck=48,
        repa_layer=3,
    )  # fmt: skip
    network = TrainingNetwork(denoiser, Projector(WIDTH, WIDTH, frozen.width))
    config = RunConfig.model_validate(
        {
            "model": {"patch_size": PATCH},
            "objective": {"balance_from_step": 0, "balance_every": 2},
            "train": {"batch_size": SAMPLES, "micro_batch_size": SAMPLES},
        }
    )
    balance = GradientBalance(config, denoiser.head)
    image = torch.rand(SAMPLES, 3, SIDE, SIDE) * 2 - 1
    noise, text = torch.zeros_like(image), torch.randn(SAMPLES, 24, 384)
    t = np.linspace(0.05, 0.95, SAMPLES)
    ungated = int((t >= 0.3).sum())
    taken: tuple[list[float], list[float]] = ([], [])
    for step in range(2 * ROUNDS):
        began = time.process_time()
        watch = balance.begin(step)
        predicted, projected = network(image, torch.from_numpy(t).float(), text)
        loss, _ = objective(
            predicted, projected, image, noise, t, grid=(SIDE // PATCH, SIDE // PATCH), batch_size=SAMPLES,
            ungated=ungated, micro_batches=1, perceptual_weight=balance.weight, gradient_hook=watch,
        )  # fmt: skip
        loss.backward()
        balance.finish(applied=True)
        taken[step % 2].append(time.process_time() - began)
        network.zero_grad()
    ratios = [measured / plain for measured, plain in zip(*taken, strict=True)]
    plain = statistics.median(taken[1])
    print(json.dumps({"plain_ms": round(plain * 1e3), "measuring": round(statistics.median(ratios), 3)}))


if __name__ == "__main__":
    main()
