"""The kernel distance (KID) between two sets of pictures by their features; evaluation/fid has the Frechet distance.

Features are float arrays, a row a picture. The rows of both sets are pairs (here: of one caption), and a pair is
compared with other pairs alone. That is unbiased whatever ties the two of a pair together, and
a bootstrap over pairs is one over the rows and columns of one matrix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _kernel(x: Array, y: Array) -> Array:
    """The cubic polynomial kernel of KID (Binkowski et al. 2018, section 4)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def pair_terms(x: Array, y: Array) -> Array:
    """What the pairs i and j of features (n, d) contribute to the kernel distance: (n, n), 0 where i = j."""
    across = _kernel(x, y)
    terms = _kernel(x, x) + _kernel(y, y) - across - across.T
    np.fill_diagonal(terms, 0.0)
    return terms


def kernel_distance(terms: Array, counts: Array) -> Array:
    """Squared maximum mean discrepancy, the U-statistic over pairs (Gretton et al. 2012, eq. 4); may be negative.

    Args:
        terms: of `pair_terms`.
        counts: (b, n), how often each pair is in each of b samples: ones, or draws of `resamples`. A pair that is in a
            sample twice is not compared with itself, which would bias the distance of resamples.

    Returns:
        (b,)
    """
    total = ((counts @ terms) * counts).sum(1)
    return total / (counts.sum(1) ** 2 - (counts**2).sum(1))


def resamples(n: int, b: int) -> Array:
    """Counts (b, n) of b bootstrap samples of n pairs, from a fixed seed."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1.0 / n), size=b).astype(np.float64)
