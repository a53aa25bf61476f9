"""Scores during training: which prompts, within which time, and what follows from them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.errors import UserError
from t2i.config.base import ConfigError
from t2i.config.loading import validate_config
from t2i.config.run import RunConfig
from t2i.distributed import Preempted, World
from t2i.pipeline import Picture
from t2i.train import scoring
from t2i.train.run_dir import StageDir
from t2i.train.scoring import Score, Scores, Scoring, build_scorers, promotes, read_best, spread

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
TASKS = [task for task, count in (("single", 4), ("two", 9), ("counting", 7)) for _ in range(count)]


def stay() -> None:
    return None


class Words:
    """A scorer of the prompts "0", "1", ...: what it says of a picture is its prompt, its task and its pixel."""

    tasks = TASKS
    prompts = tuple(str(index) for index in range(len(TASKS)))

    def judge(self, index: int, image: Tensor) -> dict[str, Any]:
        return {"index": index, "task": TASKS[index], "pixel": int(image[0, 0, 0])}

    def summary(self, results: Sequence[dict[str, Any]]) -> dict[str, float]:
        self.summed = [(it["index"], it["pixel"]) for it in results]
        return {"overall": sum(it["pixel"] for it in results) / len(results)}


@dataclass
class Drawing:
    """A pipeline whose pictures are ten times their prompt, plus their number; each batch takes so many seconds."""

    config: RunConfig
    seconds: Sequence[float] = ()
    now: float = 100.0
    batches: list[int] = field(default_factory=list)

    def draw_batches(self, pictures: Sequence[Picture], sampling: Any) -> Iterator[Tensor]:
        for start in range(0, len(pictures), sampling.batch_size):
            batch = pictures[start : start + sampling.batch_size]
            self.now += dict(enumerate(self.seconds)).get(len(self.batches), 0.0)
            self.batches.append(len(batch))
            yield torch.stack([torch.full((3, 1, 1), 10 * int(it.prompt) + it.number) for it in batch])


def config_of(batch_size: int = 4, **settings: Any) -> RunConfig:
    tree = {"every": 100, "prompts": 10, "images": 2, "minutes": 1} | settings
    return RunConfig.model_validate({"scoring": tree, "sampling": {"batch_size": batch_size}})


def scoring_of(folder: Path, drawing: Drawing, past: Scores = (), world: World = ALONE) -> Scoring:
    place = StageDir("only", folder, None)
    scoring = Scoring(Words(), drawing, world, place, lambda what: None)
    scoring.load_state_dict(past)
    return scoring


# Which prompts


@pytest.mark.parametrize("count", [1, 3, 7, 12, 15, 20])
def test_every_beginning_is_spread_over_the_tasks(count: int) -> None:
    chosen = spread(TASKS, count)
    assert len(set(chosen)) == len(chosen) == count
    whole = Counter(TASKS[index] for index in chosen)
    for length in range(1, count + 1):
        found = Counter(TASKS[index] for index in chosen[:length])
        open_ones = [found[task] for task in set(TASKS) if found[task] < whole[task]]
        assert not open_ones or max(found.values()) - min(open_ones) <= 1
    assert sorted(whole.values()) == {1: [1], 3: [1, 1, 1], 7: [2, 2, 3], 12: [4, 4, 4], 15: [4, 5, 6]}.get(
        count, [4, 7, 9]
    )


def test_a_tasks_prompts_are_spread_over_its_own() -> None:
    chosen = spread(["a"] * 60 + ["b"] * 30, 12)
    assert chosen[::2] == [0, 10, 20, 30, 40, 50]
    assert chosen[1::2] == [60, 65, 70, 75, 80, 85]


# When a stage goes on


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], False),
        ([(0, 0.5)], False),
        ([(0, 0.5), (100, 0.5)], False),  # no 200 steps yet
        ([(0, 0.5), (100, 0.5), (200, 0.5)], True),
        ([(0, 0.5), (100, 0.5), (200, 0.52)], False),
        ([(0, 0.5), (100, 0.5), (200, 0.515)], True),
        ([(0, 0.5), (100, 0.6), (200, 0.4)], False),  # the best has risen, though the last is bad
        ([(0, 0.5), (100, 0.6), (200, 0.4), (300, 0.61)], True),
        ([(0, 0.6), (100, 0.5), (300, 0.61)], True),  # nor has it from the best before
        ([(0, 0.5), (100, 0.5), (200, None)], False),  # cut short, it says nothing
        ([(0, 0.5), (100, None), (200, 0.5)], True),
        ([(0, None), (100, 0.5), (200, 0.5)], False),  # nothing to compare with
        ([(0, None), (100, 0.5), (200, None), (300, 0.5)], True),
    ],
)
def test_a_stage_ends_when_its_best_score_has_not_risen(scores: Scores, expected: bool) -> None:
    assert promotes(scores, min_delta=0.02, patience=200) == expected


def test_it_ends_at_the_step_of_the_score_alone(tmp_path: Path) -> None:
    past = [(0, 0.5), (100, 0.5)]
    ruled = Drawing(config_of(min_delta=0.02, patience=100))
    assert "step 100: over 100 steps" in (scoring_of(tmp_path, ruled, past).reason_to_end(100) or "")
    assert scoring_of(tmp_path, ruled, past).reason_to_end(150) is None  # a rule that came later waits for a score
    assert scoring_of(tmp_path, Drawing(config_of()), past).reason_to_end(100) is None


# How long


def measure(
    monkeypatch: pytest.MonkeyPatch, folder: Path, seconds: Sequence[float], **settings: Any
) -> tuple[Scoring, Drawing, Score]:
    """A score from 100 s on; the clock moves while batches are drawn."""
    drawing = Drawing(config_of(**settings), seconds)
    monkeypatch.setattr(scoring, "time", SimpleNamespace(monotonic=lambda: drawing.now))
    it = scoring_of(folder, drawing)
    before = it.state_dict()
    score = it.measure(300, 100.0, stay)
    assert before == [] != it.state_dict()  # a checkpoint is written while the stage goes on
    return it, drawing, score


def test_a_score_is_over_every_picture_in_its_place(monkeypatch, tmp_path: Path) -> None:
    it, drawing, score = measure(monkeypatch, tmp_path, [12.0] * 5)
    chosen = spread(TASKS, 10)
    assert drawing.batches == [4] * 5
    assert it._scorer.summed == [(index, 10 * index + number) for index in chosen for number in range(2)]
    assert (score.prompts, score.images, score.complete, score.held_s) == (10, 20, True, 60.0)  # the limit, just
    assert it.scores == [(300, score.values["overall"])] and not it.pending(300) and it.pending(301)


@pytest.mark.parametrize(("seconds", "images"), [([13] * 5, 16), ([31, 1, 1, 1, 1], 4), ([1, 1, 30, 1, 1], 12)])
def test_no_round_is_begun_that_would_outlast_the_time(monkeypatch, tmp_path: Path, seconds, images: int) -> None:
    it, drawing, score = measure(monkeypatch, tmp_path, seconds)
    assert sum(drawing.batches) == score.images == images and score.prompts == images // 2
    assert score.held_s <= 60 and not score.complete
    assert it.scores == [(300, None)]
    assert not it.improves(score)
    assert score.metrics["complete"] is False


def test_the_first_round_is_drawn_however_long_it_takes(monkeypatch, tmp_path: Path) -> None:
    _, drawing, score = measure(monkeypatch, tmp_path, [600], images=3)
    assert drawing.batches == [4]
    assert (score.prompts, score.images) == (2, 4)  # the second has one of its three


def test_a_departure_ends_it_and_nothing_is_noted(tmp_path: Path) -> None:
    it = scoring_of(tmp_path, drawing := Drawing(config_of()), [(200, 0.5)])
    with pytest.raises(Preempted, match="asked to"):
        it.measure(300, time.monotonic(), lambda: "asked to" if len(drawing.batches) == 2 else None)
    assert drawing.batches == [4, 4]
    assert it.scores == [(200, 0.5)] and it.pending(300)


@dataclass(frozen=True)
class Echo(World):
    """A rank of several that hears of itself alone, or from the third round on of another, too."""

    theirs: tuple[int, int] = (0, 0)
    heard: list[list[int]] = field(default_factory=list)

    def sum(self, numbers: Sequence[int]) -> list[int]:
        self.heard.append([int(number) for number in numbers])
        theirs = self.theirs if len(self.heard) > 2 else (0, 0)
        return [own + other for own, other in zip(self.heard[-1], theirs, strict=True)]

    def gather(self, item: Any) -> list[Any]:
        return [item, "asked over there"]

    def broadcast_from_rank0(self, make: Any) -> Any:
        return make()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 20, 32])
def test_ranks_share_the_pictures_and_agree_equally_often(tmp_path: Path, batch_size: int) -> None:
    config = config_of(batch_size, minutes=1e6)
    shares, agreements = [], set()
    for rank in range(3):
        world = Echo(rank, 3, CPU)
        results, done = scoring_of(tmp_path, Drawing(config), (), world)._rounds(0.0, stay)
        shares.append([place for place, _ in results])
        agreements.add(len(world.heard))
        assert done == 20
    assert sorted(place for share in shares for place in share) == list(range(20))
    assert agreements == {-(-20 // (3 * batch_size))}
    # After each round, what is done is a beginning of the order.
    for rounds in range(1, agreements.pop()):
        done = sorted(place for share in shares for place in share[: rounds * batch_size])
        assert done == list(range(3 * batch_size * rounds))
    assert all(second > first for share in shares for first, second in pairwise(share))


def test_what_one_rank_says_all_of_them_heed(tmp_path: Path) -> None:
    config = config_of(batch_size=2, minutes=1e6)
    world = Echo(0, 2, CPU, theirs=(1, 0))
    results, done = scoring_of(tmp_path, Drawing(config), (), world)._rounds(0.0, stay)
    assert [place for place, _ in results] == [0, 1, 4, 5] and done == 8
    assert world.heard == [[0, 0]] * 3  # this rank is in time
    with pytest.raises(Preempted, match="asked over there"):
        scoring_of(tmp_path, Drawing(config), (), Echo(0, 2, CPU, theirs=(0, 1)))._rounds(0.0, stay)


# The best model


def score_of(step: int, overall: float, complete: bool = True) -> Score:
    return Score(step, {"overall": overall, "two": 0.25}, 10, 20, complete, 1.0)


def write(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_text(text)


def test_the_best_model_is_that_of_the_highest_complete_score(tmp_path: Path) -> None:
    it = scoring_of(tmp_path, Drawing(config_of()))
    for score, better in [
        (score_of(0, 0.1), True),
        (score_of(100, 0.3), True),
        (score_of(200, 0.3), False),
        (score_of(300, 0.2), False),
        (score_of(400, 0.9, complete=False), False),
        (score_of(500, 0.31), True),
    ]:
        assert it.improves(score) == better
        if better:
            step = score.step
            assert f"step {step} is the best so far" in it.keep(score, lambda folder, s=step: write(folder, str(s)))
    assert (tmp_path / "best" / "model.safetensors").read_text() == "500"
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {"step": 500, "overall": 0.31, "two": 0.25}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert not scoring_of(tmp_path, Drawing(config_of(keep_best=False))).improves(score_of(600, 1.0))


def test_a_best_model_of_a_future_that_was_given_up_counts_as_none(tmp_path: Path) -> None:
    past = [(100, 0.3), (200, None), (300, 0.5)]
    scoring_of(tmp_path, Drawing(config_of())).keep(score_of(300, 0.5), lambda folder: write(folder, "300"))
    assert read_best(tmp_path / "best", past) == 0.5
    assert not scoring_of(tmp_path, Drawing(config_of()), past).improves(score_of(400, 0.4))
    assert read_best(tmp_path / "best", past[:2]) is None  # gone back before it
    assert read_best(tmp_path / "best", [*past[:2], (300, 0.45)]) is None  # and come by there again, otherwise
    assert scoring_of(tmp_path, Drawing(config_of()), past[:2]).improves(score_of(300, 0.2))
    assert read_best(tmp_path / "nothing", past) is None


def test_a_disk_that_does_not_take_the_best_model_keeps_the_one_before(tmp_path: Path) -> None:
    it = scoring_of(tmp_path, Drawing(config_of()))
    it.keep(score_of(100, 0.3), lambda folder: write(folder, "100"))

    def fail(folder: Path) -> None:
        write(folder.with_name(f".{folder.name}"), "torn")  # a model is written aside, too
        raise OSError("No space left on device")

    assert "cannot be kept: No space left" in it.keep(score_of(200, 0.4), fail)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "model.safetensors").read_text() == "100"
    assert it.improves(score_of(300, 0.35))  # above the one that is there
    write(tmp_path / ".best.new", "of a start that was killed")
    it.keep(score_of(300, 0.35), lambda folder: write(folder, "300"))
    assert (tmp_path / "best" / "model.safetensors").read_text() == "300"


# Scorers and their settings


def test_stages_share_a_scorer_and_too_many_prompts_are_refused() -> None:
    made: list[str] = []

    def build(asked: Any, device: torch.device) -> Words:
        made.append(asked.scorer)
        if asked.clip:
            raise UserError(f"clip {asked.clip} is nowhere")
        return Words()

    settings = {0: config_of(), 2: config_of(prompts=20), 3: config_of(scorer="shapes"), 4: config_of(every=0)}
    found = build_scorers(settings, build, ALONE)
    assert list(found) == [0, 2, 3] and made == ["geneval", "shapes"]
    assert found[0] is found[2] is not found[3]
    with pytest.raises(UserError, match="^scoring.scorer geneval: scoring.prompts 21 are .* it has 20$"):
        build_scorers({0: config_of(prompts=21)}, build, ALONE)
    with pytest.raises(UserError, match=r"^scoring.scorer geneval: clip x is nowhere$"):
        build_scorers({0: config_of(clip="x")}, build, ALONE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scorer": "clip"}, ["scoring.scorer", "'geneval' or 'shapes'"]),
        ({"every": 9, "prompts": 0}, ["scoring.prompts", "greater than 0"]),
        ({"every": 9, "minutes": 0}, ["scoring.minutes", "greater than 0"]),
        (
            {"every": 9, "scorer": "shapes", "detector_weights": "x"},
            ["detector_weights x does nothing under scorer shapes"],
        ),
        ({"every": 9, "scorer": "shapes", "clip": "x"}, ["clip x does nothing under scorer shapes"]),
        ({"min_delta": 0.1, "patience": 9}, ["min_delta 0.1 does nothing under every 0"]),
        ({"every": 9, "min_delta": 0.1}, ["min_delta 0.1 and patience None", "both or neither"]),
        ({"every": 9, "patience": 9}, ["min_delta None and patience 9", "both or neither"]),
        ({"every": 9, "min_delta": 0.1, "patience": 12}, ["patience 12", "multiple of every (9)"]),
        ({"every": 9, "min_delta": 0, "patience": 18}, ["min_delta", "greater than 0"]),
    ],
)
def test_settings_that_do_nothing_are_refused(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config({"scoring": settings}, "here")
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_stage_may_score_otherwise_and_a_model_of_classes_is_not_scored_by_prompts() -> None:
    rule = {"every": 9, "min_delta": 0.1, "patience": 18}
    validate_config({"scoring": {"every": 3}, "stages": [{"name": "a", "scoring": rule}]}, "here")
    with pytest.raises(ConfigError, match="here: scoring.every 9: .* model.condition must be text, not class"):
        validate_config({"scoring": {"every": 9}, "model": {"condition": "class", "text_depth": 4}}, "here")


def test_drawn_shapes_are_scored_in_squares() -> None:
    tree = {"scoring": {"every": 9, "scorer": "shapes"}, "data": {"resolution": [256, 128]}}
    with pytest.raises(
        ConfigError, match=r"here: data.resolution .*256.*128.*: scoring.scorer shapes .* squares alone"
    ):
        validate_config(tree, "here")
    validate_config({**tree, "data": {"resolution": 256}}, "here")
    validate_config({**tree, "scoring": {"every": 9}}, "here")  # GenEval's own detector takes any
