"""launch/edit.py: one edit, a file of them, how it goes on after it was killed, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from in_process import run_in_process
from numpy.typing import NDArray
from PIL import Image
from random_model import write_random_model
from tiny import run, start

import launch.edit
from data.decode import decode_file
from data.errors import UserError
from data.files import write_png
from data.packing.shapes import Group, Object, Scene, draw
from evaluation.editing.edit_list import background_scores
from t2i.pipeline import EditSettings, Pipeline, edit_image

FEW = ["--steps", "4", "--n_max", "3"]
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (18, 27, 3), dtype=np.uint8)
MIDDLE = NOISE[1:17, 1:25]
"""What is edited of it in patches of 4."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.load(model, "ema", torch.device("cpu"))


def circle(size: int = 32) -> NDArray[np.uint8]:
    """A red circle, at the left; its box is 4.8 to 14.4 by 11.2 to 20.8 of 32 pixels."""
    group = Group(1, "circle", "red")
    return draw(Scene(0, 0, "colors", (group,), None, (Object("circle", "red", (0.3, 0.5), 0.3, 0),)), size)


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five edits of three images."""
    folder = tmp_path_factory.mktemp("edits")
    (folder / "images").mkdir()
    write_png(folder / "images/noise.png", NOISE)
    write_png(folder / "circle.png", circle())
    write_png(folder / "flat.png", np.full((8, 8, 3), 99, np.uint8))
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, :16] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    noise = {"init_img": "images/noise.png", "source_prompt": "noise <b>", "target_prompts": ["a dog", "noise <b>"]}
    of_circle = {"input_img": "circle.png", "source_prompt": "a red circle", "mask": "mask.png"}
    of_circle |= {"target_prompts": ["a blue circle", "a red square"], "target_codes": ["blue", "square"]}
    flat = {"init_img": "flat.png", "source_prompt": "nothing", "target_prompts": ["a star"]}
    entries = [{**noise, "box": [5, 3, 12, 9]}, of_circle, flat]
    (folder / "edits.yaml").write_text(yaml.safe_dump(entries))
    return folder / "edits.yaml"


@pytest.fixture
def job(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the job in this process; what it writes."""

    def work(*words: object, out: str = "out") -> Path:
        run_in_process(launch.edit, "--model", model, "--out", tmp_path / out, *FEW, *words)
        return tmp_path / out

    return work


@pytest.fixture(scope="module")
def done(model: Path, edits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that was left alone."""
    out = tmp_path_factory.mktemp("done") / "out"
    run_in_process(launch.edit, "--model", model, "--edits", edits, "--out", out, *FEW)
    return out


def pngs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "images").iterdir())}


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict[str, Any]:
    found = json.loads((out / "summary.json").read_text())
    assert isinstance(found, dict)
    return found


def pixels(path: Path) -> NDArray[np.uint8]:
    return decode_file(path).transpose(1, 2, 0)


def edited(pipeline: Pipeline, image: NDArray[np.uint8], source: str, target: str, **changes: Any) -> NDArray[np.uint8]:
    given = {"steps": 4, "n_max": 3, "shift": pipeline.config.sampling.shift, **changes}
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return edit_image(pipeline, tensor, source, target, EditSettings(**given)).permute(1, 2, 0).numpy()


# One edit


def test_one_edit_is_of_the_images_middle(job: Callable[..., Path], edits: Path, pipeline: Pipeline) -> None:
    words = ["--image", edits.parent / "images/noise.png", "--source", "noise", "--target", "a dog"]
    result = pixels(job(*words, out="a.png"))
    assert result.shape == (16, 24, 3)
    np.testing.assert_array_equal(result, edited(pipeline, MIDDLE, "noise", "a dog"))
    changed = ["--n_min", "1", "--n_avg", "2", "--source_guidance", "2", "--target_guidance", "5"]
    changed += ["--shift", "1.5", "--seed", "3"]
    settings = {"n_min": 1, "n_avg": 2, "source_guidance": 2, "target_guidance": 5, "shift": 1.5, "seed": 3}
    np.testing.assert_array_equal(
        pixels(job(*words, *changed, out="b.png")), edited(pipeline, MIDDLE, "noise", "a dog", **settings)
    )


def test_an_image_too_large_for_the_memory_is_refused(job: Callable[..., Path], tmp_path: Path) -> None:
    write_png(tmp_path / "photo.png", np.zeros((1501, 2000, 3), np.uint8))
    said = r"photo.png, 1500 x 2000 pixels: a picture takes about .* GiB are free, enough for \d+x\d+: scale the image"
    with pytest.raises(UserError, match=said):
        job("--image", tmp_path / "photo.png", "--source", "a", "--target", "b", out="a.png")
    (tmp_path / "edits.yaml").write_text("[{init_img: photo.png, source_prompt: a, target_prompts: [b]}]")
    with pytest.raises(UserError, match=said):
        job("--edits", tmp_path / "edits.yaml")
    assert not (tmp_path / "out").exists() and not (tmp_path / "a.png").exists()


def test_the_same_words_give_the_image_back(job: Callable[..., Path], edits: Path) -> None:
    guidance = ["--source_guidance", "4", "--target_guidance", "4"]
    out = job("--image", edits.parent / "circle.png", "--source", "x", "--target", "x", *guidance, out="a.png")
    np.testing.assert_array_equal(pixels(out), circle())


def test_raw_weights(job: Callable[..., Path], edits: Path) -> None:
    words = ["--image", edits.parent / "circle.png", "--source", "a", "--target", "b"]
    raw = job(*words, "--weights", "raw", out="raw.png")
    assert raw.read_bytes() != job(*words, out="ema.png").read_bytes()


# A file of edits


def test_every_edit_is_its_own(done: Path, pipeline: Pipeline) -> None:
    names = ["00000.png", "00000_0.png", "00000_1.png", "00001.png", "00001_0.png", "00001_1.png"]
    assert list(pngs(done)) == [*names, "00002.png", "00002_0.png"]
    np.testing.assert_array_equal(pixels(done / "images/00000.png"), MIDDLE)
    for line in results(done):
        source, result = (pixels(done / line[name]) for name in ("source_file", "file"))
        expected = edited(pipeline, source, line["source_prompt"], line["target_prompt"])
        np.testing.assert_array_equal(result, expected)


def test_what_is_said_of_the_background(done: Path) -> None:
    found = results(done)
    assert [it["file"] for it in found] == [f"images/{name}.png" for name in _NAMES]
    assert [it["target_code"] for it in found] == ["", "", "blue", "square", ""]
    box, mask = np.zeros((16, 24), np.bool_), np.zeros((32, 32), np.bool_)
    box[2:8, 4:11] = True  # a row and a column are cut off the image
    mask[8:24, :16] = True
    for line, inside in zip(found, [box, box, mask, mask], strict=False):
        source, result = (pixels(done / line[name]) for name in ("source_file", "file"))
        assert line["background"] == background_scores(source, result, inside)
        assert line["region"] == inside.mean() and line["not_measured"] == ""
    assert found[-1]["background"] is None and found[-1]["not_measured"] == "no region is given"
    told = summary(done)
    assert (told["edits"], told["images"], told["measured"]) == (5, 3, 4)
    mean = np.mean([line["background"]["mse"] for line in found[:4]])
    assert told["background"]["mse"]["mean"] == pytest.approx(mean)
    assert told["settings"]["n_max"] == 3 and told["settings"]["shift"] == 3.0
    assert told["fingerprint"]["which"] == "ema" and len(told["fingerprint"]["weights"]) == 32
    assert told["fingerprint"]["speed"]["images"] == 5
    assert told["fingerprint"]["cut_prompts"] == 0


_NAMES = ["00000_0", "00000_1", "00001_0", "00001_1", "00002_0"]


class Texts(HTMLParser):
    """The texts of a page, and its elements' names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_shows_every_image_beside_its_edit(done: Path) -> None:
    page = Texts(done / "edits.html")
    assert page.tags.count("figure") == 10
    assert page.texts.count("noise <b>") == 3  # text stays text
    assert {"00001_0 blue", "a blue circle", "1 not measured: no region is given."} <= set(page.texts)


def test_edits_do_not_depend_on_what_is_edited_beside_them(
    job: Callable[..., Path], done: Path, edits: Path, tmp_path: Path
) -> None:
    entries = yaml.safe_load(edits.read_text())
    turned = [{**it, "target_prompts": it["target_prompts"][::-1], "target_codes": None} for it in entries[1::-1]]
    path = edits.with_name("turned.yaml")
    path.write_text(yaml.safe_dump(turned))
    found = pngs(job("--edits", path))
    theirs = pngs(done)
    for mine, other in {"00000_0": "00001_1", "00000_1": "00001_0", "00001_0": "00000_1"}.items():
        assert found[f"{mine}.png"] == theirs[f"{other}.png"]


def test_what_is_missing_is_made_again_and_nothing_else(
    job: Callable[..., Path], done: Path, edits: Path, model: Path, tmp_path: Path
) -> None:
    out = job("--edits", edits)
    kept = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    lost = out / "images/00001_0.png"
    lost.unlink()
    (out / "summary.json").unlink()
    job("--edits", edits)
    assert {path.name for path, at in kept.items() if path.stat().st_mtime_ns != at} == {lost.name}
    assert pngs(out) == pngs(done)
    assert (out / "results.jsonl").read_bytes() == (done / "results.jsonl").read_bytes()


def test_killed_and_gone_on_with_on_two_processes_it_is_the_same(
    model: Path, edits: Path, done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["--model", str(model), "--edits", str(edits), "--out", str(out), *FEW]
    process = start("python", "edit.py", *command, ranks=1)
    deadline = time.monotonic() + 200
    while len(list(out.glob("images/*_?.png"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("images/*.png")}
    assert not (out / "summary.json").exists()
    output = run("torchrun", "edit.py", *command)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert pngs(out) == pngs(done)
    assert (out / "results.jsonl").read_bytes() == (done / "results.jsonl").read_bytes()
    assert summary(out)["background"] == summary(done)["background"]
    assert "5 edits of 3 images, 4 with a region" in output


@pytest.mark.parametrize(
    ("words", "differs"),
    [
        (["--seed", "1"], "settings.seed"),
        (["--n_min", "1"], "settings.n_min"),
        (["--weights", "raw"], "weights, which"),
    ],
)
def test_a_folder_of_other_edits_is_refused(
    job: Callable[..., Path], edits: Path, words: list[str], differs: str
) -> None:
    out = job("--edits", edits)
    theirs = pngs(out)
    with pytest.raises(UserError, match=rf"holds images made with other settings \({differs}\): give another name"):
        job("--edits", edits, *words)
    assert pngs(out) == theirs and (out / "summary.json").exists()


def test_regions_may_be_given_later_images_may_not_change(
    job: Callable[..., Path], edits: Path, tmp_path: Path
) -> None:
    out = job("--edits", edits)
    entries = yaml.safe_load(edits.read_text())
    entries[2]["box"] = [0, 0, 4, 4]
    path = edits.with_name("later.yaml")
    path.write_text(yaml.safe_dump(entries))
    job("--edits", path)
    assert summary(out)["measured"] == 5 and results(out)[-1]["region"] == 0.25
    entries[2]["init_img"] = "circle.png"
    path.write_text(yaml.safe_dump(entries))
    with pytest.raises(UserError, match=r"holds images made with other settings \(edits\)"):
        job("--edits", path)


def test_regions_that_a_detector_finds(job: Callable[..., Path], edits: Path) -> None:
    """Of edits to the same words, which leave the circle where it is."""
    entry = {"init_img": "circle.png", "source_prompt": "x", "target_prompts": ["x"]}
    path = edits.with_name("detected.yaml")
    path.write_text(yaml.safe_dump([{**entry, "detect": ["circle", "heart"]}, {**entry, "detect": ["star"]}]))
    same = ["--source_guidance", "4", "--target_guidance", "4"]
    out = job("--edits", path, *same, "--detector", "shapes")
    first, second = results(out)
    assert len(first["found"]) == 2  # in the image and in the result
    for box in first["found"]:
        assert box == pytest.approx([4.8, 11.2, 14.4, 20.8], abs=0.4)
    assert first["region"] == pytest.approx(11 * 11 / 32**2, abs=0.03) and first["background"]["mse"] == 0
    assert second["background"] is None and second["not_measured"] == "nothing was found"
    assert summary(out)["detector"]["name"] == "shapes"
    job("--edits", path, *same)
    assert {it["not_measured"] for it in results(out)} == {"no detector was given"}


# What is refused

ONE = {"--image": "circle.png", "--source": "a", "--target": "b"}
REFUSED: dict[str, list[str]] = {
    "--image is missing: give --image, --source and --target, or a file --edits": [],
    "--target is missing": ["--image", "circle.png", "--source", "a"],
    "--source is for a single edit": ["--edits", "edits.yaml", "--source", "a"],
    "none.yaml: cannot be read": ["--edits", "none.yaml"],
    "--detector does nothing, since no entry has 'detect'": ["--edits", "edits.yaml", "--detector", "shapes"],
    "--clip does nothing without --detector mask2former": [
        "--edits",
        "edits.yaml",
        "--detector",
        "shapes",
        "--clip",
        "c",
    ],
    r"command line: .*n_max 9 must be at most steps \(4\)": ["--edits", "edits.yaml", "--n_max", "9"],
    "entry 0: detect 'cow': the detector shapes knows no such class": ["--edits", "cow.yaml", "--detector", "shapes"],
    "entry 1: box .*: must be .* within circle.png, which has 32 x 32": ["--edits", "outside.yaml"],
    "entry 0: the region covers all of circle.png": ["--edits", "all.yaml"],
    "gone.png: cannot be read: No such file": ["--edits", "gone.yaml"],
    "edits.yaml: is no image": ["--edits", "text.yaml"],
    "tiny.png has 3 x 9 pixels: each side must be at least 4": ["--edits", "tiny.yaml"],
}


@pytest.fixture
def mistakes(edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files with one mistake each, in the present folder."""
    for name in ("edits.yaml", "circle.png", "flat.png", "mask.png", "images"):
        (tmp_path / name).symlink_to(edits.parent / name)
    write_png(tmp_path / "tiny.png", np.zeros((3, 9, 3), np.uint8))
    entry = {"init_img": "circle.png", "source_prompt": "a", "target_prompts": ["b"]}
    wrong: dict[str, list[dict[str, Any]]] = {
        "cow": [{**entry, "detect": ["cow"]}],
        "outside": [entry, {**entry, "box": [0, 0, 33, 9]}],
        "all": [{**entry, "box": [0, 0, 32, 32]}],
        "gone": [entry, {**entry, "init_img": "gone.png"}],
        "text": [{**entry, "init_img": "edits.yaml"}],
        "tiny": [{**entry, "init_img": "tiny.png"}],
    }
    for name, entries in wrong.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(entries))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("mistakes")
@pytest.mark.parametrize("said", REFUSED)
def test_mistakes_leave_nothing_behind(job: Callable[..., Path], tmp_path: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        job(*REFUSED[said])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("mistakes")
@pytest.mark.parametrize(
    ("change", "out", "said"),
    [
        ({}, "out", "--out .*out: the name must end in .png"),
        ({}, "none/out.png", "--out .*: there is no folder .*none"),
        ({}, "tiny.png", "--out: .*tiny.png exists: remove it, or give another name"),
        ({"--image": "gone.png"}, "out.png", "gone.png: cannot be read"),
        ({"--image": "edits.yaml"}, "out.png", "edits.yaml: is no image that can be read"),
        ({"--image": "tiny.png"}, "out.png", "--image tiny.png has 3 x 9 pixels"),
        ({"--detector": "shapes"}, "out.png", "--detector does nothing without --edits: leave it out"),
        ({"--n_avg": "0"}, "out.png", "n_avg: input should be greater than 0"),
        ({"--steps": "many"}, "out.png", "steps"),
    ],
)
def test_mistakes_about_one_edit(job: Callable[..., Path], change: dict[str, str], out: str, said: str) -> None:
    words = [word for pair in (ONE | change).items() for word in pair]
    with pytest.raises(UserError, match=said):
        job(*words, out=out)
