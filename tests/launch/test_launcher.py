"""A rank stops when a launcher above it dies, and ends at once if that happened before it could watch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import os, sys, time
sys.path.insert(0, {root!r})
time.sleep({before})
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("launcher", {root!r} + "/launch/preemption.py")
launcher = module_from_spec(spec)
spec.loader.exec_module(launcher)
launcher.watch_launcher(lambda: os._exit(1))
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(rank.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("before", [0.0, 2.0])
@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_rank_ends_with_its_launcher(tmp_path: Path, name: str, before: float) -> None:
    (tmp_path / name).write_text(LAUNCHER)
    code = RANK.format(root=str(ROOT), before=before)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / name), code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "1"},
    )
    assert process.stdout is not None
    rank = int(process.stdout.readline())
    time.sleep(1.0)  # it watches by now, or, if it waits, does not yet
    assert is_running(rank)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while is_running(rank):
        assert time.monotonic() < deadline, "the rank outlived its launcher"
        time.sleep(0.05)


def test_a_process_that_no_launcher_started_is_left_alone() -> None:
    code = RANK.format(root=str(ROOT), before=0.0)
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "LOCAL_RANK": "0"})
    time.sleep(1.5)
    assert process.poll() is None
    process.kill()
    process.wait()
