"""What FID's arithmetic costs, apart from Inception: against the bare products, and against ADM's way.

    python tests/benchmarks/fid.py

- `precision_recall`: 5,000 images against 5,000 of 2048 features, by the matrix products in it, of which there are
  four (within and across the sets, and across twice), alone.
- `frechet`: of 2048 features, the same by `scipy.linalg.sqrtm` of the product of the covariances, and how far the two
  are apart, as a share.
- `moments`: 5,000 images in batches of 64, by the one product of all of them.

Prints one JSON object; seconds are the least of three, of `sqrtm` of one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

from evaluation.fid.estimators import Gaussian, Moments, frechet_distance, precision_recall

IMAGES, DIM, BATCH, BLOCK = 5000, 2048, 64, 4096


def seconds(job: Callable[[], object], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        job()
        taken.append(time.perf_counter() - start)
    return min(taken)


def features(seed: int) -> torch.Tensor:
    """Correlated, and nowhere below 0, as pooled features are."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)) / DIM**0.5
    return (torch.randn(IMAGES, DIM, generator=rng) @ mixing + 0.1 * seed).relu()


def moments_of(x: torch.Tensor) -> Gaussian:
    moments = Moments(DIM)
    for batch in x.split(BATCH):
        moments.add(batch)
    return moments.gaussian()


def products(x: torch.Tensor, y: torch.Tensor) -> None:
    for a, b in ((x, x), (y, y), (x, y), (y, x)):
        for rows in a.split(BLOCK):
            for columns in b.split(BLOCK):
                rows @ columns.T


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * np.trace(root).real)


def measure() -> None:
    x, y = features(0), features(1)
    a, b = moments_of(x), moments_of(y)
    frechet = seconds(lambda: frechet_distance(a, b))
    start = time.perf_counter()
    theirs = by_sqrtm(a, b)
    sqrtm = time.perf_counter() - start
    pairs = seconds(lambda: precision_recall(x, y))
    double = x.double()
    found = {
        "threads": torch.get_num_threads(),
        "precision_recall_s": pairs,
        "precision_recall_per_products": pairs / seconds(lambda: products(x, y)),
        "frechet_s": frechet,
        "sqrtm_per_frechet": sqrtm / frechet,
        "frechet_apart": abs(theirs / frechet_distance(a, b) - 1.0),
        "moments_per_product": seconds(lambda: moments_of(x)) / seconds(lambda: double.T @ double),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    measure()
