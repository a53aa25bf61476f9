"""Checkpoints: committed whole or not at all, readable by any cut, refused if damaged or of another model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from shard_cuts import cut, ema_of, write

from t2i.engine.checkpoint import Checkpoint, CheckpointError, CheckpointWriter, checkpoints, moments_of, newest
from t2i.engine.checkpoint.format import manifest_text
from t2i.engine.engine import Shard


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_three_wrote(tmp_path: Path, readers: int) -> None:
    write(tmp_path, 10)
    checkpoint = Checkpoint(tmp_path / "step_00000010")
    assert checkpoint.state == {"batches": 10}
    for shards in cut(readers):
        expected_moments = {name: shard.state["exp_avg"].clone() for name, shard in shards.items()}
        for shard in shards.values():
            shard.state["exp_avg"].zero_()
        params = {name: torch.full_like(shard.param, 99) for name, shard in shards.items()}
        ema = {name: torch.full_like(shard.param, 99) for name, shard in shards.items()}
        checkpoint.read(shards, {"param": params, "ema": ema, **moments_of(shards)})
        for name, shard in shards.items():
            assert torch.equal(params[name], shard.param)
            assert torch.equal(ema[name], shard.param * 3)
            assert torch.equal(shard.state["exp_avg"], expected_moments[name])


def test_the_newest_whole_checkpoint_wins_and_faults_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    torn = tmp_path / "step_00000004" / "rank_00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    flipped = tmp_path / "step_00000003" / "rank_00000.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    path, faults = newest(tmp_path)
    assert path == tmp_path / "step_00000002"
    assert faults[0].startswith(f"{torn}: truncated, ") and f"{flipped}: its checksum is not" in faults[1]
    assert len(faults) == 2
    (tmp_path / "step_00000002" / "rank_00002.safetensors").unlink()
    path, faults = newest(tmp_path)
    assert path == tmp_path / "step_00000001" and faults[2].endswith("rank_00002.safetensors: missing")


def test_nothing_is_committed_before_every_rank_has_written(tmp_path: Path) -> None:
    shards = cut(2)
    first = CheckpointWriter(tmp_path, rank=0, world_size=2, attempt_id="x", keep=1)
    first.save(5, shards[0], ema_of(shards[0]), {})
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert checkpoints(tmp_path) == []  # rank 0 goes on waiting for rank 1
        time.sleep(0.05)
    second = CheckpointWriter(tmp_path, rank=1, world_size=2, attempt_id="x", keep=1)
    second.save(5, shards[1], ema_of(shards[1]), {})
    second.wait()
    first.wait()
    assert checkpoints(tmp_path) == [tmp_path / "step_00000005"]


def test_leftovers_of_a_killed_attempt_are_cleared_and_never_mixed_in(tmp_path: Path) -> None:
    shards = cut(2)
    killed = CheckpointWriter(tmp_path, rank=1, world_size=2, attempt_id="old", keep=1)
    killed.save(5, shards[1], ema_of(shards[1]), {})
    killed.wait()
    assert len(list(tmp_path.glob(".step_*"))) == 1
    write(tmp_path, 5, ranks=2, attempt_id="new")
    assert list(tmp_path.glob(".step_*")) == []
    assert newest(tmp_path) == (tmp_path / "step_00000005", [])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]


def test_a_snapshot_does_not_see_later_training(tmp_path: Path) -> None:
    (shards,) = cut(1)
    before = shards["a"].param.clone()
    writer = CheckpointWriter(tmp_path, rank=0, world_size=1, attempt_id="x", keep=1)
    writer.save(1, shards, ema_of(shards), {})
    shards["a"].param.add_(1)
    writer.wait()
    params = {"a": torch.empty_like(before)}
    Checkpoint(tmp_path / "step_00000001").read(shards, {"param": params})
    assert torch.equal(params["a"], before)


def test_another_model_is_refused_by_the_parameter_that_differs(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (shards,) = cut(1)
    shards["a"] = Shard(torch.Size([10, 7]), 0, shards["a"].param, shards["a"].state)
    with pytest.raises(CheckpointError, match=r"another model: 1 parameters differ, first a \(\[7, 10\] there"):
        Checkpoint(tmp_path / "step_00000001").read(shards, {})


def test_another_optimizers_moments_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (shards,) = cut(1)
    momentum = {"momentum": {name: torch.empty_like(shard.param) for name, shard in shards.items()}}
    with pytest.raises(CheckpointError, match="holds no momentum of a"):
        Checkpoint(tmp_path / "step_00000001").read(shards, momentum)


def test_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    manifest = tmp_path / "step_00000001" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        Checkpoint(tmp_path / "step_00000001")


@pytest.mark.parametrize("damage", ["torn", "empty", "a digit", "another object", "another file"])
def test_a_damaged_manifest_is_no_checkpoint(tmp_path: Path, damage: str) -> None:
    for step in (123, 456):
        write(tmp_path, step)
    manifest = tmp_path / "step_00000456" / "manifest.json"
    text = manifest.read_text()
    if damage == "another file":
        body = json.loads(text)
        del body["sha256"], body["format"]
        body["parts"][0]["file"] = "../step_00000123/rank_00000.safetensors"
        text = manifest_text(body)
    damaged = {"torn": text[:-9], "empty": "", "a digit": text.replace('"batches": 456', '"batches": 457')}
    manifest.write_text(damaged.get(damage, "{}" if damage == "another object" else text))
    path, faults = newest(tmp_path)
    assert path == tmp_path / "step_00000123"
    assert len(faults) == 1 and "step_00000456" in faults[0] and "manifest" in faults[0]


def test_an_optional_part_may_differ_and_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (shards,) = cut(1)
    shards["b"] = Shard(torch.Size([2]), 0, torch.tensor([5.0, 6.0]), {})
    params = {name: shard.param.clone() for name, shard in shards.items()}
    params["a"].zero_()
    Checkpoint(tmp_path / "step_00000001").read(shards, {"param": params}, optional="b")
    assert torch.equal(params["a"], shards["a"].param)
    assert params["b"].tolist() == [5.0, 6.0]


def test_a_damaged_checkpoint_is_replaced_when_training_comes_by_again(tmp_path: Path) -> None:
    write(tmp_path, 4, keep=1)
    write(tmp_path, 8, keep=2)
    (tmp_path / "step_00000008" / "rank_00000.safetensors").write_bytes(b"torn")
    write(tmp_path, 6, keep=1, attempt_id="y")
    assert newest(tmp_path)[0] == tmp_path / "step_00000006"  # not counted out by the damaged later one
    write(tmp_path, 8, keep=1, attempt_id="y")
    assert newest(tmp_path) == (tmp_path / "step_00000008", [])
    assert checkpoints(tmp_path) == [tmp_path / "step_00000008"]
