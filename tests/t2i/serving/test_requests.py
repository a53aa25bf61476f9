"""What may be asked on the page, and in which words it is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from data.errors import UserError
from t2i.config.loading import validate_config
from t2i.config.run import RunConfig
from t2i.models.text import ClassLabels
from t2i.serving.requests import Form, check_form, first_request, sizes_like, stem_of
from t2i.size_limits import Limits

LIMITS = Limits(patch=4, max_pixels=32 * 32, reason="the memory here")
LABELS = ClassLabels(3, torch.device("cpu"))


def config(condition: str = "text", **sampling: Any) -> RunConfig:
    model = {"condition": condition, "patch_size": 4} | ({"classes": 3} if condition == "class" else {})
    return validate_config({"model": model, "data": {"resolution": [16, 24]}, "sampling": sampling}, "test")


def form(of: RunConfig, **changes: Any) -> Form:
    return replace(first_request(of).form, **changes)


@pytest.mark.parametrize("own", [
    {}, {"solver": "heun", "steps": 7}, {"order": 3, "guidance_scale": 1.0}, {"cfg_interval": (0.1, 0.9), "seed": 5},
])  # fmt: skip
def test_the_page_opens_with_the_models_own_settings(own: dict[str, Any]) -> None:
    run = config(**own)
    request = check_form(form(run, prompt=" a red circle "), run, LABELS, LIMITS)
    assert request.sampling == run.sampling.model_copy(update={"batch_size": 1})
    assert (request.prompt, request.size, request.pictures) == ("a red circle", (16, 24), 1)


def test_a_request_fills_in_the_form_that_asks_for_it() -> None:
    run = config(shift=2.0, clamp=False)
    asked = form(
        run, prompt="a star", negative="a heart", width=8.0, height=32, steps=3, guidance_scale=2.5, guided_from=0.2,
        guided_to=0.7, solver="adams", order=4, seed=2**53 - 1, pictures=16,
    )  # fmt: skip
    request = check_form(asked, run, LABELS, LIMITS)
    assert check_form(request.form, run, LABELS, LIMITS) == request
    assert (request.sampling.shift, request.sampling.clamp) == (2.0, False)
    assert request.settings["size"] == [32, 8]


def test_another_solver_leaves_the_order_of_adams_alone() -> None:
    run = config(order=3)
    assert check_form(form(run, solver="euler"), run, LABELS, LIMITS).sampling.order == 2
    assert check_form(form(run, solver="adams"), run, LABELS, LIMITS).sampling.order == 3


@pytest.mark.parametrize(("solver", "calls"), [("euler", 20), ("heun", 38), ("adams", 20)])
def test_calls_of_the_network(solver: str, calls: int) -> None:
    run = config(steps=10)
    assert check_form(form(run, solver=solver, pictures=2), run, LABELS, LIMITS).calls == calls


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": None}, "width is empty: must be a whole number"),
        ({"width": 10}, "width 10: must be a multiple of the model's patch, 4 pixels, such as 8"),
        ({"height": 15.5}, "height 15.5: must be a whole number"),
        ({"width": 64, "height": 64}, "at most 1,024 pixels in all, such as 32 x 32"),
        ({"steps": 0}, "steps 0: must be a whole number from 1 to 500"),
        ({"steps": 501}, "steps 501: must be a whole number from 1 to 500"),
        ({"pictures": 17}, "pictures 17: must be a whole number from 1 to 16"),
        ({"seed": -1}, "seed -1: must be a whole number from 0"),
        ({"seed": float("inf")}, "seed inf: must be a whole number from 0"),
        ({"order": 5}, "order 5: must be a whole number from 1 to 4"),
        ({"guidance_scale": None}, "guidance is empty: must be a number"),
        ({"guidance_scale": -1}, "settings: guidance_scale: .*greater than or equal to 0"),
        ({"guided_from": 0.8, "guided_to": 0.2}, r"cfg_interval \[0.8, 0.2\] must be"),
        ({"guided_to": float("nan")}, "guidance to is empty: must be a number"),
        ({"solver": "magic"}, "settings: solver: input should be"),
        ({"prompt": "a" * 2001}, "prompt: has 2001 characters: must have at most 2000"),
        ({"negative": "b" * 2001}, "negative prompt: has 2001 characters"),
        ({"negative": "a heart", "guidance_scale": 1}, "negative prompt: does nothing at guidance 1"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    run = config()
    with pytest.raises(UserError, match=words):
        check_form(form(run, **changes), run, LABELS, LIMITS)


def test_classes_are_numbers_below_their_count() -> None:
    run = config("class")
    assert check_form(form(run, prompt=" 2 ", negative="0"), run, LABELS, LIMITS).prompt == "2"
    for wrong in ({"prompt": "3"}, {"prompt": "a cat"}, {"prompt": "1", "negative": "x"}):
        with pytest.raises(UserError, match="is no class: .* a number from 0 to 2"):
            check_form(form(run, **wrong), run, LABELS, LIMITS)


def test_sizes_that_are_offered_are_allowed_and_alike_in_area() -> None:
    limits = Limits(16, 530 * 530, "the memory here")
    offered = sizes_like((512, 512), limits)
    assert offered[0] == (512, 512)
    assert len(offered) == len(set(offered)) == 7
    for height, width in offered:
        limits.check(height, width)
        assert height * width == pytest.approx(512 * 512, rel=0.07)
    less = sizes_like((512, 512), Limits(16, 512 * 512, "the memory here"))
    assert less == [size for size in offered if size[0] * size[1] <= 512 * 512] != offered
    assert sizes_like((16, 24), LIMITS)[0] == (16, 24)


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A red circle, left of a blue square!", "a-red-circle-left-of-a-blue-square_seed7"),
        ("../../etc/passwd", "etc-passwd_seed7"),
        ("кошка", "picture_seed7"),
        ("x" * 100, "x" * 48 + "_seed7"),
    ],
)
def test_file_names_are_plain(prompt: str, stem: str) -> None:
    assert stem_of(prompt, 7) == stem
