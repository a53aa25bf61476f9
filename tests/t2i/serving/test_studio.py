"""The studio: the pipeline's own pictures, with their settings, shown as they form; stopped when nobody listens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import write_random_model

from data.errors import UserError
from t2i.pipeline import Picture, Pipeline
from t2i.serving.requests import MOST_STEPS, Form, first_request
from t2i.serving.worker import BEAT_S, Drawn, Worker
from t2i.size_limits import Limits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(write_random_model(tmp_path_factory.mktemp("model") / "model"), "ema", CPU)


@pytest.fixture
def studio(pipeline: Pipeline, tmp_path: Path) -> Worker:
    return Worker(
        pipeline, {"model": "runs/x/model", "weights": "ema"}, Limits(4, 32 * 32, "the memory here"), tmp_path
    )


def form(studio: Worker, **changes: Any) -> Form:
    few = {"prompt": "a red circle", "steps": 3} | changes
    return replace(first_request(studio.pipeline.config).form, **few)


def drawn(studio: Worker, **changes: Any) -> tuple[Drawn, ...]:
    return list(studio.draw(studio.check(form(studio, **changes))))[-1].drawn


def pixels(it: Drawn) -> np.ndarray:
    return np.asarray(Image.open(it.path))


def test_pictures_are_the_pipelines(studio: Worker) -> None:
    request = studio.check(form(studio, pictures=3, width=24, seed=4))
    pictures = [Picture("a red circle", number) for number in range(3)]
    wanted = studio.pipeline.draw(pictures, request.sampling, (16, 24)).permute(0, 2, 3, 1).numpy()
    got = drawn(studio, pictures=3, width=24, seed=4)
    assert all((pixels(it) == image).all() for it, image in zip(got, wanted, strict=True))
    assert (pixels(got[0]) != pixels(got[1])).any()


def test_a_picture_does_not_depend_on_how_many_are_asked_for(studio: Worker) -> None:
    assert (pixels(drawn(studio)[0]) == pixels(drawn(studio, pictures=2)[0])).all()
    assert (pixels(drawn(studio)[0]) != pixels(drawn(studio, seed=1)[0])).any()
    assert (pixels(drawn(studio)[0]) != pixels(drawn(studio, prompt="a blue star")[0])).any()


def test_a_file_says_what_it_was_drawn_with(studio: Worker) -> None:
    second = drawn(studio, pictures=2, negative='a "heart" ♥', seed=9)[1]
    told = json.loads(Image.open(second.path).text["settings"])
    assert told == second.settings
    assert told["sampling"] | {"steps": 3, "seed": 9, "batch_size": 1} == told["sampling"]
    del told["sampling"]
    asked = {"prompt": "a red circle", "negative": 'a "heart" ♥', "size": [16, 16], "number": 1}
    assert told == {"model": "runs/x/model", "weights": "ema"} | asked
    assert second.path.name == "a-red-circle_seed9_1.png"


def test_frames_show_the_picture_forming(studio: Worker) -> None:
    frames = list(studio.draw(studio.check(form(studio, pictures=2, steps=5))))
    previews = [frame.preview for frame in frames if frame.preview is not None]
    assert previews
    assert previews[0].shape == (16, 16, 3)
    shares = [frame.share for frame in frames]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert [len(frame.drawn) for frame in frames][-1] == 2


def calls_of(studio: Worker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the network is called, one entry a call."""
    called: list[int] = []
    real = studio.pipeline.denoiser.forward
    monkeypatch.setattr(studio.pipeline.denoiser, "forward", lambda *given: called.append(1) or real(*given))
    return called


def test_nobody_listening_stops_a_request(studio: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of(studio, monkeypatch)
    frames = studio.draw(studio.check(form(studio, steps=MOST_STEPS, pictures=16)))
    while next(frames).preview is None:
        pass
    frames.close()
    assert len(drawn(studio)) == 1  # it waits for the thread
    assert len(called) < MOST_STEPS


def test_a_request_that_was_left_in_the_queue_is_not_begun(studio: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of(studio, monkeypatch)
    first, second = (studio.draw(studio.check(form(studio, steps=MOST_STEPS))) for _ in range(2))
    next(first), next(second)
    second.close()
    first.close()
    assert len(drawn(studio)) == 1
    assert len(called) < 2 * MOST_STEPS


def test_closing_stops_what_is_being_made(studio: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of(studio, monkeypatch)
    frames = studio.draw(studio.check(form(studio, steps=MOST_STEPS, pictures=16)))
    while next(frames).preview is None:
        pass
    studio.close()
    known = len(called)
    assert known < MOST_STEPS
    frames.close()
    assert len(called) == known


def test_a_network_that_is_slow_does_not_keep_its_listener_waiting(studio: Worker) -> None:
    frames = studio._follow(studio.check(form(studio)), lambda watch: slow())
    first, second = next(frames), next(frames)
    assert second is first
    frames.close()


def slow() -> Iterator[torch.Tensor]:
    time.sleep(3 * BEAT_S)
    yield from ()


def test_what_goes_wrong_reaches_whoever_listens(studio: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(studio.pipeline.denoiser, "forward", fail)
        with pytest.raises(UserError, match="memory was not enough for this size: ask for a smaller one"):
            drawn(studio)
    assert len(drawn(studio)) == 1


def test_the_latest_pictures_are_kept(studio: Worker) -> None:
    studio.pictures.most_files = 3
    paths = [it.path for it in (*drawn(studio, pictures=2), *drawn(studio, pictures=2, seed=1))]
    assert [path.exists() for path in paths] == [False, True, True, True]
    assert len(list(studio.folder.iterdir())) == 3


def test_a_slow_listener_sees_the_latest_frame(studio: Worker) -> None:
    frames = studio.draw(studio.check(form(studio, steps=20)))
    next(frames)
    drawn(studio)  # waits for the thread
    (last,) = frames
    assert (last.share, len(last.drawn)) == (1.0, 1)
