"""The worker: the pipeline's own images, with their settings, shown as they form; stopped when nobody listens."""

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
from t2i.serving.worker import HEARTBEAT_S, GeneratedImage, Worker
from t2i.size_limits import Limits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(write_random_model(tmp_path_factory.mktemp("model") / "model"), "ema", CPU)


@pytest.fixture
def worker(pipeline: Pipeline, tmp_path: Path) -> Worker:
    return Worker(
        pipeline, {"model": "runs/x/model", "weights": "ema"}, Limits(4, 32 * 32, "the memory here"), tmp_path
    )


def form(worker: Worker, **changes: Any) -> Form:
    few = {"prompt": "a red circle", "steps": 3} | changes
    return replace(first_request(worker.pipeline.config).form, **few)


def generate(worker: Worker, **changes: Any) -> tuple[GeneratedImage, ...]:
    return list(worker.generate(worker.check(form(worker, **changes))))[-1].generated


def pixels(image: GeneratedImage) -> np.ndarray:
    return np.asarray(Image.open(image.path))


def test_pictures_are_the_pipelines(worker: Worker) -> None:
    request = worker.check(form(worker, pictures=3, width=24, seed=4))
    pictures = [Picture("a red circle", number) for number in range(3)]
    wanted = worker.pipeline.draw(pictures, request.sampling, (16, 24)).permute(0, 2, 3, 1).numpy()
    got = generate(worker, pictures=3, width=24, seed=4)
    assert all((pixels(made) == image).all() for made, image in zip(got, wanted, strict=True))
    assert (pixels(got[0]) != pixels(got[1])).any()


def test_a_picture_does_not_depend_on_how_many_are_asked_for(worker: Worker) -> None:
    assert (pixels(generate(worker)[0]) == pixels(generate(worker, pictures=2)[0])).all()
    assert (pixels(generate(worker)[0]) != pixels(generate(worker, seed=1)[0])).any()
    assert (pixels(generate(worker)[0]) != pixels(generate(worker, prompt="a blue star")[0])).any()


def test_a_file_says_what_it_was_generated_with(worker: Worker) -> None:
    second = generate(worker, pictures=2, negative='a "heart" ♥', seed=9)[1]
    written = json.loads(Image.open(second.path).text["settings"])
    assert written == second.settings
    assert written["sampling"] | {"steps": 3, "seed": 9, "batch_size": 1} == written["sampling"]
    del written["sampling"]
    asked = {"prompt": "a red circle", "negative": 'a "heart" ♥', "size": [16, 16], "number": 1}
    assert written == {"model": "runs/x/model", "weights": "ema"} | asked
    assert second.path.name == "a-red-circle_seed9_1.png"


def test_frames_show_the_picture_forming(worker: Worker) -> None:
    frames = list(worker.generate(worker.check(form(worker, pictures=2, steps=5))))
    previews = [frame.preview for frame in frames if frame.preview is not None]
    assert previews
    assert previews[0].shape == (16, 16, 3)
    shares = [frame.progress for frame in frames]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert [len(frame.generated) for frame in frames][-1] == 2


def calls_of(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the network is called, one entry a call."""
    called: list[int] = []
    real = worker.pipeline.denoiser.forward
    monkeypatch.setattr(worker.pipeline.denoiser, "forward", lambda *given: called.append(1) or real(*given))
    return called


def test_nobody_listening_stops_a_request(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of(worker, monkeypatch)
    frames = worker.generate(worker.check(form(worker, steps=MOST_STEPS, pictures=16)))
    while next(frames).preview is None:
        pass
    frames.close()
    assert len(generate(worker)) == 1  # it waits for the thread
    assert len(called) < MOST_STEPS


def test_a_request_that_was_left_in_the_queue_is_not_started(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of(worker, monkeypatch)
    first, second = (worker.generate(worker.check(form(worker, steps=MOST_STEPS))) for _ in range(2))
    next(first), next(second)
    second.close()
    first.close()
    assert len(generate(worker)) == 1
    assert len(called) < 2 * MOST_STEPS


def test_closing_stops_what_is_being_made(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of(worker, monkeypatch)
    frames = worker.generate(worker.check(form(worker, steps=MOST_STEPS, pictures=16)))
    while next(frames).preview is None:
        pass
    worker.close()
    known = len(called)
    assert known < MOST_STEPS
    frames.close()
    assert len(called) == known


def test_a_network_that_is_slow_does_not_keep_its_listener_waiting(worker: Worker) -> None:
    frames = worker._follow(worker.check(form(worker)), lambda watch: slow())
    first, second = next(frames), next(frames)
    assert second is first
    frames.close()


def slow() -> Iterator[torch.Tensor]:
    time.sleep(3 * HEARTBEAT_S)
    yield from ()


def test_what_goes_wrong_reaches_whoever_listens(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(worker.pipeline.denoiser, "forward", fail)
        with pytest.raises(UserError, match="memory was not enough for this size: ask for a smaller one"):
            generate(worker)
    assert len(generate(worker)) == 1


def test_the_latest_pictures_are_kept(worker: Worker) -> None:
    worker.images.most_files = 3
    paths = [made.path for made in (*generate(worker, pictures=2), *generate(worker, pictures=2, seed=1))]
    assert [path.exists() for path in paths] == [False, True, True, True]
    assert len(list(worker.folder.iterdir())) == 3


def test_a_slow_listener_sees_the_latest_frame(worker: Worker) -> None:
    frames = worker.generate(worker.check(form(worker, steps=20)))
    next(frames)
    generate(worker)  # waits for the thread
    (last,) = frames
    assert (last.progress, len(last.generated)) == (1.0, 1)
