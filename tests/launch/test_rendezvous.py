"""Rendezvous: missing ranks are named, and ranks of another run or with other settings are turned away."""

from __future__ import annotations

import socket
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import free_port, tiny_config

from data.errors import StoreError, UserError
from launch import rendezvous
from launch.rendezvous import RankAddress, agreed_values, meet

RUN = {"job": "stage1.py", "folder": "runs/mine", "ranks": "2"}
HOST = socket.gethostname()


def meeting(
    pool: ThreadPoolExecutor,
    port: int,
    rank: int,
    values: dict[str, str] | None = None,
    run: dict[str, str] = RUN,
    size: int = 2,
    seconds: float = 60.0,
) -> Future[dist.Store]:
    own = RankAddress(rank, size, 0, "127.0.0.1", port)
    return pool.submit(meet, own, run, values or {"seed": "0"}, timedelta(seconds=seconds))


def error_of(met: Future[dist.Store]) -> tuple[type[BaseException], str]:
    error = met.exception(timeout=60)
    assert error is not None
    return type(error), str(error)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture(autouse=True)
def soon(monkeypatch) -> None:
    """Reports come sooner, and the wait for another run to leave is short."""
    monkeypatch.setattr(rendezvous, "FIRST_REPORT_S", 0.2)
    monkeypatch.setattr(rendezvous, "REPORT_S", 0.3)
    monkeypatch.setattr(rendezvous, "PORT_TAKEN_S", 0.5)
    monkeypatch.setattr(rendezvous, "RETRY_S", 0.1)
    monkeypatch.setattr(rendezvous, "VERDICT_S", 1.0)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def test_ranks_that_agree_meet_in_one_store(pool) -> None:
    port = free_port()
    met = [meeting(pool, port, rank, size=3) for rank in (2, 0, 1)]
    stores = [one.result(timeout=60) for one in met]
    stores[0].set("word", "x")
    assert [store.get("word") for store in stores] == [b"x"] * 3


def test_missing_ranks_are_named_in_reports_and_in_the_error(pool, capsys) -> None:
    port = free_port()
    met = [meeting(pool, port, rank, size=4, seconds=1.2) for rank in (0, 2)]
    told = f"ranks 1, 3 (2 of 4) at 127.0.0.1:{port}; here are 2 on {HOST}"
    for one in met:
        kind, said = error_of(one)
        assert kind is StoreError
        assert said.startswith(f"rank 0 on {HOST} has waited 1 s for {told}")
    words = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rank 0")]
    assert len(words) > 1
    assert words[0] == f"rank 0 on {HOST}: waiting for {told}; for 0 s of 1 s"


def test_a_rank_without_rank_0_names_the_address(pool, capsys) -> None:
    port = free_port()
    late = meeting(pool, port, 1, seconds=0.5)
    kind, said = error_of(late)
    assert kind is StoreError
    assert f"rank 1 on {HOST} has waited" in said
    assert f"rank 0 at 127.0.0.1:{port} (Connection refused)" in said
    assert f"waiting for rank 0 at 127.0.0.1:{port} (Connection refused); for 0 s of 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"optimizer.lr": "0.0002", "train.steps": "8"}, "optimizer.lr (0.0002 and 0.0001)"),
        ({"optimizer.lr": "0.0001", "train.steps": "9"}, "train.steps (9 and 8)"),
        ({"optimizer.lr": "0.0001"}, "train.steps (none and 8)"),
        ({"optimizer.lr": "1", "train.steps": "9"}, "optimizer.lr (1 and 0.0001), train.steps (9 and 8)"),
    ],
)
def test_a_rank_that_differs_ends_all_ranks_at_once(pool, values: dict[str, str], told: str) -> None:
    port = free_port()
    zero = {"optimizer.lr": "0.0001", "train.steps": "8"}
    met = [meeting(pool, port, 0, zero, size=4), meeting(pool, port, 1, values, size=4)]  # the others never come
    for kind, said in map(error_of, met):
        assert kind is UserError
        assert said.startswith(f"rank 1 on {HOST} and rank 0 on {HOST} differ in {told}: ")


def test_ranks_of_another_run_never_join(pool, capsys) -> None:
    port = free_port()
    first = meeting(pool, port, 0)
    other = meeting(pool, port, 1, run=RUN | {"folder": "runs/other"})
    kind, said = error_of(other)
    assert kind is UserError
    assert f"another run at 127.0.0.1:{port}" in said
    assert "folder runs/mine there, runs/other here" in said and "--master_port" in said
    words = ""
    while f"rank 0 on {HOST} turned away rank 1 on {HOST}" not in words:
        assert not first.done()
        words += capsys.readouterr().err
    assert meeting(pool, port, 1).result(timeout=60) and first.result(timeout=60)  # its own rank may still come


def test_a_run_that_turned_a_rank_away_waits_on_and_names_it_in_the_error(pool, capsys) -> None:
    port = free_port()
    first = meeting(pool, port, 0, seconds=3)
    assert error_of(meeting(pool, port, 1, run=RUN | {"job": "stage2.py"}))[0] is UserError
    assert not first.done()
    kind, said = error_of(first)
    assert kind is StoreError
    assert "has waited 3 s" in said and "job stage1.py there, stage2.py here" in said
    assert capsys.readouterr().err.count(f"rank 0 on {HOST} turned away") == 1


def test_a_second_process_of_a_rank_is_turned_away(pool) -> None:
    port = free_port()
    zero, same = meeting(pool, port, 0, size=3), [meeting(pool, port, 1, size=3) for _ in range(2)]
    (loser,), (winner,) = wait(same, timeout=60, return_when=FIRST_COMPLETED)
    kind, said = error_of(loser)
    assert kind is StoreError and "--master_port" in said and "started twice" in said
    assert all(one.result(timeout=60) for one in (meeting(pool, port, 2, size=3), zero, winner))


def test_the_error_on_a_port_in_use_names_the_flag(pool, capsys, monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "CONTACT_S", 0.3)
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.3)
    with socket.create_server(("", 0)) as listener:
        kind, said = error_of(meeting(pool, listener.getsockname()[1], 0))
    assert kind is UserError
    assert "is in use" in said and "--master_port" in said
    assert f"rank 0 on {HOST} waits up to 0 s: port" in capsys.readouterr().err


def test_a_port_in_use_is_waited_for(pool) -> None:
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        zero = meeting(pool, port, 0)
        assert not wait([zero], timeout=0.2).done
    assert meeting(pool, port, 1).result(timeout=60) and zero.result(timeout=60)


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (RUN, StoreError),
        (RUN | {"launcher": "another"}, StoreError),
        (RUN | {"ranks": "3"}, StoreError),
        (RUN | {"folder": "runs/other"}, UserError),
        (RUN | {"job": "stage2.py"}, UserError),
    ],
)
def test_an_earlier_start_at_the_port_is_resumable_and_another_run_is_not(
    pool, run: dict[str, str], kind: type[Exception]
) -> None:
    port = free_port()
    earlier = [meeting(pool, port, rank) for rank in range(2)]
    assert all(one.result(timeout=60) for one in earlier)  # they keep the store
    assert [error_of(meeting(pool, port, rank, run=run))[0] for rank in range(2)] == [kind] * 2


def test_an_earlier_start_that_leaves_is_waited_for(pool, monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "PORT_TAKEN_S", 30.0)
    port = free_port()
    earlier = [meeting(pool, port, rank) for rank in range(2)]
    assert all(one.result(timeout=60) for one in earlier)
    new = [meeting(pool, port, rank) for rank in range(2)]
    assert not wait(new, timeout=0.5).done
    earlier.clear()  # and with it the store
    for one in new:
        one.result(timeout=60).set("word", "x")


# Under torchrun's agent, whose store outlives its ranks


@pytest.fixture
def agent(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_an_agent_restarts_meet_anew(pool, agent, first: int, size: int) -> None:
    for _ in range(2):
        met = {rank: meeting(pool, agent.port, rank) for rank in range(2)}
        met[0].result(timeout=60).set("word", "old")
        assert met[1].result(timeout=60)
    run = RUN | {"ranks": str(size)}
    order = sorted(range(size), key=lambda rank: (rank == 0) != (first == 0))
    met = {}
    for rank in order:  # rank 0 first, or last, when the others have waited longer than for another run
        if rank == order[-1]:
            assert not wait(met.values(), timeout=0.7).done
        met[rank] = meeting(pool, agent.port, rank, run=run, size=size)
    stores = [met[rank].result(timeout=60) for rank in range(size)]
    assert not any(store.check(["word"]) for store in stores)
    stores[0].set("word", "new")
    assert {store.get("word") for store in stores} == {b"new"}


def next_start(agent: dist.Store, earlier: list[str]) -> str:
    while (start := agent.get("rendezvous/start").decode()) in earlier:
        time.sleep(0.01)
    return start


def test_ranks_leave_a_start_whose_rank_0_was_killed_or_gave_up(pool, agent) -> None:
    abandoned = meeting(pool, agent.port, 0, size=3, seconds=0.2)
    assert error_of(abandoned)[0] is StoreError
    one = meeting(pool, agent.port, 1, size=3)  # finds the end of that start
    starts = [agent.get("rendezvous/start").decode()]
    unfinished = meeting(pool, agent.port, 0, size=3, seconds=4)
    starts.append(next_start(agent, starts))
    while not agent.check([f"rendezvous/{starts[-1]}/1"]):  # rank 1 registers there
        time.sleep(0.01)
    zero = meeting(pool, agent.port, 0, size=3)
    next_start(agent, starts)  # otherwise rank 2 may complete the start that is to stay unfinished
    two = meeting(pool, agent.port, 2, size=3)
    assert all(met.result(timeout=60) for met in (zero, one, two))
    assert error_of(unfinished)[0] is StoreError


def test_a_port_that_is_not_a_store(pool, monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "CONTACT_S", 0.5)
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.5)
    with socket.create_server(("", 0)) as listener:
        kind, said = error_of(meeting(pool, listener.getsockname()[1], 1))
    assert kind is UserError
    assert "another program" in said and "--master_port" in said


# What is compared


def values_of(tree: dict[str, Any]) -> dict[str, str]:
    return agreed_values(tree, torch.device("cpu"))


def test_settings_are_compared_by_field_and_name(tmp_path: Path) -> None:
    tree = tiny_config(tmp_path, tmp_path)
    found = values_of(tree)
    assert found["optimizer.lr"] == "0.001"
    assert found["data.sources.shapes.url"] == str(tmp_path / "train")
    assert found["stages.high.train.steps"] == "10"
    assert found["stages"] == '["low", "high"]'


def test_files_that_settings_name_count_with_what_they_hold(tmp_path: Path) -> None:
    prompts, model = tmp_path / "prompts.txt", tmp_path / "model"
    model.mkdir()
    (model / "config.yaml").write_text("name: a")
    (model / "model.safetensors").write_bytes(bytes(3 << 20))
    tree = {"prompts": prompts, "init": {"source": str(model)}, "out": tmp_path, "engine": {"offload_dir": "/node"}}
    prompts.write_text("a cat")
    before = values_of(tree)
    assert not [name for name in before if name.startswith("out:")]
    assert not [name for name in before if "offload_dir" in name]  # may differ from node to node
    prompts.write_text("a dog")
    (model / "README.md").touch()
    (model / ".nfs01").touch()
    (model / "model.safetensors").write_bytes(bytes((3 << 20) - 1) + b"x")
    after = values_of(tree)
    assert [name for name in before if before[name] != after[name]] == [
        "prompts: prompts.txt",
        "init.source: model.safetensors",
    ]


def test_source_versions_and_variables_that_change_numbers_are_compared(monkeypatch) -> None:
    before = values_of({})
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setattr("launch.rendezvous.installed_versions", lambda: {"numpy": "9"})
    monkeypatch.setattr("launch.rendezvous.source_files", lambda: {"t2i/train/step.py": "f" * 64})
    after = values_of({})
    assert after["variable NVIDIA_TF32_OVERRIDE"] == "1" != before["variable NVIDIA_TF32_OVERRIDE"]
    assert after["version of numpy"] == "9" != before["version of numpy"]
    assert after["source t2i/train/step.py"] != before["source t2i/train/step.py"]
    assert "source launch/train.py" in before and "version of torch" in before
