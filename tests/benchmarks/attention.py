"""Attention of the demo's blocks on a CPU in bf16, forward and backward: ours against PyTorch's fused kernel.

    python tests/benchmarks/attention.py

Prints one JSON object: milliseconds (median of interleaved runs) at the demo's two resolutions, and the ratio.
"""

import json
import statistics
import time

import torch
import torch.nn.functional as F

from t2i.models.layers import attention

BATCH, HEADS, WIDTH, TEXT, RUNS = 32, 3, 64, 24, 30


def milliseconds(run, inputs) -> float:
    began = time.perf_counter()
    run(*inputs).sum().backward()
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    result = {"threads": 1, "dtype": "bfloat16"}
    for side in (32, 48):
        tokens = (side // 4) ** 2
        shapes = [(BATCH, HEADS, n, WIDTH) for n in (tokens, tokens + TEXT, tokens + TEXT)]
        inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
        times = [
            (milliseconds(attention, inputs), milliseconds(F.scaled_dot_product_attention, inputs)) for _ in range(RUNS)
        ]
        ours, fused = (statistics.median(column) for column in zip(*times, strict=True))
        result[f"{side}px"] = {"ms": round(ours, 2), "fused_ms": round(fused, 2), "ratio": round(fused / ours, 2)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
