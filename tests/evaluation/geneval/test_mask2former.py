"""The detector: mmdet's pre- and post-processing, and the whole path with tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_geneval import save_clip, save_mask2former
from torch import Tensor

from data.errors import UserError
from evaluation.geneval.mask2former import HUGGING_FACE, OPENMMLAB, Mask2FormerDetector, build, prepare, to_detections
from evaluation.geneval.prompts import CLASSES
from evaluation.geneval.rules import Detection, Image

URL = "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def noise(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(save_mask2former(folder / "mask2former")), str(save_clip(folder / "clip"))


@pytest.fixture(scope="module")
def detector(folders: tuple[str, str]) -> Mask2FormerDetector:
    return build(*folders)


@pytest.mark.parametrize(
    ("size", "kept", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 768), (1067, 800), (1088, 800)),
        ((300, 1000), (400, 1333), (416, 1344)),
    ],
)
def test_an_image_is_brought_to_800_or_1333_and_padded_with_grey(
    size: tuple[int, int], kept: tuple[int, int], padded: tuple[int, int]
) -> None:
    colour = (250, 100, 30)
    pixels, found = prepare(np.full((*size, 3), colour, np.uint8))
    assert found == kept and pixels.shape == (1, 3, *padded) and pixels.dtype == torch.float32
    for channel in range(3):
        inside = pixels[0, channel, : kept[0], : kept[1]]
        torch.testing.assert_close(inside, torch.full(kept, (colour[channel] - MEAN[channel]) / STD[channel]))
        for outside in (pixels[0, channel, kept[0] :], pixels[0, channel, :, kept[1] :]):
            torch.testing.assert_close(
                outside, torch.full(outside.shape, (128 - MEAN[channel]) / STD[channel]), check_stride=False
            )


def test_the_resize_is_bilinear_without_antialiasing() -> None:
    image = noise(1024, 1024)
    pixels = prepare(image)[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    source = torch.from_numpy(image).movedim(-1, 0)[None].float()
    plain = F.interpolate(source, (800, 800), mode="bilinear", align_corners=False)
    smooth = F.interpolate(source, (800, 800), mode="bilinear", align_corners=False, antialias=True)
    assert (pixels - plain).abs().max() < 1.01  # OpenCV rounds
    assert (pixels - smooth).abs().mean() > 5


def as_mmdet(classes: Tensor, masks: Tensor, padded: Any, kept: Any, size: Any) -> list[tuple[Any, ...]]:
    """mmdet's steps, on all masks at once."""
    masks = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[:, :, : kept[0], : kept[1]]
    masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
    scores = classes.softmax(-1)[:, :-1].flatten()
    found = []
    for place in scores.argsort(descending=True)[:100].tolist():
        query, label = divmod(place, classes.shape[1] - 1)
        inside = masks[query] > 0
        quality = (masks[query].sigmoid() * inside.float()).sum() / (inside.float().sum() + 1e-6)
        if inside.any():
            at = inside.nonzero()
            low, high = at.min(0).values, at.max(0).values + 1
            box = (low[1].item(), low[0].item(), high[1].item(), high[0].item())
            found.append(((scores[place] * quality).item(), CLASSES[label], box, inside))
    return sorted(found, key=lambda one: -one[0])


def test_detections_are_those_of_mmdet() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = 3 * torch.randn(7, 81, generator=generator)
    masks = F.avg_pool2d(torch.randn(7, 24, 36, generator=generator), 5, 1, 2) - 0.1
    masks[3] = -1  # a query that saw nothing
    sizes = (96, 144), (90, 133), (211, 307)
    found, expected = to_detections(classes, masks, *sizes), as_mmdet(classes, masks, *sizes)
    assert 60 < len(found) == len(expected) < 100
    assert len({id(one.mask) for one in found}) == 6
    for one, (score, label, box, mask) in zip(found, expected, strict=True):
        assert (one.label, one.box) == (label, box)
        assert one.score == pytest.approx(score, rel=1e-5)
        assert np.array_equal(one.mask, mask.numpy())


def test_overlapping_masks_stay_whole() -> None:
    """One inside the other, the smaller one more confident: both are found with all of their pixels."""
    classes = torch.full((2, 81), -10.0)
    classes[0, CLASSES.index("dog")], classes[1, CLASSES.index("couch")] = 4, 2
    masks = torch.full((2, 8, 8), -5.0)
    masks[0, 3:5, 3:5], masks[1, 1:7, 1:7] = 5, 5
    dog, couch = to_detections(classes, masks, (8, 8), (8, 8), (8, 8))[:2]
    assert (dog.label, dog.box, int(dog.mask.sum())) == ("dog", (3.0, 3.0, 5.0, 5.0), 4)
    assert (couch.label, couch.box, int(couch.mask.sum())) == ("couch", (1.0, 1.0, 7.0, 7.0), 36)
    assert 0.98 < dog.score < 1 and couch.score < dog.score


def test_the_whole_path_runs(detector: Mask2FormerDetector) -> None:
    image = noise(48, 80)
    found = detector.detect(image)
    assert 12 <= len(found) <= 100
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert all(one.mask.shape == (48, 80) and one.label in CLASSES and 0 < one.score < 1 for one in found)
    assert len(detector.colors(image, found[:3])) == 3
    described = json.loads(json.dumps(detector.identity))
    assert described["weights"]["source"] == "transformers" and described["weights"]["pinned"] is False
    assert described["colors"]["pinned"] is False and len(described["colors"]["sha256"]) == 64
    assert described["thresholds"]["counting"] == 0.9


def scores(found: list[Detection]) -> list[tuple[str, float]]:
    return [(one.label, one.score) for one in found]


def test_a_training_run_around_it_does_not_change_the_precision(detector: Mask2FormerDetector) -> None:
    image = noise(40, 40)
    alone = scores(detector.detect(image))
    during: list[tuple[str, bool]] = []
    hook = detector._network.register_forward_hook(
        lambda *_: during.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    )
    before, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert scores(detector.detect(image)) == alone
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = tf32
        hook.remove()
    assert during == [("highest", False)]


def test_files_of_older_transformers_and_of_torch_give_the_same(
    detector: Mask2FormerDetector, folders: tuple[str, str], tmp_path: Path
) -> None:
    weights = load_file(Path(folders[0], "model.safetensors"))
    table = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    older = weights | {table: torch.zeros(16, 16, dtype=torch.long)}
    older = {name: weight for name, weight in older.items() if "swin.layernorm" not in name}
    config = Path(folders[0], "config.json").read_text()
    for folder in (tmp_path / "safe", tmp_path / "torch"):
        folder.mkdir()
        (folder / "config.json").write_text(config)
    save_file(older, tmp_path / "safe" / "model.safetensors", {"format": "pt"})
    torch.save(older, tmp_path / "torch" / "pytorch_model.bin")
    image = noise(40, 40)
    for name, file in (("safe", "model.safetensors"), ("torch", "pytorch_model.bin")):
        other = build(str(tmp_path / name), folders[1])
        assert scores(other.detect(image)) == scores(detector.detect(image))
        assert other.identity["weights"]["file"] == file


def test_a_name_is_looked_up_in_the_cache(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--some--detector"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123abc")
    (model / "snapshots").mkdir()
    (model / "snapshots" / "0123abc").symlink_to(folders[0])
    assert build("some/detector", folders[1]).identity["weights"]["model"] == "some/detector"


def test_a_file_name_is_looked_up_where_torch_keeps_checkpoints_and_its_hash_checked(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / OPENMMLAB).write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"checkpoints/mask2former_swin-s.*\.pth is damaged.*its name says 743b7d99"):
        build(clip=folders[1])


def test_what_is_missing_is_said_with_where_to_get_it(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    for weights in ("no/such-model", "/no/such/file.pth", OPENMMLAB):
        with pytest.raises(UserError) as caught:
            build(weights, folders[1])
        said = str(caught.value)
        assert said.startswith(f"detector weights {weights!r} are neither a file nor a folder") and "\n" not in said
        assert f"{URL}/{OPENMMLAB} and give its path" in said
        assert HUGGING_FACE in said
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no weights: model.safetensors or pytorch_model.bin should be"):
        build(str(tmp_path / "empty"), folders[1])
    other = save_mask2former(tmp_path / "panoptic", classes=133)
    with pytest.raises(UserError, match="know 133 classes, and COCO has 80"):
        build(str(other), folders[1])
