"""launch/serve.py before it serves: what it refuses, in one sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from random_model import write_random_model

from launch.serve import _is_loopback, main


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
        ([], "is not a model folder: it has no ema.safetensors"),
    ],
)
def test_options_that_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], sentence: str
) -> None:
    pytest.importorskip("gradio", reason="comes with the extra 'serve'")
    assert sentence in refused(capsys, "--model", str(tmp_path), *words)


def test_which_addresses_only_this_machine_reaches() -> None:
    assert all(map(_is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(_is_loopback, ("0.0.0.0", "::", "192.0.2.7", "10.0.0.1", "machine", "")))


@pytest.mark.parametrize(("host", "is_said"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_an_address_that_others_reach_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, is_said: bool
) -> None:
    pytest.importorskip("gradio", reason="comes with the extra 'serve'")
    import t2i.serving.page

    served: list[object] = []
    monkeypatch.setattr(t2i.serving.page, "serve", lambda *given: served.extend(given))
    assert main(["--model", str(write_random_model(tmp_path / "model")), "--host", host]) == 0
    assert host in served
    said = capsys.readouterr().err
    assert (f"WARNING: --host {host}: whoever reaches port 7860" in said) is is_said
