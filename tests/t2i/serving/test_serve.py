"""launch/serve.py before it serves: what it refuses, in one sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from launch.serve import main


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_without_gradio(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs Gradio: pip install '.[serve]'" in refused(capsys, "--model", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--queue", "0"], "--queue 0: at least one request"),
        (["--max_pixels", "0"], "--max_pixels 0: must be at least 1"),
        (["--port", "70000"], "--port 70000: must be from 1 to 65535"),
        ([], "is not a model folder: it has no model.safetensors"),
    ],
)
def test_options_that_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], sentence: str
) -> None:
    pytest.importorskip("gradio", reason="comes with the extra 'serve'")
    assert sentence in refused(capsys, "--model", str(tmp_path), *words)
