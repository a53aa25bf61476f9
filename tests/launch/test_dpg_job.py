"""launch/dpg.py: from a model folder and a copy of the benchmark to the table, by each kind of judge."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dpg_copy import ROWS, write_copy
from in_process import run_in_process
from PIL import Image
from random_model import write_random_model
from tiny import run
from tiny_judges import save_vilt
from transformers import AutoProcessor, ViltForQuestionAnswering

import launch.dpg
from data.errors import UserError
from evaluation.dpg.rules import MPLUG

Dpg = Callable[..., Path]
FEW = ("--sampling.steps", "2", "--sampling.batch_size", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vilt(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_copy(tmp_path_factory.mktemp("benchmark") / "dpg_bench")


@pytest.fixture
def dpg(copy: Path, tmp_path: Path) -> Dpg:
    """Run the job in one process; its folder."""

    def start(*words: str | Path, out: str = "out", benchmark: Path = copy) -> Path:
        run_in_process(launch.dpg, "--benchmark", benchmark, "--out", tmp_path / out, *words)
        return tmp_path / out

    return start


def draw_colors(folder: Path, side: int = 16) -> Path:
    """Grids of plain tiles, one for each prompt."""
    folder.mkdir(exist_ok=True)
    for name, colors in (("cat1", ("red", "blue", "white", "black")), ("dog2", ("green", "red", "gray", "blue"))):
        grid = Image.new("RGB", (2 * side, 2 * side))
        for n, color in enumerate(colors):
            grid.paste(Image.new("RGB", (side, side), color), (n % 2 * side, n // 2 * side))
        grid.save(folder / f"{name}.png")
    return folder


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_from_a_model_to_the_table(dpg: Dpg, model: Path, judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = dpg("--model", model, "--judge", judge, *FEW)
    found = summary(out)
    assert found["name"] == f"DPG questions about other prompts, judged by {judge}, 2 of 2 prompts"
    assert found["name"] in capsys.readouterr().out
    assert (found["prompts"], found["images_per_prompt"], found["resolution"]) == (2, 4, 16)
    assert sum(found["answers"].values()) == 7 * 4
    drawn = found["generated_with"]
    assert drawn["cut_prompts"] == 0
    assert (drawn["which"], drawn["sampling"]["steps"], drawn["sampling"]["seed"]) == ("ema", 2, 0)
    assert (drawn["speed"]["images"], drawn["speed"]["devices"]) == (8, "1 × CPU")
    hashed = hashlib.blake2b((model / "ema.safetensors").read_bytes(), digest_size=16).hexdigest()
    assert drawn["weights"] == hashed
    assert set(files(out / "grids")) == {"cat1.png", "dog2.png"}
    assert not (out / "tiles").exists()
    # The answers are those of the judge to each tile.
    model_, processor = ViltForQuestionAnswering.from_pretrained(judge).eval(), AutoProcessor.from_pretrained(judge)
    for result in results(out):
        grid = Image.open(out / "grids" / f"{result['id']}.png")
        for n, box in enumerate([(0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 16, 32), (16, 16, 32, 32)]):
            for question in result["questions"]:
                torch.manual_seed(0)
                logits = model_(**processor(grid.crop(box), question["question"], return_tensors="pt")).logits
                assert question["answers"][n] == ("yes", "no", "red")[int(logits.argmax())]
    assert found["total"] == pytest.approx(50 * sum(result["score"] for result in results(out)))
    # Scored again, by what is there.
    before = files(out)
    assert files(dpg("--score_only", "--judge", judge)) == before


def answered(path: Path, to: Path, noes: set[tuple[str, int, int]], judge: str = "someone") -> Path:
    """All questions of a file answered with yes, but these."""
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["answer"] = "no" if (line["id"], line["crop"], line["proposition_id"]) in noes else "yes"
    to.write_text("".join(json.dumps(line) + "\n" for line in [head | {"judge": judge}, *lines]))
    return to


@pytest.fixture
def others(tmp_path: Path) -> list[str | Path]:
    """Grids that others made."""
    return ["--images", draw_colors(tmp_path / "theirs"), "--resolution", "16"]


NOES = {("cat1", 0, 1), ("cat1", 3, 2), ("dog2", 1, 3), ("dog2", 3, 1)}


def test_answers_from_elsewhere_worked_by_hand(dpg: Dpg, others: list[str | Path], tmp_path: Path) -> None:
    dpg(*others, "--write_questions", tmp_path / "q.jsonl")
    answers = answered(tmp_path / "q.jsonl", tmp_path / "a.jsonl", NOES, MPLUG)
    found = summary(dpg(*others, "--answers", answers))
    assert found["name"] == f"DPG questions about other prompts, judged by {MPLUG}, 2 of 2 prompts"
    # cat1: picture 0 loses 1, 2, 3 (1/4 left), picture 3 loses 2, 3 (2/4): (1/4 + 1 + 1 + 1/2) / 4.
    # dog2: picture 1 loses 3 and 2 (1/3 left), picture 3 loses 1 and 2 (1/3): (1 + 1/3 + 1 + 1/3) / 4.
    cat, dog = results(tmp_path / "out")
    assert (cat["images"], cat["score"]) == ([0.25, 1, 1, 0.5], 0.6875)
    assert dog["score"] == pytest.approx(2 / 3)
    assert found["total"] == pytest.approx(100 * (0.6875 + 2 / 3) / 2)
    assert {name: cell["score"] for name, cell in found["broad"].items()} == {
        "attribute": 50, "entity": pytest.approx(100 * 9 / 12), "global": 100, "relation": 50
    }  # fmt: skip
    assert found["judge"] == {"name": MPLUG, "answers_sha256": hashlib.sha256(answers.read_bytes()).hexdigest()}
    assert (found["generated_with"], found["parity"], found["dropped"]) == (None, False, {})


def test_in_parity_the_first_prompt_falls_out_and_categories_are_the_last_pictures(
    dpg: Dpg, others: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpg(*others, "--parity", "--write_questions", tmp_path / "q.jsonl")
    answers = answered(tmp_path / "q.jsonl", tmp_path / "a.jsonl", NOES)
    found = summary(dpg(*others, "--parity", "--answers", answers))
    assert found["name"] == "DPG questions about other prompts, judged by someone, 1 of 2 prompts"
    assert found["dropped"] == {"cat1": "cat1: question 2 depends on question 1, which is not there"}
    assert found["total"] == pytest.approx(100 * 2 / 3)
    # Before zeroing, the last picture says no to question 1 alone.
    assert {name: cell["score"] for name, cell in found["broad"].items()} == {"entity": 50, "relation": 100}
    assert found["parity"] is True
    told = capsys.readouterr().out
    assert "not counted: cat1" in told and "as the official code does" in told


def test_what_fails_ends_the_job_but_in_parity(dpg: Dpg, copy: Path, tmp_path: Path, judge: Path) -> None:
    # An own first row, so that both prompts are whole in parity, too.
    spare = ("cat1", "", "", "9", "0", "", "", "global - (x)", "Is it there?")
    whole = write_copy(tmp_path / "spare", [spare, *ROWS])
    theirs = draw_colors(tmp_path / "theirs")
    asked: list[str | Path] = ["--images", theirs, "--resolution", "16", "--judge", judge]
    both = summary(dpg(*asked, "--parity", benchmark=whole))
    assert (both["prompts"], both["dropped"]) == (2, {})
    good = (theirs / "dog2.png").read_bytes()
    for spoilt, reason in (
        (good[:60], "is no image that can be read"),
        (None, "lacks grids of 1 of 2 prompts, such as dog2.png"),
    ):
        if spoilt is None:
            (theirs / "dog2.png").unlink()
        else:
            (theirs / "dog2.png").write_bytes(spoilt)
        with pytest.raises(UserError, match=reason):
            dpg(*asked, benchmark=whole)
        found = summary(dpg(*asked, "--parity", benchmark=whole))
        assert (found["prompts"], list(found["dropped"])) == (1, ["dog2"])
        assert found["name"].endswith("1 of 2 prompts")
        assert found["total"] == 100 * results(tmp_path / "out")[0]["score"]
    (theirs / "dog2.png").write_bytes(good)
    shutil.copy(theirs / "dog2.png", theirs / "frog.png")
    with pytest.raises(UserError, match=r"holds frog.png, but there is no prompts/frog.txt: remove it"):
        dpg(*asked, benchmark=whole)
    found = summary(dpg(*asked, "--parity", benchmark=whole))
    assert (found["prompts"], found["dropped"]) == (2, {"frog": "there is no such prompt"})
    for path in theirs.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="theirs has no grid that can be scored: there is no image"):
        dpg(*asked, "--parity", benchmark=whole)


def test_answers_to_other_pictures_are_refused(dpg: Dpg, others: list[str | Path], tmp_path: Path) -> None:
    dpg(*others, "--write_questions", tmp_path / "q.jsonl")
    answers = answered(tmp_path / "q.jsonl", tmp_path / "a.jsonl", set())
    assert summary(dpg(*others, "--answers", answers))["total"] == 100
    Image.new("RGB", (32, 32), "green").save(tmp_path / "theirs" / "dog2.png")
    with pytest.raises(UserError, match="grids_sha256 differs, so these answers are to other questions or images"):
        dpg(*others, "--answers", answers)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_folder_of_anything_else_is_not_scored_into(
    dpg: Dpg, others: list[str | Path], tmp_path: Path, judge: Path
) -> None:
    out = dpg(*others, "--judge", judge)
    before = files(out)
    dpg(*others, "--judge", judge)
    assert files(out) == before
    more = draw_colors(tmp_path / "more")
    with pytest.raises(UserError, match=r"--out .*: holds scores of other images \(images\): give another folder"):
        dpg("--images", more, "--resolution", "16", "--judge", judge)
    theirs = draw_colors(tmp_path / "theirs", 8)
    with pytest.raises(UserError, match=r"--out .*: holds scores of other images \(resolution\)"):
        dpg("--images", theirs, "--resolution", "8", "--judge", judge)
    draw_colors(tmp_path / "theirs")
    assert files(out) == before
    (out / "scored.json").rename(tmp_path / "scored.json")  # now it is another job's
    with pytest.raises(UserError, match="--out .*: holds .*, which this job has not written: give another folder"):
        dpg(*others, "--judge", judge)
    assert (out / "summary.json").exists() and not (out / "scored.json").exists()


def test_a_judge_is_not_asked_twice_but_about_what_has_changed(
    dpg: Dpg, others: list[str | Path], tmp_path: Path, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()
    load = launch.dpg.judge.load

    def listen(*given: Any) -> Any:
        it = load(*given)
        return type(it)(it.name, lambda image, question: asked.append(question) or it.answer(image, question), "hash")

    monkeypatch.setattr(launch.dpg.judge, "load", listen)
    out = dpg(*others, "--judge", judge)
    assert len(asked) == 28
    first = files(out)
    asked.clear()
    dpg(*others, "--judge", judge)
    assert asked == [] and files(out) == first
    (out / "answers" / "dog2.json").unlink()  # of a job that was killed
    dpg(*others, "--judge", judge)
    assert len(asked) == 12 and files(out) == first
    asked.clear()
    Image.new("RGB", (32, 32), "green").save(tmp_path / "theirs" / "cat1.png")
    dpg(*others, "--judge", judge)
    assert len(asked) == 16
    asked.clear()
    dpg(*others, "--images_per_prompt", "1", "--judge", judge)
    assert len(asked) == 7 and summary(out)["images_per_prompt"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--judge x", "give one of --model, --images and --score_only"),
        ("--model m --images i --judge x", "give one of --model, --images and --score_only"),
        ("--model m", "give one of --judge, --answers, --write_questions and --sample_only"),
        ("--model m --judge x --sample_only", "give one of --judge, --answers"),
        ("--score_only --sample_only", "--sample_only generates with --model"),
        ("--images i --judge x", "--images needs --resolution"),
        ("--score_only --resolution 16 --judge x", "--resolution is known for the grids in --out: leave it out"),
        ("--model m --resolution -4 --judge x", "--resolution -4: must be at least 1 pixel"),
        ("--images i --resolution 0 --judge x", "--resolution 0: must be at least 1 pixel"),
        ("--model m --images_per_prompt 2 --judge x", "--images_per_prompt is for --images"),
        ("--images i --resolution 16 --images_per_prompt 5 --judge x", "--images_per_prompt 5: must be 1 to 4"),
        ("--score_only --judge x", "holds no grids: generate them with --model"),
        ("--images nowhere --resolution 16 --judge x", "nowhere: cannot be read"),
        ("--images", "expected one argument"),
    ],
)
def test_words_that_do_not_fit(dpg: Dpg, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dpg(*words.split())


def test_a_resolution_that_cannot_be_drawn(dpg: Dpg, model: Path) -> None:
    with pytest.raises(UserError, match=r"--resolution 18 must be a multiple of model.patch_size \(4\)"):
        dpg("--model", model, "--resolution", "18", "--sample_only")
    out = dpg("--model", model, "--resolution", "24", "--sample_only", *FEW)
    assert Image.open(out / "grids" / "cat1.png").size == (48, 48)
    assert not (out / "summary.json").exists()
    with pytest.raises(UserError, match=r"holds images made with other settings \(resolution\): give another"):
        dpg("--model", model, "--sample_only", *FEW)


def test_two_processes_make_the_same_files(dpg: Dpg, model: Path, judge: Path, copy: Path, tmp_path: Path) -> None:
    alone = dpg("--model", model, "--judge", judge, *FEW)
    words = ["--model", model, "--judge", judge, "--benchmark", copy, "--out", tmp_path / "both", *FEW]
    told = run("forked", "dpg.py", *map(str, words), ranks=2)
    assert "DPG questions about other prompts, judged by" in told
    for name in ("grids", "answers"):
        assert files(tmp_path / "both" / name) == files(alone / name)
    assert results(tmp_path / "both") == results(alone)
    one, two = summary(alone), summary(tmp_path / "both")
    assert [it["generated_with"].pop("speed")["devices"] for it in (one, two)] == ["1 × CPU", "2 × CPU"]
    assert one == two
