"""Requests to stop: one, two, and inside a call that does not return."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The package's own __init__ imports torch, which takes seconds.
HEAD = """
import ctypes, sys, time
sys.path.insert(0, "{root}")
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("preemption", "{root}/launch/preemption.py")
module = module_from_spec(spec)
spec.loader.exec_module(module)
preemption, module.SAME_REQUEST_S = module.preemption, 0.5
"""
WAITS = (
    HEAD
    + """
preemption.listen()
print("ready", flush=True)
while preemption.reason is None:
    time.sleep(0.01)
print(preemption.reason, flush=True)
{then}
time.sleep(60)
"""
)
STUCK = (
    HEAD
    + """
preemption.listen()
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
print("ready", flush=True)
libc.pthread_mutex_lock(mutex)  # never returns, and no signal handler of Python's runs
"""
)


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait()


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_one_request_is_noted_and_a_second_ends_the_process(number: signal.Signals) -> None:
    with process(WAITS.format(root=ROOT, then="")) as child:
        child.send_signal(number)
        assert line(child) == f"{number.name} came"
        child.send_signal(signal.SIGTERM)  # a launcher sends it again
        time.sleep(1.0)
        assert child.poll() is None
        child.send_signal(number)
        assert child.wait(10) == 75


def test_a_second_request_ends_a_process_that_is_stuck() -> None:
    with process(STUCK.format(root=ROOT)) as child:
        child.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 75


def test_requests_have_no_effect_after_the_save() -> None:
    with process(WAITS.format(root=ROOT, then="preemption.finish()\nprint('settled', flush=True)")) as child:
        child.send_signal(signal.SIGTERM)
        assert line(child) == "SIGTERM came" and line(child) == "settled"
        time.sleep(0.7)
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(0.5)
        assert child.poll() is None


def test_the_time_limit_is_a_request_and_a_dead_launcher_adds_none() -> None:
    then = "time.sleep(0.7)\npreemption.launcher_died()\nprint('here', flush=True)"
    code = WAITS.format(root=ROOT, then=then).replace(
        "preemption.listen()", "preemption.listen()\npreemption.limit(0.01)"
    )
    with process(code) as child:
        assert line(child) == "timeouts.wall_clock_minutes 0.01 are over"
        assert line(child) == "here"  # it is stopping anyway
        child.send_signal(signal.SIGTERM)  # the scheduler's first signal is not a second request
        time.sleep(0.3)
        assert child.poll() is None


def test_before_listen_a_signal_ends_the_process() -> None:
    with process(WAITS.format(root=ROOT, then="").replace("preemption.listen()", "")) as child:
        child.send_signal(signal.SIGUSR1)
        assert child.wait(10) == -signal.SIGUSR1
