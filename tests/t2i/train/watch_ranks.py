"""For test_watch: runs of a few ranks that come to different ends. Usage: watch_ranks.py FOLDER

All cases run at once, since they mostly wait. Each has its folder, with stderr in rank_N.err; the exit codes of every
case's ranks are printed (-9: killed, as everyone is who is still there at last).
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data.errors import UserError
from t2i.config.train import TimeoutsConfig
from t2i.distributed import World
from t2i.train import watchdog as failures_module
from t2i.train import watchdog as watch_module
from t2i.train.watchdog import Failures, Watchdog, set_collective_timeouts, slowest

STEP_S = 3.0
FOR_EVER_S = 3600.0
LAST_S = 60.0
"""When everyone left is killed."""


def total(world: World) -> None:
    """Every rank takes part, or should."""
    dist.all_reduce(torch.ones(1))


def asleep() -> None:
    """A rank that never comes back."""
    time.sleep(FOR_EVER_S)


def healthy(world: World, watchdog: Watchdog) -> None:
    """Each step is shorter than what is allowed, all of them together are not, and the first is longer."""
    time.sleep(1.5 * STEP_S)
    watchdog.step_done()
    for step in range(2, 6):
        watchdog.heartbeat(f"step {step}")
        time.sleep(STEP_S / 3)
        total(world)
    found = slowest(world, (1.0, 5.0, 2.0)[world.rank])
    assert found == {"rank_s_max": 5.0, "rank_s_median": 2.0, "slowest_rank": 1}, found


def suspended(world: World, watchdog: Watchdog) -> None:
    """Stopped for longer than is allowed; the script below lets it go on."""
    watchdog.step_done()
    time.sleep(0.5)  # the watch has seen the last sign
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)


def sleeps(world: World, watchdog: Watchdog) -> None:
    """Rank 1 hangs in Python, the others in a collective."""
    watchdog.step_done()
    watchdog.heartbeat("step 2")
    asleep() if world.rank == 1 else total(world)


def sleeps_at_start(world: World, watchdog: Watchdog) -> None:
    """Rank 0 hangs before any step is done."""
    watchdog.start("building")
    asleep() if world.rank == 0 else total(world)


def disagree(world: World, watchdog: Watchdog) -> None:
    """Each rank waits in another collective."""
    watchdog.step_done()
    dist.barrier(world.cpu_group) if world.rank == 1 else total(world)


def stopped(world: World, watchdog: Watchdog) -> None:
    """Rank 1 is stopped."""
    watchdog.step_done()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    total(world)


def stopped_first(world: World, watchdog: Watchdog) -> None:
    """Rank 0 is stopped, and the store with it."""
    watchdog.step_done()
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    total(world)


def holds_lock(world: World, watchdog: Watchdog) -> None:
    """Rank 1 never gives the interpreter's lock back."""
    watchdog.step_done()
    time.sleep(1)  # for the watch's first round
    ctypes.PyDLL(None).sleep(int(FOR_EVER_S)) if world.rank == 1 else total(world)


def raises(world: World, watchdog: Watchdog) -> None:
    """Rank 1 fails while rank 0 is in a collective and rank 2 hangs."""
    watchdog.step_done()
    if world.rank == 1:
        raise KeyError("odd")
    asleep() if world.rank == 2 else total(world)


def raises_first(world: World, watchdog: Watchdog) -> None:
    """Rank 0 fails, and the store goes with it, while rank 1 hangs."""
    watchdog.step_done()
    if world.rank == 0:
        raise UserError("lr must be positive")
    asleep()


def killed(world: World, watchdog: Watchdog) -> None:
    """Rank 1 dies without a word."""
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    total(world)


def killed_first(world: World, watchdog: Watchdog) -> None:
    """Rank 0 dies without a word, and the store with it, while rank 2 hangs."""
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    asleep() if world.rank == 2 else total(world)


def times_out(world: World, watchdog: Watchdog) -> None:
    """The watch allows more than a collective of either group takes."""
    set_collective_timeouts(timedelta(seconds=1))
    if world.rank == 0:
        try:
            total(world)
        except RuntimeError:
            dist.barrier(world.cpu_group)
    else:
        time.sleep(4)


CASES: dict[Callable[[World, Watchdog], None], int] = {
    healthy: 3,
    suspended: 1,
    sleeps: 3,
    sleeps_at_start: 2,
    disagree: 2,
    stopped: 3,
    stopped_first: 2,
    holds_lock: 2,
    raises: 3,
    raises_first: 2,
    killed: 2,
    killed_first: 3,
    times_out: 2,
}
CANNOT_LEAVE = {"stopped": 1, "stopped_first": 0, "holds_lock": 1}
"""Ranks that are killed when the others have left; rank 1 of the last once its stacks are there."""


def play(case: Callable[[World, Watchdog], None], folder: Path, rank: int, size: int, listener: socket.socket) -> None:
    """What a rank's process does; rank 0 holds the store."""
    errors = os.open(folder / f"rank_{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    for module, name, seconds in (
        (failures_module, "POLL_S", 0.1),
        (watch_module, "TICK_S", 0.1),
        (watch_module, "GRACE_S", 2.0),
        (watch_module, "TIMER_MARGIN_S", 3.0),
    ):
        assert hasattr(module, name)
        setattr(module, name, seconds)
    port = listener.getsockname()[1]
    patience = timedelta(seconds=2 * LAST_S)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", port, size, True, patience, master_listen_fd=listener.detach())
    else:
        listener.close()
        store = dist.TCPStore("127.0.0.1", port, size, False, patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    world = World(rank, size, torch.device("cpu"), dist.new_group(backend="gloo", timeout=patience))
    dist.barrier()
    limits = TimeoutsConfig(start_minutes=2 * STEP_S / 60, step_minutes=STEP_S / 60)
    code = 0
    with Failures(world) as failures:
        watchdog = Watchdog(failures, limits, folder / "stacks", "attempt")
        try:
            world.barrier()  # all are connected
            case(world, watchdog)
            world.barrier()
            watchdog.close()
            time.sleep(1.5 * STEP_S)
            world.barrier()
        except Exception as error:
            failure = failures.report(error)
            print(failure, file=sys.stderr)
            code = failure.code
    dist.destroy_process_group()
    sys.exit(code)


def main(folder: Path) -> None:
    """Start every case's ranks and print how they ended."""
    ranks: dict[int, tuple[str, int]] = {}
    for case, size in CASES.items():
        (folder / case.__name__).mkdir()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            for rank in range(size):
                if (pid := os.fork()) == 0:
                    return play(case, folder / case.__name__, rank, size, listener)
                ranks[pid] = (case.__name__, rank)
    codes: dict[str, list[int | None]] = {case.__name__: [None] * size for case, size in CASES.items()}
    began = time.monotonic()
    resume_at: dict[int, float] = {}
    while ranks:
        for pid, (name, rank) in list(ranks.items()):
            changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if changed and os.WIFSTOPPED(status):
                if name == "suspended":
                    resume_at[pid] = time.monotonic() + 2 * STEP_S
            elif changed:
                codes[name][rank] = os.waitstatus_to_exitcode(status)
                del ranks[pid]
            elif time.monotonic() > began + LAST_S or (
                CANNOT_LEAVE.get(name) == rank
                and codes[name].count(None) == 1
                and (name != "holds_lock" or (folder / name / f"rank_{rank}.err").stat().st_size)
            ):
                os.kill(pid, signal.SIGKILL)
            elif time.monotonic() > resume_at.get(pid, math.inf):
                os.kill(pid, signal.SIGCONT)
                del resume_at[pid]
        time.sleep(0.05)
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
