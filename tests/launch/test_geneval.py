"""launch/geneval.py on drawn shapes: what it leaves behind, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import run_in_process
from PIL import Image
from random_model import write_random_model
from tiny import run, start
from tiny_geneval import save_clip, save_mask2former

import launch.geneval
from data.errors import UserError
from data.files import write_png
from data.packing.shapes import draw
from evaluation.geneval.prompts import TASKS, official, read, to_lines
from evaluation.geneval.summary import begin_folder, image_path
from evaluation.proving.detector import ACCEPTED
from evaluation.proving.prompts import proving_prompts, proving_scenes
from t2i.pipeline import Picture, Pipeline

Job = Callable[..., Path]
FEW = ["--images_per_prompt", "2", "--sampling", '{"batch_size": 3, "steps": 2}', "--detector", "shapes"]
"""Twelve images of random weights, in batches that cross prompts."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Run the job in this process; its folder."""

    def work(*words: str, out: Path | None = None) -> Path:
        out = out or tmp_path / "out"
        run_in_process(launch.geneval, "--out", out, *words)
        return out

    return work


@pytest.fixture(scope="module")
def scored(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that was left alone, on one prompt of each task."""
    out = tmp_path_factory.mktemp("scored") / "out"
    run_in_process(launch.geneval, "--model", model, "--out", out, "--limit", "1", *FEW)
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as others may make it: a scene of each prompt, and an empty picture of it."""
    root = tmp_path_factory.mktemp("drawn") / "images"
    scenes = proving_scenes(12)
    begin_folder(root, proving_prompts(12))
    for number, scene in enumerate(scenes):
        picture = draw(scene, 48)
        write_png(image_path(root, number, 0), picture)
        write_png(image_path(root, number, 1), picture[:1, :1].repeat(48, 0).repeat(48, 1))
    return root


def pngs(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.png"))}


def summary(out: Path) -> dict[str, Any]:
    found = json.loads((out / "summary.json").read_text())
    assert isinstance(found, dict)
    return found


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def copy(scored: Path, out: Path) -> Path:
    return Path(shutil.copytree(scored, out))


# --- what is drawn ---


def test_an_image_is_a_function_of_prompt_and_number(scored: Path, model: Path) -> None:
    prompts = read(scored / "prompts.jsonl")
    assert [it["tag"] for it in prompts] == list(TASKS)
    pipeline = Pipeline.load(model, "ema", torch.device("cpu"))
    sampling = pipeline.config.sampling.model_copy(update={"batch_size": 3, "steps": 2})
    pictures = [Picture(it["prompt"], n) for n in (1, 0) for it in prompts]
    expected = dict(zip([(it.prompt, it.number) for it in pictures], pipeline.draw(pictures, sampling), strict=True))
    for number, it in enumerate(prompts):
        for n in range(2):
            with Image.open(image_path(scored / "images", number, n)) as image:
                # At another place in a batch a kernel may round otherwise.
                away = np.asarray(image).astype(int) - expected[it["prompt"], n].permute(1, 2, 0).numpy()
                assert np.abs(away).max() <= 1
    assert len({*pngs(scored).values()}) == 12 + 6  # with the grids, all are different


def test_prompts_of_the_same_words_have_different_images(model: Path, job: Job, tmp_path: Path) -> None:
    circle = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}
    (tmp_path / "prompts.jsonl").write_bytes(to_lines([circle, circle]))
    out = job("--model", str(model), "--prompts", str(tmp_path / "prompts.jsonl"), "--sample_only", *FEW)
    images = [content for name, content in pngs(out).items() if "samples" in name]
    assert len(images) == len(set(images)) == 4


def test_killed_and_gone_on_with_on_two_processes_it_is_the_same(model: Path, scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["--model", str(model), "--out", str(out), "--limit", "1", *FEW]
    process = start("python", "geneval.py", *command, ranks=1)
    deadline = time.monotonic() + 200
    while len(list(out.rglob("samples/*.png"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("samples/*.png")}
    assert 2 <= len(kept) < 12 and not (out / "summary.json").exists()
    output = run("torchrun", "geneval.py", *command)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert pngs(out) == pngs(scored)
    assert (out / "results.jsonl").read_bytes() == (scored / "results.jsonl").read_bytes()
    mine, theirs = summary(out), summary(scored)
    assert (
        mine["generated_with"].pop("speed")["devices"] == "2 × CPU"
        and theirs["generated_with"].pop("speed")["images"] == 12
    )
    assert mine == theirs
    table = [line.split() for line in output.splitlines() if line.startswith(("overall", "color attr"))]
    assert [line[-2:] for line in table] == [["1", "2"], ["6", "12"]]


def test_a_scored_folder_is_left_as_it_is(model: Path, scored: Path, job: Job, tmp_path: Path) -> None:
    out = copy(scored, tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*") if path.is_file()}
    kept |= {path: path.stat().st_mtime_ns for path in (out / "verdicts").iterdir()}
    job("--model", str(model), "--limit", "1", *FEW)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert summary(out)["generated_with"]["speed"] == summary(scored)["generated_with"]["speed"]
    (out / "speed.json").unlink()
    job("--model", str(model), "--limit", "1", *FEW)
    assert summary(out)["generated_with"]["speed"] is None


def test_an_image_that_has_changed_is_judged_again(scored: Path, job: Job, tmp_path: Path) -> None:
    out = copy(scored, tmp_path / "out")
    prompts = read(out / "prompts.jsonl")
    scene = next(it for it in proving_scenes() if it.caption == prompts[3]["prompt"])
    write_png(image_path(out / "images", 3, 1), draw(scene, 48))
    job("--score_only", "--detector", "shapes")
    assert not results(scored)[7]["correct"] and results(out)[7]["correct"]
    assert [it for i, it in enumerate(results(out)) if i != 7] == [it for i, it in enumerate(results(scored)) if i != 7]


OTHERWISE = {
    "sampling.seed": ["--sampling.seed", "1"],
    "sampling.steps": ["--sampling.steps", "3"],
    "images_per_prompt": ["--images_per_prompt", "3"],
    "size": ["--size", "16x24"],
    "weights, which": ["--weights", "raw"],
    "prompts": ["--tasks", "colors"],
}


@pytest.mark.parametrize("differs", OTHERWISE)
def test_a_folder_of_other_images_is_refused(model: Path, scored: Path, job: Job, tmp_path: Path, differs: str) -> None:
    copy(scored, tmp_path / "out")
    with pytest.raises(UserError, match=rf"holds images made with other settings \({differs}\): give another name"):
        job("--model", str(model), "--limit", "1", *FEW, *OTHERWISE[differs])
    assert pngs(tmp_path / "out") == pngs(scored)


# --- what is scored ---


def test_the_images_of_others_are_scored(drawn: Path, job: Job) -> None:
    found = summary(job("--images", str(drawn), "--detector", "shapes"))
    assert found["overall"] == 0.5 and found["correct_prompts"] == 1.0
    assert found["overall_interval"] == [0.5, 0.5]
    assert {task: it["score"] for task, it in found["tasks"].items()} == dict.fromkeys(TASKS, 0.5)
    assert found["generated_with"] == {"images": str(drawn)} and found["size"] == [48, 48]


def test_images_of_others_are_scored_into_a_folder_of_their_own(drawn: Path, job: Job, tmp_path: Path) -> None:
    words = ["--images", str(drawn), "--detector", "shapes"]
    out = job(*words)
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    job(*words)
    assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before
    again = shutil.copytree(drawn, tmp_path / "again")
    with pytest.raises(UserError, match=r"--out .*: holds scores of other images \(images\): give another folder"):
        job("--images", str(again), "--detector", "shapes")
    (out / "scored.json").write_text(json.dumps({"job": "dpg", "images": str(drawn), "resolution": 16}))
    with pytest.raises(UserError, match=r"holds scores of other images \(job, resolution\)"):
        job(*words)
    (out / "scored.json").unlink()  # now it is another job's
    with pytest.raises(UserError, match="--out .*: holds .*, which this job has not written: give another folder"):
        job(*words)
    assert (out / "summary.json").exists()


def test_results_have_genevals_fields(drawn: Path, job: Job) -> None:
    out = job("--images", str(drawn), "--detector", "shapes")
    lines, prompts = results(out), proving_prompts(12)
    assert [it["correct"] for it in lines] == [True, False] * 12
    fields = ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    for number, (right, wrong) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        assert list(right) == list(wrong) == fields
        assert json.loads(right["metadata"]) == prompts[number]
        assert (out / right["filename"]).resolve() == image_path(drawn, number, 0).resolve()
        assert right["reason"] == "" and "expected, 0 found" in wrong["reason"]
        details = json.loads(right["details"])
        counts = {item["class"]: item["count"] for item in prompts[number]["include"]}
        assert {label: len(boxes) for label, boxes in details.items()} == counts
        for x0, y0, x1, y1, score in (box for boxes in details.values() for box in boxes):
            assert 0 <= x0 < x1 <= 48 and 0 <= y0 < y1 <= 48 and ACCEPTED < score <= 1


def test_the_summary_says_what_the_scores_depend_on(scored: Path, model: Path) -> None:
    found = summary(scored)
    made = found["generated_with"]
    assert made["cut_prompts"] > 0  # the model reads 8 tokens
    assert made["model"] == str(model) and made["which"] == "ema" and len(made["weights"]) == 32
    assert made["sampling"]["seed"] == 0 and made["sampling"]["steps"] == 2
    assert made["speed"]["images"] == 12 and made["speed"]["images_per_s"] > 0
    assert found["size"] == [16, 16] and found["images_per_prompt"] == 2
    assert found["name"] == "Proving ground" and not any("Held out" in note for note in found["notes"])
    assert found["detector"]["name"] == "shapes" and found["thresholds"]["score"] == ACCEPTED
    assert len(found["prompt_file"]["md5"]) == 32 and found["prompt_file"]["file"] == "proving ground"
    assert found["notes"] == [
        "The prompts are not GenEval's official 553: the scores compare with no published ones.",
        "A part of the prompts was scored: the first 1 of each task.",
        "Images per prompt: 2, where GenEval has 4.",
    ]


def test_genevals_own_prompts_by_genevals_own_detector(model: Path, job: Job, tmp_path: Path) -> None:
    """Of tiny random weights."""
    clip, weights = save_clip(tmp_path / "clip"), save_mask2former(tmp_path / "mask2former")
    of_weights = ["--clip", str(clip), "--detector_weights", str(weights)]
    few = ["--images_per_prompt", "1", "--sampling.steps", "1", "--limit", "1"]
    out = job("--model", str(model), *few, *of_weights)
    assert read(out / "prompts.jsonl") == [next(it for it in official() if it["tag"] == task) for task in TASKS]
    found = summary(out)
    assert found["detector"]["weights"]["pinned"] is False and found["prompt_file"]["kind"] == "official"
    assert found["name"] == "GenEval's rules"
    file = "model.safetensors"
    assert found["notes"] == [
        "A part of the prompts was scored: the first 1 of each task.",
        "Images per prompt: 1, where GenEval has 4.",
        f"The detector's weights are not those of published scores: {file}, {file}.",
    ]


def test_captions_that_training_never_saw_are_scored_apart(drawn: Path, job: Job, tmp_path: Path) -> None:
    prompts = [{**it, "heldout": number < 3} for number, it in enumerate(proving_prompts(12))]
    images = Path(shutil.copytree(drawn, tmp_path / "images"))
    for number, it in enumerate(prompts):
        (images / f"{number:05d}" / "metadata.jsonl").write_bytes(to_lines([it]))
    shutil.copy(image_path(images, 0, 0), image_path(images, 0, 1))
    found = summary(job("--images", str(images), "--detector", "shapes"))
    assert found["held_out"]["prompts"] == 3 and found["held_out"]["correct_images"] == pytest.approx(4 / 6)
    assert found["prompts"] == 12 and found["correct_images"] == pytest.approx(13 / 24)
    assert "captions that training never saw if its scenes were packed as those of make prove" in found["notes"][-1]


def test_tags_and_fields_of_others_are_scored(drawn: Path, job: Job, tmp_path: Path) -> None:
    images = Path(shutil.copytree(drawn, tmp_path / "images"))
    for number, it in enumerate(proving_prompts(12)):
        lines = to_lines([{**it, "tag": "<b>", "heldout": "no"} if number < 3 else it])
        (images / f"{number:05d}" / "metadata.jsonl").write_bytes(lines)
    out = job("--images", str(images), "--detector", "shapes")
    found = summary(out)
    assert found["tasks"]["<b>"]["prompts"] == 3 and found["prompts"] == 12 and "held_out" not in found
    page = (out / "report.html").read_text()
    assert page.count("&lt;b&gt;") >= 3 and "<b><" not in page and '"<b>"' not in page


def test_part_of_a_folder_is_scored_and_said_to_be_a_part(drawn: Path, job: Job, capsys: Any) -> None:
    found = summary(
        job("--images", str(drawn), "--detector", "shapes", "--tasks", "position", "colors", "--limit", "1")
    )
    assert {task: it["images"] for task, it in found["tasks"].items()} == {"colors": 2, "position": 2}
    said = "A part of the prompts was scored: the first 1 of each task, of position, colors alone."
    assert said in found["notes"] and said in capsys.readouterr().out


def test_another_detectors_verdicts_are_refused(scored: Path, job: Job, tmp_path: Path, monkeypatch: Any) -> None:
    copy(scored, tmp_path / "out")
    detector = launch.geneval.build_detector("shapes", None, None, torch.device("cpu"))
    identity = {**detector.identity, "accepted": 0.5}
    monkeypatch.setattr(type(detector), "identity", property(lambda self: identity))
    with pytest.raises(UserError, match=r"holds verdicts of another detector \(detector.accepted\): remove it"):
        job("--score_only", "--detector", "shapes")


# --- what is refused ---


def test_images_that_are_missing_are_never_scored(scored: Path, job: Job, tmp_path: Path) -> None:
    out = copy(scored, tmp_path / "out")
    (out / "summary.json").unlink()
    image_path(out / "images", 2, 1).unlink()
    with pytest.raises(UserError, match="lacks 1 of 12 images"):
        job("--score_only", "--detector", "shapes")
    assert not (out / "summary.json").exists()


def test_a_damaged_image_is_named(scored: Path, job: Job, tmp_path: Path) -> None:
    out = copy(scored, tmp_path / "out")
    image_path(out / "images", 2, 1).write_bytes(b"")
    with pytest.raises(UserError, match="00002/samples/0001.png: is no image that can be read"):
        job("--score_only", "--detector", "shapes")
    assert (out / "verdicts").is_dir() and not (out / "summary.json").exists()  # that was of other images


def test_what_the_detector_cannot_find_is_told_and_not_scored_0(
    model: Path, drawn: Path, job: Job, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(to_lines(official()))
    with pytest.raises(UserError, match="asks for the class 'bench', which the detector shapes cannot find: choose"):
        job("--model", str(model), "--prompts", str(tmp_path / "prompts.jsonl"), *FEW)
    assert not (tmp_path / "out").exists()
    weights = ["--clip", str(save_clip(tmp_path / "clip"))]
    weights += ["--detector_weights", str(save_mask2former(tmp_path / "mask2former"))]
    with pytest.raises(UserError, match="the class .*, which the detector Mask2Former Swin-S cannot find: choose"):
        job("--images", str(drawn), *weights)
    images = Path(shutil.copytree(drawn, tmp_path / "images"))
    asked = read(images / "00002" / "metadata.jsonl")[0]
    many = {**asked, "include": [{"class": "star", "count": 17}]}
    (images / "00002" / "metadata.jsonl").write_bytes(to_lines([many]))
    with pytest.raises(UserError, match="asks for 17 of 'star', and GenEval counts the 16 most confident alone"):
        job("--images", str(images), "--detector", "shapes")
    more = {**asked, "exclude": [{"class": "blob", "count": 1}]}
    (images / "00002" / "metadata.jsonl").write_bytes(to_lines([more]))
    with pytest.raises(UserError, match="the class 'blob', which the detector shapes cannot find"):
        job("--images", str(images), "--detector", "shapes")


def test_a_folder_of_images_that_are_not_the_jobs_is_refused(
    model: Path, drawn: Path, job: Job, tmp_path: Path
) -> None:
    shutil.copytree(drawn, tmp_path / "out" / "images")
    with pytest.raises(UserError, match="holds images/.*, which this job has not written"):
        job("--model", str(model), *FEW)
    with pytest.raises(
        UserError, match="holds no images of this job: generate them, or give those of others as --images"
    ):
        job("--score_only", "--detector", "shapes")


def test_prompts_that_the_images_are_not_of(drawn: Path, job: Job, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    prompts = proving_prompts(12)
    file.write_bytes(to_lines(prompts))
    job("--images", str(drawn), "--prompts", str(file), "--detector", "shapes")
    file.write_bytes(to_lines([*prompts[:5], prompts[6], *prompts[6:]]))
    with pytest.raises(UserError, match=r"00005/metadata.jsonl is not prompt 00005 of --prompts"):
        job("--images", str(drawn), "--prompts", str(file), "--detector", "shapes")
    file.write_bytes(to_lines(prompts[:11]))
    with pytest.raises(UserError, match="has 11 prompts, and there is a folder 00011"):
        job("--images", str(drawn), "--prompts", str(file), "--detector", "shapes")


REFUSED = {
    "--model is missing": [],
    "--images_per_prompt 0: must be at least 1": ["--model", "m", "--images_per_prompt", "0"],
    "--limit -1: must be at least 1": ["--model", "m", "--limit=-1"],
    "--sampling does nothing with --images: leave it out": ["--images", "i", "--sampling.steps", "2"],
    "--weights does nothing with --images: leave it out": ["--images", "i", "--weights", "raw"],
    "--model does nothing with --score_only: leave it out": ["--score_only", "--model", "m"],
    "--tasks was chosen when the images were generated": ["--score_only", "--tasks", "colors"],
    "--clip does nothing with --detector shapes": ["--images", "i", "--detector", "shapes", "--clip", "c"],
    "i: there is no such folder of images": ["--images", "i", "--detector", "shapes"],
    "clip 'no/such' is neither a folder nor": ["--model", "m", "--clip", "no/such"],  # before anything is drawn
    "m is not a model folder": ["--model", "m", "--detector", "shapes"],
}


@pytest.mark.parametrize("said", REFUSED)
def test_options_that_do_not_fit(job: Job, tmp_path: Path, said: str) -> None:
    with pytest.raises(UserError, match=said):
        job(*REFUSED[said])
    assert not (tmp_path / "out").exists()


def test_without_a_folder_to_write_to() -> None:
    with pytest.raises(UserError, match="--out is missing"):
        run_in_process(launch.geneval, "--model", "m")


def test_the_official_prompts_are_written(tmp_path: Path, capsys: Any) -> None:
    run_in_process(launch.geneval, "--write_prompts", tmp_path / "prompts.jsonl")
    assert read(tmp_path / "prompts.jsonl") == official()
    assert "md5 9a0ed515640279a48ed3380d90aec0ed" in capsys.readouterr().out
