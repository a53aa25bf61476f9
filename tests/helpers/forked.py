"""Scripts run as ranks that are forked from a process which has imported what they all import.

Those imports take longer than everything else in a tiny job. This is for tests of what jobs compute; tests of how they
are started, preempted and killed use the real launchers, and an interpreter for each rank.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

ROOT = Path(__file__).parents[2]
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "launch.train",
        "deepspeed.runtime.zero.muon.original_muon",  # whose decorators import torch's compiler
        "transformers.models.bert.modeling_bert",
    ]
)


@dataclass(frozen=True)
class Ended:
    """Exit codes of the ranks, as subprocess has them (None for a rank that timed out), and the output of all."""

    codes: list[int | None]
    stdout: str
    stderr: str


def run_forked(script: Path, words: list[str], ranks: int, timeout_s: float = 400.0) -> Ended:
    """Run a script to its end on several ranks, with the environment that this process has now."""
    # A pool of threads would not survive a fork.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()
    common = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(_CONTEXT.Process(target=_be_rank, args=(script, words, common | own, outputs)))
            processes[-1].start()
        deadline = time.monotonic() + timeout_s
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return Ended(codes, *(path.read_text() for path in outputs))


def _be_rank(script: Path, words: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
