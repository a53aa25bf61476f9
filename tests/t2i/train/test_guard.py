"""The guard: healthy training goes on, spikes do not reach the weights, and a killed run decides as an unbroken one."""

from __future__ import annotations

import json
import math
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i.config.train import SpikeGuardConfig
from t2i.train.guard import Guard, Rollback, SkippedFile, Stop, ids_of, log_norm, reason_to_skip, robust_z
from t2i.train.metrics import JsonLines

NAN, INF = math.nan, math.inf
SMALL = SpikeGuardConfig(window=12, min_history=8, max_skips=3, skip_window=12, rollback_margin=6, max_rollbacks=2)
finite = st.floats(-1e30, 1e30)


def follow(guard: Guard, trace: Iterable[tuple[float, float]]) -> tuple[list[int], Rollback | Stop | None]:
    """The skipped steps of a trace of (loss, gradient norm), up to the first decision, and that."""
    skipped = []
    for step, (loss, norm) in enumerate(trace, 1):
        reason = guard.skip_update(loss, norm)
        skipped += [step] if reason else []
        if decision := guard.record(step, loss, norm, reason):
            return skipped, decision
    return skipped, None


def healthy(
    seed: int, steps: int, noise: float = 0.03, log_norm_noise: float = 0.3, tails: float = INF
) -> list[tuple[float, float]]:
    """A healthy start: the loss falls steeply, the norm rises to 12 times its later value at step 40, and falls.

    Args:
        noise: standard deviation of the loss, as a share of it.
        log_norm_noise: scale of the norm's logarithm.
        tails: degrees of freedom of Student's t for the norm's logarithm; fewer have heavier tails.
    """
    random, t = np.random.default_rng(seed), np.arange(1, steps + 1)
    loss = (0.25 + 4 * np.exp(-t / 60) + 1.5 * (t + 10) ** -0.4) * (1 + noise * random.standard_normal(steps))
    tail = random.standard_normal(steps) if tails == INF else random.standard_t(tails, steps)
    norm = 0.3 * np.exp(2.5 * np.exp(-(((t - 40) / 60) ** 2)) + 0.8 * np.exp(-t / 800) + log_norm_noise * tail)
    return list(zip(loss.tolist(), norm.tolist(), strict=True))


# The measure


@given(finite, st.lists(finite, min_size=1, max_size=20), st.floats(1e-3, 10))
def test_the_deviation_is_the_median_absolute_one(value: float, history: list[float], floor: float) -> None:
    middle = np.median(history)
    deviation = max(np.median(np.abs(np.array(history) - middle)) / 0.674490, floor)  # the normal's upper quartile
    assert robust_z(value, history, floor) == pytest.approx((value - middle) / deviation, rel=1e-4)


def test_a_spike_is_what_lies_above_the_threshold_and_only_above() -> None:
    losses, log_norms = [0.9, 1.0, 1.1] * 4, [log_norm(n) for n in (1.0, 2.0, 4.0)] * 4
    deviation = 1.4826 * 0.1
    assert reason_to_skip(1 + 7.9 * deviation, 2.0, losses, log_norms, SMALL) is None
    assert reason_to_skip(1 + 8.1 * deviation, 2.0, losses, log_norms, SMALL) == (
        "the loss 2.201 is 8.1 deviations above its median 1"
    )
    assert reason_to_skip(1.0, 2 * math.exp(7.9 * 1.4826 * math.log(2)), losses, log_norms, SMALL) is None
    assert "gradient norm" in str(
        reason_to_skip(1.0, 2 * math.exp(8.1 * 1.4826 * math.log(2)), losses, log_norms, SMALL)
    )
    assert reason_to_skip(-1e9, 0.0, losses, log_norms, SMALL) is None


def test_where_there_is_hardly_any_noise_a_few_percent_are_no_spike() -> None:
    losses, log_norms = [0.2] * 12, [log_norm(1.0)] * 12
    assert reason_to_skip(0.2 * 1.15, 10.0, losses, log_norms, SMALL) is None
    assert reason_to_skip(0.2 * 1.17, 1.0, losses, log_norms, SMALL) is not None
    assert reason_to_skip(0.2, 12.0, losses, log_norms, SMALL) is not None
    assert reason_to_skip(0.0, 1.0, [0.0] * 12, [log_norm(0.0)] * 12, SMALL) is not None  # a first gradient after none


@pytest.mark.parametrize("config", [SMALL, SpikeGuardConfig(threshold=0)])
@pytest.mark.parametrize("loss, norm", [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (1.0, NAN), (1.0, INF)])
def test_what_is_not_finite_is_skipped_from_the_first_step(config: SpikeGuardConfig, loss: float, norm: float) -> None:
    assert Guard(config).skip_update(loss, norm) is not None


def test_no_spike_is_looked_for_before_there_is_a_measure() -> None:
    guard = Guard(SMALL)
    for step in range(1, 9):
        assert guard.skip_update(100.0, 1.0) is None
        guard.record(step, 1.0, 1.0, None)
    assert guard.skip_update(100.0, 1.0) is not None


# Healthy training


@pytest.mark.parametrize("noise, log_norm_noise", [(0.03, 0.3), (0.15, 0.5), (0.002, 0.03)])
def test_no_step_of_a_healthy_start_is_skipped(noise: float, log_norm_noise: float) -> None:
    for seed in range(4):
        assert follow(Guard(SpikeGuardConfig()), healthy(seed, 1200, noise, log_norm_noise)) == ([], None)


@pytest.mark.parametrize("tails, most", [(3.0, 0.003), (2.0, 0.008)])
def test_heavy_tailed_norms_cost_few_steps_and_no_rollback(tails: float, most: float) -> None:
    skipped = 0
    for seed in range(5):
        steps, decision = follow(Guard(SpikeGuardConfig()), healthy(seed, 1000, log_norm_noise=0.25, tails=tails))
        assert decision is None
        skipped += len(steps)
    assert skipped <= most * 5000


@pytest.mark.parametrize("factor, over", [(3.0, 1), (8.0, 200), (30.0, 200)])
def test_a_norm_that_rises_for_good_is_taken_up(factor: float, over: int) -> None:
    random = np.random.default_rng(0)
    rise = np.clip((np.arange(1200) - 500) / over, 0, 1)
    norms = 0.3 * np.exp(np.log(factor) * rise + 0.15 * random.standard_normal(1200))
    assert follow(Guard(SpikeGuardConfig()), [(0.3, norm) for norm in norms.tolist()]) == ([], None)


def test_a_loss_that_rises_for_good_is_taken_up_if_it_is_slow_or_small() -> None:
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(1200)
    for factor, over in ((1.1, 1), (1.3, 200)):
        rise = 1 + (factor - 1) * np.clip((np.arange(1200) - 500) / over, 0, 1)
        assert follow(Guard(SpikeGuardConfig()), [(loss, 0.3) for loss in (0.3 * rise * noise).tolist()]) == ([], None)


# Unhealthy training


def test_every_spike_is_skipped_and_none_hides_the_next() -> None:
    for seed in range(3):
        trace = healthy(seed, 1200)
        spikes = {step: (2.0, 1.0) if step % 2 else (1.0, 40.0) for step in (600, 601, 603, 750, 901, 1102, 1103)}
        for step, (of_loss, of_norm) in spikes.items():
            loss, norm = trace[step - 1]
            trace[step - 1] = (loss * of_loss, norm * of_norm)
        assert follow(Guard(SpikeGuardConfig()), trace) == (sorted(spikes), None)


def test_a_nan_costs_one_step() -> None:
    trace = healthy(0, 1000)
    bad = [1, 100, 500, 501, 502, 503, 900]
    for step in bad:
        trace[step - 1] = (NAN, 1.0) if step % 2 else (1.0, INF)
    assert follow(Guard(SpikeGuardConfig()), trace) == (bad, None)


def test_past_the_allowed_number_in_the_window_the_run_goes_back() -> None:
    trace = healthy(0, 700)
    config = SpikeGuardConfig()
    for step in range(500, 600, 10):
        trace[step - 1] = (NAN, 1.0)
    assert follow(Guard(config), trace)[1] is None  # ten of a hundred
    trace[600 - 1] = (NAN, 1.0)
    assert follow(Guard(config), trace)[1] is None  # the first has left the window
    trace[595 - 1] = (NAN, 1.0)
    decision = follow(Guard(config), trace)[1]
    assert isinstance(decision, Rollback)
    assert (decision.first, decision.last) == (400, 595)  # rollback_margin before the first
    assert decision.reason == (
        "11 updates of steps 500 to 595 were skipped: going back, to leave out the batches of steps 400 to 595"
    )


# A run: a trainer in miniature


class Run:
    """A run whose weights are the record of what they were trained on.

    Args:
        faults: by step: "nan", "spike", or "poison": a batch whose update, once applied, makes every loss after the
            next two steps five times larger.
        shift: from this step on the loss is five times larger, whatever was trained on.
    """

    def __init__(
        self, config: SpikeGuardConfig, folder: Path, steps: int, faults: Mapping[int, str], shift: int = 10**9
    ) -> None:
        self.config, self.folder, self.steps, self.faults, self.shift = config, folder, steps, faults, shift
        self.disk: dict[int, str] = {}  # the checkpoints
        self.saved: set[int] = set()  # and those that were not kept
        self.ended = ""
        self.decisions: list[Rollback | Stop] = []

    def numbers(self) -> tuple[float, float]:
        """Loss and gradient norm of the step under way."""
        fault = self.faults.get(self.step)
        noise = zlib.crc32(f"{self.weights} {self.step}".encode()) / 2**32 - 0.5
        poisoned = any(self.faults.get(step) == "poison" and step + 2 < self.step for step in self.applied)
        loss = (1 + 0.1 * noise) * (5 if poisoned or self.step >= self.shift else 1)
        return (NAN, 1.0) if fault == "nan" else (loss, 50.0 if fault == "spike" else math.exp(noise / 4))

    def load(self, step: int) -> dict[str, Any] | None:
        """The guard's state; the stage's start at step 0."""
        state = json.loads(self.disk[step]) if step else {"weights": 0, "applied": [], "guard": None}
        self.step, self.weights, self.applied = step, state["weights"], state["applied"]
        return state["guard"]

    def save(self) -> None:
        if self.step == 0:
            return
        state = {"weights": self.weights, "applied": self.applied, "guard": self.guard.state_dict()}
        self.saved.add(self.step)
        self.disk[self.step] = json.dumps(state, allow_nan=False)
        oldest = max((step for step in self.disk if step < self.guard.needed_before(self.step)), default=0)
        self.disk = {step: kept for step, kept in self.disk.items() if step >= oldest}

    def rollback(self, rollback: Rollback) -> None:
        target = max((step for step in self.disk if step < rollback.first), default=0)
        assert target or not any(step < rollback.first for step in self.saved)  # what is needed was kept
        self.guard.rollback(rollback, self.load(target))
        self.disk = {step: kept for step, kept in self.disk.items() if step <= target}

    def live(self, iterations: int = 10**9, every: int = 7, warned: bool = False) -> None:
        """From the newest checkpoint to the end, or to death in iteration `iterations`: at once, or `warned`: saved."""
        self.guard = Guard(self.config)
        if (state := self.load(max(self.disk, default=0))) is not None:
            self.guard.load_state_dict(state)
        file = SkippedFile(self.folder, "s", self.guard.events)
        while self.step < self.steps and not self.ended:
            self.step += 1
            iterations -= 1
            decision = None
            if not self.guard.skip_batch(self.step):
                loss, norm = self.numbers()
                reason = self.guard.skip_update(loss, norm)
                if reason is None:
                    self.weights = zlib.crc32(f"{self.weights} {self.step} {loss}".encode())
                    self.applied.append(self.step)
                decision = self.guard.record(self.step, loss, norm, reason)
            file.write(self.guard.take_events(), [str(self.step)])
            if iterations == 0 and not warned:
                return
            if decision:
                self.decisions.append(decision)
            if isinstance(decision, Rollback):
                self.rollback(decision)
            elif isinstance(decision, Stop):
                self.ended = decision.reason
            if self.ended or iterations == 0 or self.step % every == 0:
                self.save()
            if iterations == 0:
                return

    def outcome(self) -> tuple[Any, ...]:
        return self.step, self.weights, self.applied, self.ended, JsonLines(self.folder / "skipped.jsonl").lines()


def test_a_rollback_leaves_out_what_led_to_the_bad_updates_and_the_run_goes_on(tmp_path: Path) -> None:
    run = Run(SMALL, tmp_path, 120, {60: "poison"})
    run.live()
    # Skipped from 63 on, when the loss shows it; the margin of 6 reaches back to the cause.
    assert [(it.first, it.last) for it in run.decisions if isinstance(it, Rollback)] == [(57, 66)]
    assert run.applied == [step for step in range(1, 121) if not 57 <= step <= 66]
    kinds = [line["kind"] for line in run.outcome()[-1]]
    assert kinds == ["skipped_update"] * 4 + ["rollback"] + ["skipped_batch"] * 10 and run.ended == ""


def test_without_a_margin_the_same_weights_would_come_again(tmp_path: Path) -> None:
    run = Run(SMALL.model_copy(update={"rollback_margin": 0}), tmp_path, 120, {60: "poison"})
    run.live()
    assert [type(it) for it in run.decisions] == [Rollback, Stop]
    assert run.applied == list(range(1, 63)) and run.step == 70


def test_a_loss_that_stays_high_stops_the_run_after_one_rollback(tmp_path: Path) -> None:
    run = Run(SMALL, tmp_path, 400, {}, shift=60)
    run.live()
    assert [type(it) for it in run.decisions] == [Rollback, Stop]
    assert run.step == 63 + 4  # four skipped updates, what the rollback left out, four skipped updates
    assert run.ended == (
        "4 updates of steps 64 to 67 were skipped, and to leave out the batches of steps 54 to 63 did not help: see "
        "skipped.jsonl; lower optimizer.lr, or raise spike_guard.threshold if the data is like that"
    )
    assert max(run.disk) == run.step  # saved
    # It can go on from there with another setting.
    run.ended, run.config = "", SMALL.model_copy(update={"threshold": 0})
    run.live()
    assert run.ended == "" and run.step == 400


def test_a_stage_has_so_many_rollbacks(tmp_path: Path) -> None:
    run = Run(SMALL, tmp_path, 400, {60: "poison", 150: "poison", 240: "poison"})
    run.live()
    assert [type(it) for it in run.decisions] == [Rollback, Rollback, Stop]
    assert (
        run.ended == "4 updates of steps 243 to 246 were skipped, and spike_guard.max_rollbacks is 2: see skipped.jsonl"
    )


def test_it_makes_no_difference_which_checkpoint_the_run_goes_back_to(tmp_path: Path) -> None:
    outcomes = []
    for every in (2, 7, 100, 1000):
        (tmp_path / str(every)).mkdir()
        run = Run(SMALL, tmp_path / str(every), 240, {60: "poison", 90: "nan", 150: "poison"})
        run.live(every=every)
        outcomes.append(run.outcome())
    assert [type(it) for it in run.decisions] == [Rollback, Rollback] and outcomes == [outcomes[0]] * 4


faults = st.dictionaries(st.integers(1, 80), st.sampled_from(["nan", "nan", "spike", "poison"]), max_size=25)
kills = st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=6)


@settings(max_examples=150, deadline=None)
@given(faults, kills, st.integers(3, 20), st.integers(0, 8), st.sampled_from([75, 10**9]))
def test_a_run_killed_anywhere_ends_as_one_that_was_not(
    faults: dict[int, str], kills: list[tuple[int, bool]], every: int, margin: int, shift: int
) -> None:
    config = SMALL.model_copy(update={"rollback_margin": margin})
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        unbroken = Run(config, Path(first), 90, faults, shift)
        unbroken.live(every=every)
        run = Run(config, Path(second), 90, faults, shift)
        for iterations, warned in kills:
            run.live(iterations, every, warned)
        run.live(every=every)
        assert run.outcome() == unbroken.outcome()


# The state

anything = st.one_of(st.floats(), st.floats(0.9, 1.1), st.sampled_from([NAN, INF, -INF, 0.0, 1e300]))


@settings(deadline=None)
@given(st.lists(st.tuples(anything, anything), max_size=150))
def test_the_state_is_finite_small_and_restored_exactly(trace: list[tuple[float, float]]) -> None:
    guard = Guard(SMALL)
    accepted = []
    for step, (loss, norm) in enumerate(trace, 1):
        norm = abs(norm)
        reason = guard.skip_update(loss, norm)
        accepted += [loss] if reason is None else []
        decision = guard.record(step, loss, norm, reason)
        state = guard.state_dict()
        assert state["losses"] == accepted[-SMALL.window :]
        assert all(map(math.isfinite, state["losses"] + state["log_norms"]))
        assert len(state["log_norms"]) == len(state["losses"]) and len(state["skipped_steps"]) <= SMALL.skip_window
        again = Guard(SMALL)
        again.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
        assert again.state_dict() == state and again.skip_update(loss, norm) == guard.skip_update(loss, norm)
        if isinstance(decision, Rollback):
            guard.rollback(decision, state)
        assert len(guard.state_dict()["skipped_ranges"]) <= SMALL.max_rollbacks
        assert step - SMALL.skip_window - SMALL.rollback_margin <= guard.needed_before(step) <= step + 1
        guard.take_events()


def test_a_saved_state_is_not_changed_by_the_steps_after_it() -> None:
    guard = Guard(SMALL)
    guard.record(1, 1.0, 1.0, None)
    state = guard.state_dict()
    saved = json.dumps(state)
    guard.record(2, 1.0, 1.0, None)
    decision = None
    for step in range(3, 8):
        decision = decision or guard.record(step, NAN, 1.0, "the loss is nan")
    assert isinstance(decision, Rollback)
    guard.rollback(decision, state)
    guard.record(8, 1.0, 1.0, None)
    assert json.dumps(state) == saved


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"window": 10}, "min_history 128 must be at most window (10)"),
        ({"max_skips": 100}, "max_skips 100 must be below skip_window (100)"),
        ({"threshold": NAN}, "finite number"),
        ({"threshold": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        SpikeGuardConfig.model_validate(settings)
    assert said in str(refusal.value)


# skipped.jsonl


def test_lines_have_the_ids_and_those_of_an_abandoned_end_are_taken_back(tmp_path: Path) -> None:
    guard = Guard(SMALL)
    file = SkippedFile(tmp_path, "low", 0)
    guard.record(5, NAN, 2.0, "the loss is nan")
    file.write(guard.take_events(), ["a/b/c"])
    saved = guard.events
    guard.record(6, NAN, 2.0, "the loss is nan")
    file.write(guard.take_events(), ["d"])
    SkippedFile(tmp_path, "high", 0).write([{"event": 9, "kind": "stop"}], ["e"])
    skipped = {
        "stage": "low",
        "event": 1,
        "kind": "skipped_update",
        "step": 5,
        "reason": "the loss is nan",
        "loss": None,
    }
    skipped |= {"grad_norm": 2.0, "ids": ["a/b/c"]}
    other = {"stage": "high", "event": 9, "kind": "stop"}
    lines = JsonLines(tmp_path / "skipped.jsonl").lines
    assert lines() == [skipped, skipped | {"event": 2, "step": 6, "ids": ["d"]}, other]
    SkippedFile(tmp_path, "low", saved)
    assert lines() == [skipped, other]
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]


def test_a_line_that_a_kill_tore_does_not_swallow_the_next(tmp_path: Path) -> None:
    stop = {"event": 1, "kind": "stop"}
    SkippedFile(tmp_path, "low", 0).write([stop], [])
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"stage": "low", "ev')
    SkippedFile(tmp_path, "low", 1).write([stop | {"event": 2}], [])
    assert [line["event"] for line in JsonLines(tmp_path / "skipped.jsonl").lines()] == [1, 2]


def test_the_ids_of_all_ranks_come_in_the_order_of_the_slots() -> None:
    def batch(slots: list[int]) -> Any:
        return SimpleNamespace(slots=np.array(slots), ids=[f"id{slot}" for slot in slots])

    world: Any = SimpleNamespace(gather=lambda mine: [mine, [(9, "id9"), (11, "id11")]])
    assert ids_of(batch([8, 10]), world) == ["id8", "id9", "id10", "id11"]
