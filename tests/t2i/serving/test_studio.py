"""The studio: the pipeline's own pictures, with their settings, shown as they form; stopped when nobody listens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import write_random_model

from data.errors import UserError
from t2i.editing import EditSettings, edit_image
from t2i.pipeline import Picture, Pipeline
from t2i.serving.edits import EditForm, first_edits, fit_image, open_image
from t2i.serving.limits import Limits
from t2i.serving.session import MOST_STEPS, Form, first_request
from t2i.serving.studio import BEAT_S, Drawn, Frame, Studio, newest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(write_random_model(tmp_path_factory.mktemp("model") / "model"), "ema", CPU)


@pytest.fixture
def studio(pipeline: Pipeline, tmp_path: Path) -> Studio:
    return Studio(
        pipeline, {"model": "runs/x/model", "weights": "ema"}, Limits(4, 32 * 32, "the memory here"), tmp_path
    )


def form(studio: Studio, **changes: Any) -> Form:
    few = {"prompt": "a red circle", "steps": 3} | changes
    return replace(first_request(studio.pipeline.config).form, **few)


def drawn(studio: Studio, **changes: Any) -> tuple[Drawn, ...]:
    return list(studio.draw(studio.check(form(studio, **changes))))[-1].drawn


def pixels(it: Drawn) -> np.ndarray:
    return np.asarray(Image.open(it.path))


def test_pictures_are_the_pipelines(studio: Studio) -> None:
    request = studio.check(form(studio, pictures=3, width=24, seed=4))
    pictures = [Picture("a red circle", number) for number in range(3)]
    wanted = studio.pipeline.draw(pictures, request.sampling, (16, 24)).permute(0, 2, 3, 1).numpy()
    got = drawn(studio, pictures=3, width=24, seed=4)
    assert all((pixels(it) == image).all() for it, image in zip(got, wanted, strict=True))
    assert (pixels(got[0]) != pixels(got[1])).any()


def test_a_picture_does_not_depend_on_how_many_are_asked_for(studio: Studio) -> None:
    assert (pixels(drawn(studio)[0]) == pixels(drawn(studio, pictures=2)[0])).all()
    assert (pixels(drawn(studio)[0]) != pixels(drawn(studio, seed=1)[0])).any()
    assert (pixels(drawn(studio)[0]) != pixels(drawn(studio, prompt="a blue star")[0])).any()


def test_a_file_says_what_it_was_drawn_with(studio: Studio) -> None:
    second = drawn(studio, pictures=2, negative='a "heart" ♥', seed=9)[1]
    told = json.loads(Image.open(second.path).text["settings"])
    assert told == second.settings
    assert told["sampling"] | {"steps": 3, "seed": 9, "batch_size": 1} == told["sampling"]
    del told["sampling"]
    asked = {"prompt": "a red circle", "negative": 'a "heart" ♥', "size": [16, 16], "number": 1}
    assert told == {"model": "runs/x/model", "weights": "ema"} | asked
    assert second.path.name == "a-red-circle_seed9_1.png"


def test_frames_show_the_picture_forming(studio: Studio) -> None:
    frames = list(studio.draw(studio.check(form(studio, pictures=2, steps=5))))
    previews = [frame.preview for frame in frames if frame.preview is not None]
    assert previews
    assert previews[0].shape == (16, 16, 3)
    shares = [frame.share for frame in frames]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert [len(frame.drawn) for frame in frames][-1] == 2


def calls_of(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the network is called, one entry a call."""
    called: list[int] = []
    real = studio.pipeline.denoiser.forward
    monkeypatch.setattr(studio.pipeline.denoiser, "forward", lambda *given: called.append(1) or real(*given))
    return called


def test_nobody_listening_stops_a_request(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of(studio, monkeypatch)
    frames = studio.draw(studio.check(form(studio, steps=MOST_STEPS, pictures=16)))
    while next(frames).preview is None:
        pass
    frames.close()
    assert len(drawn(studio)) == 1  # it waits for the thread
    assert len(called) < MOST_STEPS


def test_a_request_that_was_left_in_the_queue_is_not_begun(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of(studio, monkeypatch)
    first, second = (studio.draw(studio.check(form(studio, steps=MOST_STEPS))) for _ in range(2))
    next(first), next(second)
    second.close()
    first.close()
    assert len(drawn(studio)) == 1
    assert len(called) < 2 * MOST_STEPS


def test_closing_stops_what_is_being_made(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of(studio, monkeypatch)
    frames = studio.draw(studio.check(form(studio, steps=MOST_STEPS, pictures=16)))
    while next(frames).preview is None:
        pass
    studio.close()
    known = len(called)
    assert known < MOST_STEPS
    frames.close()
    assert len(called) == known


def test_a_network_that_is_slow_does_not_keep_its_listener_waiting(studio: Studio) -> None:
    frames = studio._follow(studio.check(form(studio)), lambda watch: slow())
    first, second = next(frames), next(frames)
    assert second is first
    frames.close()


def slow() -> Iterator[torch.Tensor]:
    time.sleep(3 * BEAT_S)
    yield from ()


def test_what_goes_wrong_reaches_whoever_listens(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(studio.pipeline.denoiser, "forward", fail)
        with pytest.raises(UserError, match="memory was not enough for this size: ask for a smaller one"):
            drawn(studio)
    assert len(drawn(studio)) == 1


def edit_form(**changes: Any) -> EditForm:
    plain = EditForm(Image.new("RGB", (16, 16)), "a red circle", "a blue star", 4, 3, 1.5, 2.0, 5)
    return replace(plain, **changes)


def test_an_edit_is_edit_images(studio: Studio) -> None:
    given = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8))
    image = Image.fromarray(given.permute(1, 2, 0).numpy())
    request = studio.check_edit(edit_form(image=image))
    (edited,) = list(studio.edit(request))[-1].drawn
    settings = EditSettings(
        steps=4, n_max=3, source_guidance=1.5, target_guidance=2.0, seed=5,
        timeshift=studio.pipeline.config.sampling.timeshift,
    )  # fmt: skip
    wanted = edit_image(studio.pipeline, given, "a red circle", "a blue star", settings)
    assert (pixels(edited) == wanted.permute(1, 2, 0).numpy()).all()
    again = studio.check_edit(request.form)
    assert (again.image == request.image).all()
    assert again.settings == request.settings == {key: edited.settings[key] for key in request.settings}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "image: there is none"),
        ({"target": " "}, "what it is to show: is empty"),
        ({"n_max": 5}, "n_max 5 must be at most steps"),
        ({"steps": 2.5}, "steps 2.5: must be a whole number"),
        ({"target_guidance": None}, "guidance of what it is to show is empty"),
        ({"image": Image.new("RGB", (3, 40))}, "each side must be at least 4"),
    ],
)
def test_edits_that_are_refused(studio: Studio, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        studio.check_edit(edit_form(**changes))


@pytest.mark.parametrize(
    ("given", "fitted"),
    [
        ((16, 16), (16, 16)),
        ((14, 10), (8, 12)),  # smaller than trained: the middle's whole patches
        ((1600, 1600), (16, 16)),
        ((300, 200), (12, 20)),
        ((4000, 40), (4, 160)),
    ],
)
def test_images_are_brought_to_the_trained_area(
    studio: Studio, given: tuple[int, int], fitted: tuple[int, int]
) -> None:
    image = Image.new("RGBA", given, "red")
    found = fit_image(image, studio.pipeline.config, studio.limits)
    assert tuple(found.shape) == (3, *fitted)
    assert found[:, 0, 0].tolist() == [255, 0, 0]


def test_rounding_to_patches_does_not_exceed_the_limit(studio: Studio) -> None:
    config = studio.pipeline.config
    for seed in range(300):
        width, height = (int(it) for it in np.random.default_rng(seed).integers(40, 120, 2))
        limits = replace(studio.limits, max_pixels=256)
        found = fit_image(Image.new("RGB", (width, height)), config, limits)
        assert found.shape[1] * found.shape[2] <= 256


def test_a_file_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.new("1", (13_000, 13_000)).save(path)
    assert path.stat().st_size < 50_000
    with mock.patch("PIL.ImageFile.ImageFile.load") as decoding, pytest.raises(UserError, match="image: "):
        open_image(str(path))
    assert not decoding.called
    (tmp_path / "words.png").write_text("no image")
    with pytest.raises(UserError, match="image: cannot be used"):
        open_image(str(tmp_path / "words.png"))
    Image.new("RGBA", (9, 7), "red").save(tmp_path / "red.png")
    assert open_image(str(tmp_path / "red.png")).size == (9, 7)


def test_who_listens_slowly_is_told_the_newest() -> None:
    frames: SimpleQueue[Frame | None] = SimpleQueue()
    with pytest.raises(Empty):
        newest(frames, 0.01)
    for share in (0.1, 0.2, 0.3):
        frames.put(Frame(share, None, ()))
    assert newest(frames, 1).share == 0.3
    frames.put(Frame(1.0, None, ()))
    frames.put(None)
    assert newest(frames, 1).share == 1.0 and newest(frames, 1) is None


def test_pictures_of_old_requests_go(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2i.serving.studio.KEPT", 2)
    paths = [drawn(studio)[0].path for _ in range(3)]
    assert [path.exists() for path in paths] == [False, True, True]


def test_the_page_opens_with_flowedits_defaults(studio: Studio) -> None:
    config = studio.pipeline.config
    assert first_edits(config) == EditSettings(timeshift=config.sampling.timeshift)
