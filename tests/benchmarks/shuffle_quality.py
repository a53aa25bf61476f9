"""How well lanes and blocks shuffle, beside a full shuffle of the epoch.

    python tests/benchmarks/shuffle_quality.py

Takes 4,000 shards of 900 samples and a global batch of 1,536. Each shard is given a feature of its own that all its
samples share, which is the worst case: a set sorted by content. For each setting:

    shards_per_batch    different shards in a batch
    mean_variance       variance of a batch's mean feature, as a multiple of a full shuffle's (1 is perfect)
    next_batch          correlation of neighbouring batches' means (0 is perfect)
    mixed_10_percent    `mean_variance` where the shard explains 10 % of a sample's feature, as in sets written in the
                        order they were crawled
"""

from __future__ import annotations

import json

import numpy as np

from data.order import SourceOrder

SHARDS, PER_SHARD, BATCH, BATCHES = 4000, 900, 1536, 400
SETTINGS = [(128, 1), (128, 256), (128, 1024), (128, 4096), (128, 16384), (512, 1024), (512, 4096)]


def batches(lanes: int, block: int) -> np.ndarray:
    """(BATCHES, BATCH): the shard of every sample in the first batches of an epoch."""
    order = SourceOrder("bench", np.full(SHARDS, PER_SHARD), lanes, block, 0, "bench")
    per_lane = BATCH // lanes
    need = BATCHES * per_lane
    shards = np.empty((BATCHES, BATCH), dtype=np.int64)
    for lane in range(lanes):
        size = min(need, order.lane_size(lane, 0))
        read = np.concatenate([order.block(lane, 0, n)[:, 0] for n in range(-(-size // block))])[:need]
        shards[: len(read) // per_lane, lane * per_lane : (lane + 1) * per_lane] = read.reshape(-1, per_lane)
    return shards


def measure(shards: np.ndarray) -> dict[str, float]:
    """The figures of the header, over several random features."""
    rng = np.random.default_rng(0)
    ratios, neighbours = [], []
    for _ in range(20):
        feature = rng.standard_normal(SHARDS)
        means = feature[shards].mean(axis=1)
        ratios.append(((means - feature.mean()) ** 2).mean() * BATCH / feature.var())
        neighbours.append(np.corrcoef(means[:-1], means[1:])[0, 1])
    ratio = float(np.mean(ratios))
    return {
        "shards_per_batch": round(float(np.mean([len(np.unique(row)) for row in shards])), 1),
        "mean_variance": round(ratio, 2),
        "next_batch": round(float(np.mean(neighbours)), 3),
        "mixed_10_percent": round(0.9 + 0.1 * ratio, 2),
    }


def main() -> None:
    """Print one JSON object."""
    rng = np.random.default_rng(1)
    full = rng.permutation(SHARDS * PER_SHARD)[: BATCHES * BATCH].reshape(BATCHES, BATCH) // PER_SHARD
    found = {f"lanes {lanes}, block {block}": measure(batches(lanes, block)) for lanes, block in SETTINGS}
    print(json.dumps({"full shuffle": measure(full), **found}, indent=1))


if __name__ == "__main__":
    main()
