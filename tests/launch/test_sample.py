"""launch/sample.py in one process: the pictures it was asked for, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import run_in_process
from PIL import Image
from random_model import write_random_model

import launch.sample
from data.errors import UserError
from t2i.config_base import ConfigError
from t2i.config_sampling import SamplingConfig

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
    wide = sample("--size", "8x24", "--pictures", "3")
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
    both = pictures(sample("--pictures", "2"))
    for i, prompt in enumerate(("a red circle", "a blue star")):
        alone = pictures(sample("--pictures", "2", prompts=prompt))
        assert alone == {f"00000_{n}.png": both[f"{i:05d}_{n}.png"] for n in range(2)}
    first = pictures(sample("--pictures", "1"))
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
    with pytest.raises(ConfigError, match="--sampling: config: order 3 does nothing under solver euler"):
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
