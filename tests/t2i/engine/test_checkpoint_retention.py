"""Which checkpoints stay: the newest, every n-th, the newest ephemeral one, and what a rollback may need."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from shard_cuts import cut, ema_of

from t2i.config.train import CheckpointConfig
from t2i.engine.checkpoint import CheckpointWriter, checkpoints, newest
from t2i.engine.checkpoint.format import EPHEMERAL, Retention


def written(
    retention: Retention,
    steps: list[int],
    ephemeral: frozenset[int] = frozenset(),
    before: dict[int, int] | None = None,
) -> list[int]:
    """What is left after checkpoints at these steps, one after the other."""
    there: dict[int, bool] = {}
    for step in steps:
        there[step] = step in ephemeral
        for gone in retention.expired(there, step, (before or {}).get(step)):
            del there[gone]
    return sorted(there)


def test_the_newest_are_kept_and_every_nth_for_ever() -> None:
    tens = list(range(10, 101, 10))
    assert written(Retention(2), tens) == [90, 100]
    assert written(Retention(2, 30), tens) == [30, 60, 90, 100]
    assert written(Retention(1, 40), tens[:-1]) == [40, 80, 90]


def test_of_the_ephemeral_ones_the_newest_is_kept_until_a_regular_one_is_newer() -> None:
    ephemeral = frozenset({12, 14, 16, 22, 30})
    steps = [10, 12, 14, 16, 20, 22]
    assert written(Retention(2, 30), steps[:2], ephemeral) == [10, 12]
    assert written(Retention(2, 30), steps[:4], ephemeral) == [10, 16]
    assert written(Retention(2, 30), steps[:5], ephemeral) == [10, 20]
    assert written(Retention(2, 30), steps, ephemeral) == [10, 20, 22]
    assert written(Retention(2, 30), [*steps, 30, 40], ephemeral) == [20, 40]  # no ephemeral one stays for ever


def test_later_ones_neither_count_nor_go() -> None:
    assert Retention(1).expired({2: False, 4: False, 8: False}, latest=4) == [2]
    assert Retention(2).expired({2: False, 4: False, 8: True}, latest=4) == []


def test_what_a_rollback_needs_is_kept() -> None:
    tens = [10, 20, 30, 40, 50]
    assert written(Retention(1), tens, before={30: 15, 40: 15, 50: 15}) == [50]  # 10 was gone at 20
    assert written(Retention(1), tens, before={20: 15, 30: 15, 40: 15, 50: 15}) == [10, 50]
    assert written(Retention(1), tens, before={20: 15, 30: 15, 40: 35, 50: 45}) == [40, 50]
    assert written(Retention(3), tens, before={50: 36}) == [30, 40, 50]
    assert written(Retention(1, 30), tens, before={50: 45}) == [30, 40, 50]  # not as far back as 30
    assert written(Retention(1), [10, 12, 20], frozenset({12}), before={12: 11, 20: 13}) == [12, 20]
    assert Retention(1).expired({10: False}, 10, needed_before=5) == []


def save(writer: CheckpointWriter, step: int, ephemeral: bool = False) -> None:
    (shards,) = cut(1)
    writer.save(step, shards, ema_of(shards), {}, ephemeral=ephemeral)
    assert writer.wait() == step


def test_on_the_disk(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, rank=0, world_size=1, attempt_id="x", keep=1, keep_every=20)
    for step, ephemeral in ((10, False), (15, True), (16, True), (20, False), (25, True), (30, False), (35, True)):
        save(writer, step, ephemeral)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000020", "step_00000030", "step_00000035"]
    assert (tmp_path / "step_00000035" / EPHEMERAL).exists()
    assert newest(tmp_path) == (tmp_path / "step_00000035", [])


def test_a_rollback_takes_later_ones_away(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, rank=0, world_size=1, attempt_id="x", keep=9)
    for step in (10, 20, 30):
        save(writer, step)
    writer.discard_after(10)
    assert newest(tmp_path) == (tmp_path / "step_00000010", [])
    save(writer, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000020"]
    assert writer.take_events() == []


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"every": 100, "keep_every": 150}, "keep_every 150 must be a multiple of every"),
        ({"every": 100, "ephemeral_every": 100}, "ephemeral_every 100 must be below every"),
    ],
)
def test_cadences_that_do_not_fit_are_refused(tree: dict[str, int], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        CheckpointConfig.model_validate(tree)
