"""What the ranks agree on before a step: bad samples are listed, and too many of them stop the run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tar_samples import write_source

from data.errors import DataError
from data.lane import Quarantined, Source
from data.loader import Loader
from data.sample import ImageSettings
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.train.data import DataIterator
from t2i.train.metrics import JsonLines

RANKS = Path(__file__).with_name("data_iterator_ranks.py")
CORRUPTION = Quarantined("source", "00009.tar", None, 512, "corrupt_tar", "cut off")


def iterator_of(folder: Path, bad: int, max_bad_fraction: float) -> DataIterator:
    """200 samples in shards of 50, of which the first `bad` are undecodable."""
    index = write_source(folder / "shards", [50] * 4, replaced={n: {"jpg": b"?"} for n in range(bad)})
    loader = Loader(
        [Source(index)], ImageSettings(8), batch_size=50, lanes=1, seed=0, stage="s", rank=0, world_size=1,
        workers=0, shuffle_block=64, buffer_bytes=1 << 30,
    )  # fmt: skip
    config = RunConfig.model_validate(
        {"root": folder.parent, "name": folder.name, "data": {"max_bad_fraction": max_bad_fraction}}
    )
    return DataIterator(loader, World(0, 1, torch.device("cpu")), config, "s", 0, [CORRUPTION])


def test_bad_samples_are_listed_with_shard_key_offset_and_reason(tmp_path: Path) -> None:
    iterator = iterator_of(tmp_path, bad=2, max_bad_fraction=1.0)
    for step in range(1, 5):
        iterator.next(step)
    counters, retries = iterator.flush()
    damaged, *lines = JsonLines(tmp_path / "quarantine.jsonl").lines()
    assert (damaged["shard"], damaged["offset"], damaged["step"]) == ("00009.tar", 512, 0)
    assert {(line["shard"], line["key"]) for line in lines} == {("00000.tar", "000000"), ("00000.tar", "000001")}
    assert {line["offset"] for line in lines} == {0, 2048}  # two headers, and a block for each content
    assert {line["reason"] for line in lines} == {"undecodable_image"}
    assert all(line["stage"] == "s" and 1 <= line["step"] <= 4 for line in lines)
    assert counters["bad"] == counters["undecodable_image"] == len(lines)
    assert counters["samples"] == 200 and retries == {}
    iterator.flush()
    assert JsonLines(tmp_path / "quarantine.jsonl").lines() == [damaged, *lines]  # once


@pytest.mark.parametrize(("bad", "stops"), [(3, True), (1, False)])
def test_past_the_share_the_run_stops_after_a_thousand_samples_and_names_the_shard(
    tmp_path: Path, bad: int, stops: bool
) -> None:
    iterator = iterator_of(tmp_path, bad, max_bad_fraction=0.01)
    other = {
        "stage": "before",
        "step": 1,
        "source": "source",
        "shard": "00003.tar",
        "key": "k",
        "reason": "bad_caption",
    }
    for _ in range(50):  # another stage's are not counted
        JsonLines(tmp_path / "quarantine.jsonl").write(other)
    if not stops:
        for step in range(1, 41):
            iterator.next(step)
        counters, _ = iterator.flush()
        assert counters["samples"] == 2000 and counters["bad"] in (10, 11)  # the last epoch's may be unread
        return
    with pytest.raises(DataError, match=r"15 of 10\d\d samples .*0\.01; the worst shards: source/00000\.tar \(15\)"):
        for step in range(1, 41):
            state = iterator.state_dict()
            iterator.next(step)
    assert step in (20, 21)  # of 50 samples each
    assert iterator.state_dict() is state  # of the batch before: what is saved goes on here


def test_a_fault_leaves_the_state_of_the_batch_before(tmp_path: Path) -> None:
    iterator = iterator_of(tmp_path, bad=0, max_bad_fraction=1.0)
    iterator.next(1)
    state = iterator.state_dict()
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match="00"):
        for step in range(2, 9):
            state = iterator.state_dict()
            iterator.next(step)
    assert iterator.state_dict() is state


def test_a_fault_on_one_rank_stops_all_of_them_after_the_same_batch(tmp_path: Path, launch: Any) -> None:
    write_source(tmp_path / "shards", [50] * 4)
    found = launch(RANKS, 2, str(tmp_path), "fault")
    assert [rank["steps"] for rank in found] == [3, 3] == [rank["batch"] for rank in found]
    assert found[0]["met"] == "RuntimeError: rank 1: KeyError: 'odd'"
    assert found[1]["met"] == "KeyError: 'odd'"


def test_a_search_without_end_is_judged_over_all_ranks(tmp_path: Path, launch: Any) -> None:
    """One lane finds its first good samples, the other nothing at all: no batch is ever whole."""
    write_source(tmp_path / "shards", [8000], replaced={n: {"jpg": b"?"} for n in range(4, 8000)})
    found = launch(RANKS, 2, str(tmp_path), "bad")
    for rank in found:
        assert (
            "samples have bad content, over data.max_bad_fraction 0.01; the worst shards: source/00000.tar"
            in rank["met"]
        )
    listed = JsonLines(tmp_path / "run" / "quarantine.jsonl").lines()
    times = Counter(line["key"] for line in listed)
    assert len(times) >= 990 and max(times.values()) <= 2  # the lanes may be in their second epoch by then
