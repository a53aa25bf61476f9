"""Randomness that belongs to a slot, not to a process.

Every random choice of a run (t, noise, caption dropout, shuffles) is a pure function of a key and an index. So no
generator state is saved, and nothing depends on ranks, workers or micro-batches. The seed and the purpose are the key.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray


def key(seed: int, *purpose: str | int) -> int:
    """Make the 64-bit key for one purpose of one run, e.g. `key(seed, "pretrain", "time")`."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hash_u64(key_: int, index: ArrayLike) -> NDArray[np.uint64]:
    """Hash each index under a key, to 64 bits and without state: SplitMix64's finaliser, applied twice.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (2014).
    """
    x = np.asarray(index, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for salt in (np.uint64(key_), np.uint64(0x9E3779B97F4A7C15)):
            x = (x ^ salt) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return x


def uniform(key_: int, index: ArrayLike) -> NDArray[np.float64]:
    """Draw from the open interval (0, 1), once for each index."""
    return ((hash_u64(key_, index) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def permutation(key_: int, n: int) -> NDArray[np.int64]:
    """Permute range(n), by the key and n alone."""
    # The hash is a bijection of the index, so no two keys of the sort are equal.
    return np.argsort(hash_u64(key_, np.arange(n)), kind="stable")
