"""Edits that are asked for: an image's file looked at before it is decoded, and brought to a size that is allowed."""

from __future__ import annotations

import io
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from random_model import write_random_model

from data.errors import UserError
from t2i.config.loading import validate_config
from t2i.pipeline import EditSettings, Pipeline, edit_image, edit_settings
from t2i.serving.requests import EditForm, fit_image
from t2i.serving.worker import Worker
from t2i.size_limits import Limits


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    pipeline = Pipeline.load(write_random_model(tmp_path / "model"), "ema", torch.device("cpu"))
    (tmp_path / "pictures").mkdir()
    return Worker(pipeline, {}, Limits(4, 32 * 32, "the memory here"), tmp_path / "pictures")


def file(image: Image.Image, kind: str = "png") -> bytes:
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def blank_png(side: int) -> bytes:
    """Black and white pixels, eight a byte, made without an image of them."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    pixels = b"".join([*(squeeze.compress(row) for _ in range(side)), squeeze.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    whole = b""
    for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        whole += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + whole


def edit_form(**changes: Any) -> EditForm:
    plain = EditForm(file(Image.new("RGB", (16, 16))), "a red circle", "a blue star", 4, 3, 1.5, 2.0, 5)
    return replace(plain, **changes)


def test_an_edit_is_edit_images(worker: Worker) -> None:
    given = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8))
    image = Image.fromarray(given.permute(1, 2, 0).numpy())
    request = worker.check_edit(edit_form(image=file(image)))
    assert (request.image == given).all()
    (edited,) = list(worker.edit(request))[-1].generated
    settings = EditSettings(
        steps=4, n_max=3, source_guidance=1.5, target_guidance=2.0, seed=5,
        shift=worker.pipeline.config.sampling.shift,
    )  # fmt: skip
    wanted = edit_image(worker.pipeline, given, "a red circle", "a blue star", settings)
    assert (np.asarray(Image.open(edited.path)) == wanted.permute(1, 2, 0).numpy()).all()
    again = worker.check_edit(request.form)
    assert (again.image == request.image).all()
    assert again.settings == request.settings == {key: edited.settings[key] for key in request.settings}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "image: there is none"),
        ({"target": " "}, "what it is to show: is empty"),
        ({"n_max": 5}, "n_max 5 must be at most steps"),
        ({"steps": 2.5}, "steps 2.5: must be a whole number"),
        ({"target_guidance": None}, "guidance of what it is to show is empty"),
        ({"image": file(Image.new("RGB", (3, 40)))}, "each side must be at least 4"),
        ({"image": b"no image, whatever its name"}, r"image: cannot be read \(no image of a known format\): must be"),
        (
            {"image": file(Image.effect_noise((64, 64), 99))[:-999]},
            r"image: cannot be read \(.+\): must be a",
        ),
    ],
)
def test_edits_that_are_refused(worker: Worker, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        worker.check_edit(edit_form(**changes))


@pytest.mark.parametrize(
    ("given", "fitted"),
    [
        ((16, 16), (16, 16)),
        ((14, 10), (8, 12)),  # smaller than trained: the middle's whole patches
        ((1600, 1600), (16, 16)),
        ((300, 200), (12, 16)),
        ((4000, 40), (4, 64)),
    ],
)
def test_images_are_brought_to_the_trained_area(
    worker: Worker, given: tuple[int, int], fitted: tuple[int, int]
) -> None:
    image = Image.new("RGBA", given, "red")
    found = fit_image(file(image), worker.pipeline.config, worker.limits)
    assert tuple(found.shape) == (3, *fitted)
    assert found[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("side", "words"), [(13000, "13000 x 13000 pixels"), (20000, "too many pixels")])
def test_an_image_with_too_many_pixels_is_not_decoded(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, side: int, words: str
) -> None:
    def fail(*given: Any) -> None:
        raise AssertionError("decoded")

    data = blank_png(side)
    assert len(data) < 60_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UserError, match=f"image: has {words}: must have at most 67,108,864 in all"):
        worker.check_edit(edit_form(image=data))


def test_no_image_exceeds_the_limit_it_is_brought_to() -> None:
    config = validate_config({"model": {"patch_size": 16}, "data": {"resolution": 512}}, "test")
    numbers = random.Random(0)
    sizes = [(776, 565)] + [(numbers.randint(200, 1200), numbers.randint(200, 1200)) for _ in range(40)]
    for number, size in enumerate(sizes):
        limits = Limits(16, (512, 300, 64)[number % 3] ** 2, "the memory here")
        _, height, width = fit_image(file(Image.new("L", size), "jpeg"), config, limits).shape
        limits.check(height, width)
        assert height <= size[1] and width <= size[0]
        if limits.max_pixels == 512 * 512:  # many patches: whole ones cost little
            assert height * width > 0.8 * min(512 * 512, size[0] * size[1])


def test_an_image_is_upright() -> None:
    config = validate_config({"model": {"patch_size": 16}, "data": {"resolution": 64}}, "test")
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.new("RGB", (200, 100)).save(data, "jpeg", exif=exif)
    found = fit_image(data.getvalue(), config, Limits(16, 64 * 64, "the memory here"))
    assert found.shape == (3, 80, 32)


def test_the_page_opens_with_flowedits_defaults(worker: Worker) -> None:
    config = worker.pipeline.config
    assert edit_settings(config, {}, "page") == EditSettings(shift=config.sampling.shift)
