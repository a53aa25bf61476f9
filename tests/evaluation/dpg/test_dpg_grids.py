"""Grids in the official layout: drawn, resumed at any picture, and looked over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import BOMB, foreign
from PIL import Image
from random_model import write_random_model

from data.errors import UserError
from evaluation.dpg.job import generate
from evaluation.dpg.judge import Grids, boxes, check_grid, crops, find
from evaluation.dpg.rules import Item
from t2i.config.train import SamplingConfig
from t2i.distributed import World
from t2i.pipeline import Picture, Pipeline, batches_of

ITEMS = [Item("cat1", "a red circle", ()), Item("dog2", "a blue star", ())]
WORLD = World(0, 1, torch.device("cpu"))
SAMPLING = SamplingConfig(steps=2, batch_size=3, seed=4)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = write_random_model(tmp_path_factory.mktemp("model") / "model")
    return Pipeline.load(folder, "ema", torch.device("cpu"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def generate_all(grids: Grids, pipeline: Pipeline) -> dict[str, bytes]:
    generate(WORLD, pipeline, grids, {}, {})
    return files(grids.out / "grids")


@pytest.fixture
def grids(tmp_path: Path, pipeline: Pipeline) -> dict[str, bytes]:
    return generate_all(Grids(tmp_path / "whole", ITEMS, 16, SAMPLING), pipeline)


def test_pictures_stand_in_the_official_order(tmp_path: Path, pipeline: Pipeline, grids: dict[str, bytes]) -> None:
    assert list(grids) == ["cat1.png", "dog2.png"]
    pictures = pipeline.draw([Picture(item.prompt, n) for item in ITEMS for n in range(4)], SAMPLING)
    for item, expected in zip(ITEMS, pictures.permute(0, 2, 3, 1).numpy().reshape(2, 4, 16, 16, 3), strict=True):
        image = np.asarray(Image.open(tmp_path / "whole" / "grids" / f"{item.id}.png"))
        assert image.shape == (32, 32, 3)
        tiles = [image[:16, :16], image[:16, 16:], image[16:, :16], image[16:, 16:]]
        assert np.array_equal(np.stack(tiles), expected)
        assert len({tile.tobytes() for tile in tiles}) == 4
        cut = crops(tmp_path / "whole" / "grids" / f"{item.id}.png", 16, 4)
        assert np.array_equal(np.stack([np.asarray(it) for it in cut]), expected)
        assert len(crops(tmp_path / "whole" / "grids" / f"{item.id}.png", 16, 1)) == 1


@pytest.mark.parametrize("before", range(8))
def test_a_job_that_was_cut_short_goes_on_at_the_next_picture(
    tmp_path: Path, pipeline: Pipeline, grids: dict[str, bytes], before: int
) -> None:
    cut = Grids(tmp_path / "cut", ITEMS, 16, SAMPLING)
    job = cut.job(pipeline, {}, {})
    job.begin()
    job.make(batches_of(range(before), SAMPLING.batch_size), lambda count: None)
    cut.assemble(ITEMS[: before // 4])
    whole = before // SAMPLING.batch_size * SAMPLING.batch_size
    assert [number for batch in job.begin() for number in batch] == list(range(whole, 8))
    assert generate_all(cut, pipeline) == grids
    assert not (tmp_path / "cut" / "tiles").exists() and job.begin() == []


def test_a_half_written_picture_is_drawn_again(tmp_path: Path, pipeline: Pipeline, grids: dict[str, bytes]) -> None:
    cut = Grids(tmp_path / "cut", ITEMS, 16, SAMPLING)
    job = cut.job(pipeline, {}, {})
    job.begin()
    (tmp_path / "cut" / "tiles" / ".0123456789abcdef.partial").write_bytes(grids["cat1.png"][:100])
    assert sum(map(len, job.begin())) == 8
    assert generate_all(cut, pipeline) == grids


def test_grids_of_other_settings_are_not_mixed(tmp_path: Path, pipeline: Pipeline) -> None:
    def begin(resolution: int, sampling: SamplingConfig, weights: str, model: str) -> None:
        Grids(tmp_path, ITEMS, resolution, sampling).job(pipeline, {"weights": weights}, {"model": model}).begin()

    begin(16, SAMPLING, "a", "there")
    begin(16, SAMPLING, "a", "elsewhere")
    with pytest.raises(UserError, match=r"made with other settings \(resolution, weights\): give another name"):
        begin(24, SAMPLING, "b", "there")
    with pytest.raises(UserError, match=r"other settings \(sampling.batch_size, sampling.seed, sampling.steps\)"):
        begin(16, SamplingConfig(steps=3), "a", "there")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*file: cannot be written: "):
        Grids(tmp_path / "file", ITEMS, 16, SAMPLING).job(pipeline, {}, {}).begin()


def test_equal_prompts_have_different_pictures(tmp_path: Path, pipeline: Pipeline, grids: dict[str, bytes]) -> None:
    items = [*ITEMS, replace(ITEMS[0], id="again")]
    found = generate_all(Grids(tmp_path / "equal", items, 16, SAMPLING), pipeline)
    again = found.pop("again.png")
    assert found == grids and again not in grids.values()


@pytest.mark.parametrize("kind", ["grids", "tiles"])
def test_pictures_that_nothing_is_known_of_are_not_taken_for_the_models(
    tmp_path: Path, pipeline: Pipeline, kind: str
) -> None:
    (tmp_path / kind).mkdir()
    job = Grids(tmp_path, ITEMS, 16, SAMPLING).job(pipeline, {}, {})
    job.begin()  # killed before the manifest was written
    (tmp_path / "grids.json").unlink()
    (tmp_path / kind / "cat1.png").touch()
    with pytest.raises(UserError, match=rf"holds {kind}/cat1.png, which this job has not written: give another name"):
        job.begin()


def test_images_are_found_by_their_prompts(tmp_path: Path) -> None:
    ids = {"cat1", "dog2", "v1.5", "v1.6"}
    images = {"cat1": "cat1.png", "dog2": "dog2.v2.jpg", "v1.5": "v1.5.png", "v1.6": "v1.6.png"}
    for name in (*images.values(), "readme.txt"):
        (tmp_path / name).touch()
    assert {name: path.name for name, path in find(tmp_path, ids).items()} == images
    (tmp_path / "cat1.JPG").touch()
    with pytest.raises(UserError, match="holds two images of one prompt, cat1.JPG and cat1.png: remove one"):
        find(tmp_path, ids)
    with pytest.raises(UserError, match="nowhere: cannot be read: No such file"):
        find(tmp_path / "nowhere", ids)


def test_an_image_that_is_no_grid(tmp_path: Path) -> None:
    path = tmp_path / "cat1.png"
    Image.new("RGB", (32, 32)).save(path)
    assert len(check_grid(path, 16, 4)) == 64
    with pytest.raises(UserError, match=r"cat1.png is 32 x 32 pixels: a grid .* of --resolution 32 has 64 x 64"):
        check_grid(path, 32, 4)
    assert len(check_grid(path, 32, 1)) == 64
    with pytest.raises(UserError, match="cat1.png is 32 x 32 pixels"):
        check_grid(path, 24, 1)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"cat1.png: is no image that can be read \(.*\): make it again"):
        check_grid(path, 16, 4)
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match="cat1.png: is no image that can be read "):
        check_grid(path, 16, 4)


def test_grids_of_others_are_read_as_training_reads_them(tmp_path: Path) -> None:
    for name, (content, colour) in foreign(32).items():
        (tmp_path / name).write_bytes(content)
        assert len(check_grid(tmp_path / name, 16, 4)) == 64
        for cut in crops(tmp_path / name, 16, 4):
            assert cut.mode == "RGB" and np.abs(np.asarray(cut).astype(int) - colour).max() <= 1
    (tmp_path / "bomb.png").write_bytes(BOMB)
    with pytest.raises(UserError, match=r"bomb.png: has too many pixels"):
        check_grid(tmp_path / "bomb.png", 16, 4)


def test_boxes() -> None:
    assert boxes(8, 4) == [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    assert boxes(8, 2) == boxes(8, 4)[:2]
