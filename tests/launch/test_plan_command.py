"""The planner's command line: JSON or tables, options of its own beside the config's, one sentence for a mistake."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest

from launch.plan import plan
from launch.process import main

XXL = ("--config", "configs/pixelgen_xxl.yaml")


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., str]:
    """Run the command in this process; what it prints."""

    def attempt(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *options])
        main(plan)
        return capsys.readouterr().out

    return attempt


@pytest.fixture
def refuse(monkeypatch, capsys) -> Callable[..., str]:
    """What the command says when it refuses."""

    def attempt(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *options])
        with pytest.raises(SystemExit) as stop:
            main(plan)
        assert stop.value.code == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert said.startswith("error: ")
        return said

    return attempt


def test_json_with_fields_of_the_config(run) -> None:
    found = json.loads(
        run(*XXL, "--gpus", "16", "--gpu", "H100", "--mfu", "0.4", "--json", "--train.micro_batch_size", "4")
    )
    assert found["gpus"] == 16 and found["gpu"]["name"] == "H100" and found["utilisation"] == 0.4
    assert [stage["micro_batch_size"] for stage in found["stages"]] == [4, 4, 4]
    assert found["stages"][0]["parameters"]["denoiser"] == 1_121_739_520


def test_tables(run) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")
    text = run("--config", "configs/demo.yaml", "--gpus", "2", "--gpu", "l40s", "--reference")
    assert text.startswith("demo on 2 x L40S") and "as the public code runs them" in text
    header = next(line for line in text.splitlines() if line.startswith("res32: static"))
    assert header.split()[-1] == "ddp"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpu", "h900"], "--gpu h900 is not in the table: give one of b200, h200"),
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--gpus", "7"], "7"),
        (["--gpus", "many"], "--gpus: 'many' is not a number of type int"),
        (["--gpus", "010"], "--gpus: 010 is octal to some"),
        (["--mfu", "nan"], "--mfu nan: must be a finite number"),
        (["--sample_kb", "inf"], "--sample_kb inf: must be a finite number"),
        (["--root", "$NOT_SET"], "--root: '$NOT_SET': the variable NOT_SET is not set"),
        (["--mfu", "22"], "--mfu 22.0 must be over 0 and at most 1"),
        (["--sample_kb", "0"], "--sample_kb 0 must be over 0"),
        (["--gpuz", "8"], "unknown option --gpuz"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(refuse, options: list[str], sentence: str) -> None:
    assert sentence in refuse(*options)
