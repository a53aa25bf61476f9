"""launch/sample.py in one process: the pictures it was asked for, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import run_in_process
from PIL import Image
from random_model import write_random_model
from tiny import start

import launch.sample
from data.errors import UserError
from data.files import FileLock
from t2i.config.base import ConfigError
from t2i.config.train import SamplingConfig

Sample = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def sample(model: Path, tmp_path: Path) -> Sample:
    """Run the job with a few steps; the folder of its pictures."""

    def run(*words: str, prompts: str = "a red circle\n\na blue star\n") -> Path:
        (tmp_path / "prompts.txt").write_text(prompts)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        few = ["--sampling.steps", "2", "--sampling.batch_size", "2", "--out", str(out)]
        run_in_process(launch.sample, "--model", model, "--prompts", tmp_path / "prompts.txt", *few, *words)
        return out

    return run


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_height_comes_before_width(sample: Sample) -> None:
    wide = sample("--size", "8x24", "--images_per_prompt", "3")
    found = pictures(wide)
    assert list(found) == [f"{prompt:05d}_{n}.png" for prompt in range(2) for n in range(3)]
    assert len(set(found.values())) == 6
    assert {Image.open(wide / name).size for name in found} == {(24, 8)}
    assert json.loads((wide / "prompts.json").read_text())["size"] == [8, 24]
    assert pictures(sample("--size", "24x8")) != pictures(wide)


def test_by_default_pictures_have_the_training_resolution(sample: Sample) -> None:
    plain = sample()
    assert {Image.open(plain / name).size for name in pictures(plain)} == {(16, 16)}
    assert pictures(sample("--size", "16x16")) == pictures(plain)


def test_files_are_named_by_prompt_and_number(sample: Sample) -> None:
    both = pictures(sample("--images_per_prompt", "2"))
    for i, prompt in enumerate(("a red circle", "a blue star")):
        alone = pictures(sample("--images_per_prompt", "2", prompts=prompt))
        assert alone == {f"00000_{n}.png": both[f"{i:05d}_{n}.png"] for n in range(2)}
    first = pictures(sample("--images_per_prompt", "1"))
    assert first == {name: both[name] for name in ("00000_0.png", "00001_0.png")}


def test_a_negative_prompt_changes_every_picture(sample: Sample) -> None:
    plain, away = sample(), sample("--negative", "a green heart")
    assert all(picture != pictures(away)[name] for name, picture in pictures(plain).items())
    assert json.loads((away / "prompts.json").read_text())["negative"] == "a green heart"


@pytest.mark.parametrize("size", ["32", "8x", "8x30", "0x8", "-8x8", "8 x 8", "8x8x8", "big"])
def test_a_size_that_cannot_be_drawn(sample: Sample, size: str) -> None:
    with pytest.raises(ConfigError, match=f"--size {size}: must be height x width .* such as 16x24, both multiples"):
        sample(f"--size={size}")


def test_a_negative_prompt_without_guidance(sample: Sample) -> None:
    with pytest.raises(ConfigError, match="--negative does nothing at guidance_scale 1"):
        sample("--negative", "a green heart", "--sampling.guidance_scale", "1")


def test_settings_on_the_command_line_count_more_than_the_models(sample: Sample) -> None:
    given = {"solver": "adams", "order": 4, "cfg_interval": "[0.1,0.9]", "clamp": "false", "guidance_rescale": 0.5}
    options = [f"--sampling.{name}={value}" for name, value in given.items()]
    used = json.loads((sample(*options) / "prompts.json").read_text())["sampling"]
    changed = {"order": 4, "cfg_interval": [0.1, 0.9], "clamp": False, "guidance_rescale": 0.5}
    assert used == SamplingConfig().model_dump(mode="json") | {"steps": 2, "batch_size": 2} | changed


def test_settings_that_do_not_fit_each_other(sample: Sample) -> None:
    with pytest.raises(ConfigError, match="--sampling: order 3 does nothing under solver euler"):
        sample("--sampling.solver", "euler", "--sampling.order", "3")


def test_prompts_are_lines_of_utf_8(sample: Sample) -> None:
    prompts = "\ufeffa caf\xe9\r\na\u2028b\x0cc\x85d\n\nlast\n\n"
    found = sample(prompts=prompts)
    assert json.loads((found / "prompts.json").read_text())["prompts"] == ["a caf\xe9", "a\u2028b\x0cc\x85d", "last"]


def test_prompts_in_another_encoding(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("a caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"--prompts .*prompts.txt: should be UTF-8, but byte 5 is 0xe9"):
        run_in_process(launch.sample, "--model", model, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "o")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "4000x4000"], "--size 4000x4000: 2 at once take about [0-9,.]+ GiB .* GiB are free, enough for "),
        (["--size", "400000000x400000000"], "--size 400000000x400000000: 2 at once take"),
        (
            ["--sampling.batch_size", "10000000"],
            "--size 16x16: 10000000 at once take .*: give a smaller size",
        ),
    ],
)
def test_a_size_that_does_not_fit_is_refused_before_drawing(sample: Sample, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sample(*words)


@pytest.mark.parametrize("interval", ["[2,3]", "[-0.5,1]", "[0,.inf]", "[0.1,nan]"])
def test_guidance_applies_between_0_and_1(sample: Sample, interval: str) -> None:
    with pytest.raises(UserError, match=r"^--sampling"):
        sample("--sampling.cfg_interval", interval)


def test_equal_prompts_have_different_pictures_and_others_keep_theirs(sample: Sample) -> None:
    plain = pictures(sample("--images_per_prompt", "2"))
    found = pictures(
        sample("--images_per_prompt", "2", prompts="a red circle\na red circle\na blue star\na red circle")
    )
    assert len(set(found.values())) == len(found) == 8
    assert [found[f"00000_{n}.png"] for n in range(2)] == [plain[f"00000_{n}.png"] for n in range(2)]
    assert [found[f"00002_{n}.png"] for n in range(2)] == [plain[f"00001_{n}.png"] for n in range(2)]
    several = sample("--images_per_prompt", "4", prompts="a red circle")
    assert found["00001_1.png"] == pictures(several)["00000_3.png"]  # the numbers go on


def test_prompts_that_are_cut_are_counted_and_said_once(sample: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a red circle left of a blue star above a green heart"
    out = sample("--images_per_prompt", "2", "--negative", long, prompts=f"{long}\na\n{long} and more\nb\nc\nd\ne")
    said = capsys.readouterr().err
    assert said.count("29 % of prompts (2 of 7) are longer than text.length 8 tokens and are cut") == 1
    assert said.count("--negative is longer than text.length 8 tokens and is cut") == 1
    assert json.loads((out / "prompts.json").read_text())["cut_prompts"] == 2
    # Six tokens and the two marks: as many as there is room for.
    out = sample(prompts="a red circle and a star")
    assert "are cut" not in capsys.readouterr().err
    assert json.loads((out / "prompts.json").read_text())["cut_prompts"] == 0


def test_what_is_there_stays_and_what_is_missing_is_drawn(sample: Sample) -> None:
    out = sample("--images_per_prompt", "3")
    whole = pictures(out)
    (out / "00000_1.png").unlink()
    (out / "00001_2.png").unlink()
    (out / ".0123456789abcdef.partial").write_bytes(b"left by a process that was killed")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    sample("--images_per_prompt", "3", "--out", str(out))
    assert pictures(out) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {path.name for path in out.iterdir()} == {*whole, "prompts.json", "speed.json"}


@pytest.mark.parametrize("name", ["cat.png", "below/00000_0.png", "notes.txt", "00000_0.png"])
def test_a_folder_with_anything_else_is_refused(sample: Sample, tmp_path: Path, name: str) -> None:
    other = tmp_path / "other" / name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")
    with pytest.raises(UserError, match=f"other: holds {name}, which this job has not written: give another name"):
        sample("--out", str(tmp_path / "other"))
    assert [path for path in (tmp_path / "other").rglob("*") if path.is_file()] == [other]
    assert other.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("words", "prompts", "differs"),
    [
        (["--sampling.seed", "5"], "a red circle", "sampling.seed"),
        (["--size", "8x8"], "a red circle", "size"),
        (["--negative", "a dog", "--images_per_prompt", "2"], "a red circle", "images_per_prompt, negative"),
        (["--weights", "raw"], "a red circle", "weights, which"),
        ([], "a red circle\na dog", "prompts"),
    ],
)
def test_pictures_drawn_otherwise_are_refused(sample: Sample, words: list[str], prompts: str, differs: str) -> None:
    out = sample(prompts="a red circle")
    before = pictures(out)
    with pytest.raises(UserError, match=rf"holds images made with other settings \({differs}\): give another name"):
        sample("--out", str(out), *words, prompts=prompts)
    assert pictures(out) == before


def test_a_second_job_on_the_same_folder_is_refused(sample: Sample, tmp_path: Path) -> None:
    with FileLock(tmp_path / "held" / ".lock", "it"):
        with pytest.raises(UserError, match=rf"--out .*held is in use by process {os.getpid()} on .*: stop it"):
            sample("--out", str(tmp_path / "held"))
        assert [path.name for path in (tmp_path / "held").iterdir()] == [".lock"]
    sample("--out", str(tmp_path / "held"))


def test_killed_and_gone_on_with_it_is_the_same(model: Path, sample: Sample, tmp_path: Path) -> None:
    whole = pictures(sample("--images_per_prompt", "6", "--sampling.steps", "40"))
    out = tmp_path / "killed"
    words = [
        "--model",
        str(model),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(out),
        "--images_per_prompt",
        "6",
    ]
    words += ["--sampling.batch_size", "2", "--sampling.steps", "40"]
    process = start("python", "sample.py", *words)
    deadline = time.monotonic() + 200
    while len(list(out.glob("*.png"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    sample("--out", str(out), "--images_per_prompt", "6", "--sampling.steps", "40")
    assert pictures(out) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
