from __future__ import annotations

import numpy as np
import pytest
from feature_distance import Array, kernel_distance, pair_terms, resamples


def whole(n: int) -> Array:
    return np.ones((1, n))


def test_kernel_distance_of_two_points() -> None:
    a, b = np.array([1.0, 2.0]), np.array([0.0, -1.0])
    x, y = np.tile(a, (6, 1)), np.tile(b, (6, 1))
    expected = (5 / 2 + 1) ** 3 + (1 / 2 + 1) ** 3 - 2 * (-2 / 2 + 1) ** 3
    assert kernel_distance(pair_terms(x, y), whole(6)) == pytest.approx(expected)


def test_kernel_distance_is_unbiased_even_where_the_two_of_a_pair_are_alike() -> None:
    rng = np.random.default_rng(0)
    for tie in (0.0, 0.9):
        found = []
        for _ in range(400):
            common, x, y = rng.normal(size=(3, 16, 4))
            x, y = (tie * common + np.sqrt(1 - tie**2) * own for own in (x, y))
            found.append(kernel_distance(pair_terms(x, y), whole(16))[0])
        error = np.std(found) / np.sqrt(len(found))
        assert abs(np.mean(found)) < 3 * error
        assert min(found) < 0


def test_kernel_distance_of_shifted_gaussians() -> None:
    # In one dimension E k(x, y) = E (x y + 1)^3 = E x^3 E y^3 + 3 E x^2 E y^2 + 3 E x E y + 1; moments at shift 1.
    rng = np.random.default_rng(1)
    first, second, third = 1.0, 2.0, 4.0
    within = (0 + 3 * 1 + 0 + 1) + (third**2 + 3 * second**2 + 3 * first**2 + 1)
    across = 0 + 3 * second + 0 + 1
    found = [
        kernel_distance(pair_terms(rng.normal(size=(200, 1)), 1 + rng.normal(size=(200, 1))), whole(200))[0]
        for _ in range(50)
    ]
    assert abs(np.mean(found) - (within - 2 * across)) < 3 * np.std(found) / np.sqrt(len(found))


def test_resamples_compare_no_pair_with_itself() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(12, 3)), rng.normal(size=(12, 3)) + 0.5
    counts = resamples(12, 5)
    assert counts.shape == (5, 12) and (counts.sum(1) == 12).all() and (counts > 1).any()

    def k(a: Array, b: Array) -> float:
        return float((a @ b / 3 + 1) ** 3)

    for sample, distance in zip(counts, kernel_distance(pair_terms(x, y), counts), strict=True):
        drawn = np.repeat(np.arange(12), sample.astype(int))
        terms = [k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i in drawn for j in drawn if i != j]
        assert distance == pytest.approx(np.mean(terms))
