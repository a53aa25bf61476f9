"""Checkpoints under a bad star: full, read-only and failing disks, late and dead ranks. Training goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_cuts import cut, ema_of

from t2i.engine.checkpoint import Checkpoint, CheckpointWriter, checkpoints, newest, writer
from t2i.engine.checkpoint.writer import Snapshot
from t2i.engine.engine import Shard

Ranks = list[CheckpointWriter]


def make(folder: Path, ranks: int = 2, **options: Any) -> Ranks:
    """Writers of all ranks in one process: rank 0 hears what the others said last, once."""
    said: dict[int, Any] = {}

    def gather(rank: int, item: Any) -> list[Any]:
        if rank:
            said[rank] = item
            return [item]
        return [item, *(said.pop(other) for other in list(said))]

    writers = []
    for rank in range(ranks):
        common = {"rank": rank, "world_size": ranks, "attempt_id": "x", "keep": 2, "gather": partial(gather, rank)}
        writers.append(CheckpointWriter(folder, **{**common, **options}))
    return writers


def save(writers: Ranks, step: int, **options: Any) -> None:
    for one, shards in zip(writers, cut(len(writers)), strict=True):
        assert one.save(step, shards, ema_of(shards), {"step": step}, **options).started


def finish(writers: Ranks) -> int | None:
    for one in reversed(writers):
        committed = one.wait()  # rank 0's last
    return committed


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints(folder)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_named_and_the_next_save_tries_again(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    writers = make(folder)
    save(writers, 1)
    assert finish(writers) == 1
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    save(writers, 2)
    assert finish(writers) == 1
    events = writers[0].take_events()
    assert any(event.startswith("checkpoint of step 2 was not written: rank ") for event in events)
    assert any(event.endswith("No space left on device; that of step 1 stays") for event in events)
    assert newest(folder) == (folder / "step_00000001", [])
    assert os.listdir(folder) == ["step_00000001"]  # nothing half-written takes up room
    ballast.unlink()
    save(writers, 3)
    assert finish(writers) == 3
    assert writers[0].take_events() == []
    assert newest(folder) == (folder / "step_00000003", [])


def test_a_read_only_disk_is_named_and_the_next_save_tries_again(small_disk: Path) -> None:
    writers = make(small_disk)
    save(writers, 1)
    assert finish(writers) == 1
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    save(writers, 2)
    assert finish(writers) == 1
    assert {event.split(": ")[1] for event in writers[0].take_events()} == {"rank 0", "rank 1"}
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    save(writers, 3)
    assert finish(writers) == 3
    assert steps(small_disk) == [1, 3]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["write", "fsync"])
def test_one_rank_that_cannot_write_is_named_by_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, where: str
) -> None:
    writers = make(tmp_path, ranks=3)
    save(writers, 1)
    assert finish(writers) == 1
    write = Snapshot.write

    def fails(self: Snapshot, path: Path) -> tuple[str, int]:
        if path.name != f"rank_{rank:05d}.safetensors":
            return write(self, path)
        if where == "fsync":
            write(self, path)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "write", fails)
        began = time.monotonic()
        save(writers, 2)
        assert finish(writers) == 1
        assert time.monotonic() - began < 5  # not the time limit: rank 0 was told
    (event,) = writers[0].take_events()
    assert f"rank {rank}: [Errno 5] Input/output error" in event
    save(writers, 2)  # the same step again
    assert finish(writers) == 2
    assert newest(tmp_path) == (tmp_path / "step_00000002", [])


def test_a_rank_that_cannot_even_report_is_known_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks as threads, with a real exchange: rank 1's disk is gone, rank 0's is not."""
    barrier, items = threading.Barrier(2), [None, None]
    outcomes: dict[int, list[Any]] = {0: [], 1: []}

    def exchange(rank: int, item: Any) -> list[Any]:
        items[rank] = item
        barrier.wait(20)
        everything = list(items)
        barrier.wait(20)
        return everything

    writers = make(tmp_path)
    for rank, one in enumerate(writers):
        one._gather = lambda item, rank=rank: exchange(rank, item)
    broken = threading.Event()
    broken.set()
    mkdir = Path.mkdir

    def fails(self: Path, *args: Any, **kwargs: Any) -> None:
        if threading.current_thread().name == "checkpoint" and current[threading.get_ident()] == 1 and broken.is_set():
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
        mkdir(self, *args, **kwargs)

    current: dict[int, int] = {}
    run = CheckpointWriter._run

    def noted(self: CheckpointWriter, job: Any) -> None:
        current[threading.get_ident()] = self.rank
        run(self, job)

    monkeypatch.setattr(CheckpointWriter, "_run", noted)
    monkeypatch.setattr(Path, "mkdir", fails)
    monkeypatch.setattr(Path, "touch", lambda *_: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))

    def train(rank: int) -> None:
        shards = cut(2)[rank]
        for step in (1, 2, 3):
            saving = writers[rank].save(step, shards, ema_of(shards), {}, may_skip=True)
            outcomes[rank].append(saving.started)
            time.sleep(0.5)
            if step == 2:
                broken.clear()
        outcomes[rank].append(writers[rank].wait())

    threads = [threading.Thread(target=train, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # At step 2 rank 0 was still waiting for rank 1's report, and heard that there would be none.
    assert outcomes == {0: [True, False, True, 3], 1: [True, False, True, 3]}
    assert [one.skipped for one in writers] == [1, 1]
    events = " | ".join(writers[0].take_events())
    assert "rank 1: [Errno 116] Stale file handle" in events
    assert "checkpoint of step 1 was not written: rank 1: failed" in events
    assert "checkpoint of step 2 skipped" in events


def test_a_late_rank_ends_the_wait_but_not_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "COMMIT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(writer, "GIVE_UP_S", 0.1)
    writers = make(tmp_path)
    shards = cut(2)[0]
    writers[0].save(1, shards, ema_of(shards), {})
    assert writers[0].wait() is None
    assert "rank 1: not done after 0.2 s" in writers[0].take_events()[0]
    assert os.listdir(tmp_path) == []
    late = cut(2)[1]
    writers[1].save(1, late, ema_of(late), {})
    writers[1].wait()
    writers[0].save(1, shards, ema_of(shards), {})  # the same step: what came late is not taken for its part
    assert writers[0].wait() is None
    assert checkpoints(tmp_path) == []


def test_a_save_that_overtakes_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (release.wait(20), fsync(fd)))
    (one,) = make(tmp_path, ranks=1)
    (shards,) = cut(1)
    before = shards["a"].param.clone()
    assert one.save(1, shards, ema_of(shards), {}, may_skip=True).started
    shards["a"].param.add_(1)
    for step in (2, 3):
        saving = one.save(step, shards, ema_of(shards), {}, may_skip=True)
        assert not saving.started and saving.stall_s < 1
    assert one.skipped == 2
    assert one.take_events() == [
        f"checkpoint of step {step} skipped: the one before is still being written" for step in (2, 3)
    ]
    release.set()
    assert one.save(4, shards, ema_of(shards), {}).started  # this one waits
    assert one.wait() == 4
    assert steps(tmp_path) == [1, 4]
    params = {"a": torch.empty_like(before)}
    for step, expected in ((1, before), (4, before + 1)):
        Checkpoint(tmp_path / f"step_{step:08d}").read(shards, {"param": params})
        assert torch.equal(params["a"], expected)


def test_the_buffer_is_made_once(tmp_path: Path) -> None:
    (one,) = make(tmp_path, ranks=1)
    (shards,) = cut(1)
    one.allocate(shards, ema_of(shards))
    place = one._snapshot._buffer.data_ptr()
    for step in (1, 2):
        save([one], step)
    finish([one])
    assert one._snapshot._buffer.data_ptr() == place
    assert one._snapshot._buffer.numel() == 3 * (70 + 3)


def test_only_the_primary_of_equal_slices_saves(tmp_path: Path) -> None:
    writers = make(tmp_path)
    for rank, one in enumerate(writers):
        value = torch.full((3,), float(rank))
        shards = {"a": Shard(torch.Size([3]), 0, value, {}, is_primary=rank == 1)}
        one.save(1, shards, {"a": value}, {})
    assert finish(writers) == 1
    found = torch.zeros(3)
    Checkpoint(tmp_path / "step_00000001").read({"a": Shard(torch.Size([3]), 0, found, {})}, {"param": {"a": found}})
    assert found.tolist() == [1, 1, 1]
    silent = Checkpoint(tmp_path / "step_00000001").manifest["parts"][0]
    assert silent["slices"] == {} and silent["bytes"] == 16  # a header of {}


KILLED = """
import sys, os, time
from pathlib import Path
from shard_cuts import cut, ema_of
from t2i.engine.checkpoint import CheckpointWriter

folder, moment = Path(sys.argv[1]), sys.argv[2]
writers = [CheckpointWriter(folder, rank=r, world_size=2, attempt_id="old", keep=1) for r in range(2)]
def save(step):
    for one, shards in zip(writers, cut(2)):
        one.save(step, shards, ema_of(shards), {"step": step})
save(1)
[one.wait() for one in writers]
def hang(*_):
    os.write(1, b"hanging\\n")
    time.sleep(60)
if moment == "in a part":
    os.fsync = hang
elif moment == "before the manifest":
    CheckpointWriter._wait_for_reports = hang
elif moment == "before the rename":
    import t2i.engine.checkpoint.writer as writer
    writer.commit = hang
elif moment == "in retention":
    import shutil
    remove = shutil.rmtree
    def half(path, *args, **kwargs):
        if path.name.endswith(".dropped"):
            (path / "rank_00000.safetensors").unlink()
            hang()
        remove(path, *args, **kwargs)
    shutil.rmtree = half
save(2)
time.sleep(60)
"""


@pytest.mark.parametrize("moment", ["in a part", "before the manifest", "before the rename", "in retention"])
def test_after_sigkill_in_a_save_the_last_good_one_is_used(tmp_path: Path, moment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), moment], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "hanging\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    good = 2 if moment == "in retention" else 1
    assert newest(tmp_path) == (tmp_path / f"step_{good:08d}", [])
    assert len(os.listdir(tmp_path)) == 2  # what was under way has a dot in front
    writers = make(tmp_path)
    save(writers, 3)
    assert finish(writers) == 3
    assert sorted(os.listdir(tmp_path)) == [f"step_{good:08d}", "step_00000003"]


def test_ranks_agree_on_what_is_skipped_and_wait_for_no_disk(tmp_path: Path, launch: Any) -> None:
    outcome = launch(Path(__file__).with_name("checkpoint_worker.py"), 2, str(tmp_path))
    begun = outcome["begun"]
    assert 2 <= len(begun) < 15 and begun[0] == 1 and begun[-1] == 30
    assert outcome["skipped"] == [30 - len(begun)] * 2
    assert outcome["events"] == 30 - len(begun)
    assert outcome["there"] == begun
    assert outcome["committed"] == [30, 30]
    assert outcome["stall_s"] < 0.2  # one fsync of rank 1, of which a save has several
