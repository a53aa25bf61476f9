"""Distances and shares against closed forms, scipy, scikit-learn and ADM's formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.neighbors import NearestNeighbors

from evaluation.fid import estimators
from evaluation.fid.estimators import (
    Array,
    Gaussian,
    InceptionScore,
    Moments,
    frechet_distance,
    precision_recall,
)


def features(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Correlated, off centre, of scales from 0.01 to 10."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d)) * np.logspace(-2, 1, d)
    return torch.from_numpy(rng.normal(size=(n, d)) @ mixing + rng.normal(size=d)).float()


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    """As ADM has it."""
    root = np.asarray(scipy.linalg.sqrtm(a.covariance @ b.covariance))
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * np.trace(root.real))


def test_moments_in_batches_are_those_of_all_at_once() -> None:
    # Far off centre in fp32: sums of squares would lose all digits.
    x = features(100, 5) + 1e4
    moments = Moments(5)
    for batch in x.split([1, 7, 32, 60]):
        moments.add(batch)
    found, rows = moments.gaussian(), x.double().numpy()
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-9)
    assert moments.count == 100


def test_frechet_distance_of_shifted_gaussians_is_the_shift_squared() -> None:
    covariance = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]])
    a = Gaussian(np.zeros(3), covariance)
    assert frechet_distance(a, Gaussian(np.array([1.0, -2.0, 0.5]), covariance)) == pytest.approx(5.25)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)


def test_frechet_distance_along_common_axes_is_of_the_deviations() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]

    def turned(*variances: float) -> Array:
        return turn @ np.diag(variances) @ turn.T

    a, b = Gaussian(np.zeros(3), turned(9.0, 4.0, 0.0)), Gaussian(np.zeros(3), turned(1.0, 25.0, 16.0))
    assert frechet_distance(a, b) == pytest.approx((3 - 1) ** 2 + (2 - 5) ** 2 + (0 - 4) ** 2)
    still = Gaussian(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(still, b) == frechet_distance(b, still) == pytest.approx(42.0)


@pytest.mark.parametrize("d", [2, 17, 96])
def test_frechet_distance_is_that_of_the_root_of_the_product(d: int) -> None:
    a, b = Gaussian.of(features(4 * d, d)), Gaussian.of(features(4 * d, d, seed=1))
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(300, 300), (40, 400), (400, 40), (40, 60)])
def test_frechet_distance_of_few_images_has_all_digits(n: int, m: int) -> None:
    # The trace of the root is the nuclear norm of the product of the centred features: no covariance, no root.
    x, y = features(n, 128).double(), features(m, 128, seed=1).double()
    a, b = x - x.mean(0), y - y.mean(0)
    root = float(torch.linalg.svdvals(a @ b.T).sum()) / np.sqrt((n - 1) * (m - 1))
    shift = float((x.mean(0) - y.mean(0)).square().sum())
    expected = shift + float(a.square().sum() / (n - 1) + b.square().sum() / (m - 1)) - 2 * root
    assert frechet_distance(Gaussian.of(x), Gaussian.of(y)) == pytest.approx(expected, rel=1e-12)


def inception_scores(logits: torch.Tensor, split: int) -> list[float]:
    """As ADM has it."""
    found = []
    for part in logits.double().softmax(1).split(split):
        p = part.numpy()
        kl = p * (np.log(p) - np.log(p.mean(0, keepdims=True)))
        found.append(float(np.exp(np.mean(np.sum(kl, 1)))))
    return found


def test_inception_score_of_sure_and_of_unsure_classifiers() -> None:
    score = InceptionScore()
    score.add(1e3 * torch.eye(7).repeat(3, 1))  # each of 7 classes as often: 7, though most p are 0
    assert score.result() == (pytest.approx(7.0), 0.0)
    score = InceptionScore()
    score.add(torch.randn(9, 1).expand(9, 7))  # all alike: 1
    assert score.result() == (pytest.approx(1.0), 0.0)
    score = InceptionScore()
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    score.add(p.log() + 5.0)
    assert score.result()[0] == pytest.approx(2 * 0.9**0.9 * 0.1**0.1)


def test_inception_score_is_over_consecutive_splits_of_5000_whatever_the_batches() -> None:
    assert estimators.SPLIT == 5000
    logits = 3 * torch.randn(11_000, 4, generator=torch.Generator().manual_seed(0))
    logits[5000:10_000, 0] += 4.0  # a split that scores otherwise, and 1000 left over
    expected = inception_scores(logits, 5000)
    assert len(expected) == 3 and np.ptp(expected) > 0.1
    for sizes in (11_000, 64, 3000):
        score = InceptionScore()
        for batch in logits.split(sizes):
            score.add(batch)
        assert score.result() == (pytest.approx(np.mean(expected)), pytest.approx(np.std(expected)))


def by_neighbours(reference: torch.Tensor, samples: torch.Tensor) -> tuple[float, float]:
    """Precision and recall by scikit-learn's exact neighbours."""

    def share(inside: np.ndarray, of: np.ndarray) -> float:
        radii = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(of).kneighbors()[0][:, -1]  # but for itself
        distances = np.linalg.norm(inside[:, None] - of[None], axis=-1)
        return float((distances <= radii).any(1).mean())

    r, s = reference.double().numpy(), samples.double().numpy()
    return share(s, r), share(r, s)


def test_precision_is_of_the_samples_and_recall_of_the_reference() -> None:
    # Two clumps in the reference, of which the samples know one: all samples are right, half the reference is missed.
    rng = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 60, 3, generator=rng)
    reference = torch.cat([left, right + 100.0])
    samples = 0.1 * torch.randn(80, 3, generator=rng)
    precision, recall = precision_recall(reference, samples)
    assert precision == 1.0 and recall < 0.2
    swapped = precision_recall(samples, reference)
    assert swapped == (recall, precision)
    wide = torch.cat([left[:40], right[:40] + 100.0, left[:80] + 1000.0])
    assert precision_recall(reference, wide) == by_neighbours(reference, wide)
    assert precision_recall(reference, wide)[0] < 0.6 < precision_recall(reference, wide)[1]


@pytest.mark.parametrize("block", [4096, 50])
def test_precision_and_recall_are_those_of_exact_neighbours(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "_BLOCK", block)
    for d, shift in ((2, 0.0), (16, 0.5), (64, 200.0)):  # 200: far from 0, where fp32 is coarse
        rng = torch.Generator().manual_seed(d)
        reference = torch.randn(130, d, generator=rng) + shift
        samples = 0.8 * torch.randn(210, d, generator=rng) + 0.3 + shift
        found = precision_recall(reference, samples)
        assert found == pytest.approx(by_neighbours(reference, samples), abs=1e-9)
        assert 0.0 < found[0] != found[1] > 0.0


def test_an_image_is_not_its_own_neighbour() -> None:
    # On a line at 0, 1, 2, 3: the third neighbour of each is 3, 2, 2 and 3 away.
    line = torch.arange(4.0)[:, None]
    near, far = torch.tensor([[5.9], [6.1], [50.0], [60.0]]), torch.tensor([[-2.9], [-3.1], [-50.0], [-60.0]])
    assert precision_recall(line, near)[0] == precision_recall(line, far)[0] == 0.25
