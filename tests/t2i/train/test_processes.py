"""One writer a run, and what rank 0 says to the others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from t2i.distributed import RunInUseError, RunLock, World

HOLD = """
import sys, time
from pathlib import Path
from data.errors import UserError
from t2i.distributed import RunLock
lock = RunLock(Path(sys.argv[1]), "word")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_start_names_the_holder_and_gets_the_run_when_it_dies(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunInUseError, match=f"process {holder.pid} on {socket.gethostname()} .word."):
        RunLock(tmp_path / "run", "word", patience_s=0.1)
    holder.kill()
    holder.wait()
    RunLock(tmp_path / "run", "word", patience_s=0.1).release()


def test_a_second_start_waits_for_a_holder_that_is_leaving(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    began = time.monotonic()
    RunLock(tmp_path / "run", "word", patience_s=20).release()
    assert time.monotonic() - began > 0.3
    assert killer.wait() == 0


def test_a_root_that_cannot_hold_a_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="root .*file.*cannot be written"):
        RunLock(tmp_path / "file" / "runs" / "a", "word")


def test_folders_made_for_the_lock_alone_go_with_it(tmp_path: Path) -> None:
    RunLock(tmp_path / "runs" / "a", "word").release()
    assert list(tmp_path.iterdir()) == []
    lock = RunLock(tmp_path / "runs" / "a", "word")
    (tmp_path / "runs" / "a" / "metrics.jsonl").touch()
    lock.release()
    assert (tmp_path / "runs" / "a" / "metrics.jsonl").exists()


def test_what_rank_0_raises_is_raised() -> None:
    world = World(0, 1, torch.device("cpu"))
    assert world.broadcast_from_rank0(os.getpid) == os.getpid()
    with pytest.raises(ZeroDivisionError):
        world.broadcast_from_rank0(lambda: 1 // 0)
    assert world.gather("item") == ["item"]


def test_a_mistake_that_one_rank_meets_is_raised_on_all() -> None:
    class Two(World):
        def gather(self, item: Any) -> list[Any]:
            return [item, UserError("of the other")]

    def fail() -> None:
        raise UserError("its own")

    two, work = Two(0, 2, torch.device("cpu")), list[str]()
    with pytest.raises(UserError, match="of the other"):
        two.raise_on_all_ranks(lambda: work.append("done"))
    assert work == ["done"]
    with pytest.raises(UserError, match="its own"):
        two.raise_on_all_ranks(fail)
    assert World(0, 1, torch.device("cpu")).raise_on_all_ranks(os.getpid) == os.getpid()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_out_all_of_it_as_neighbours(ranks: int) -> None:
    shares = [World(rank, ranks, torch.device("cpu")).split_for_rank(range(7)) for rank in range(ranks)]
    assert [item for share in shares for item in share] == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
