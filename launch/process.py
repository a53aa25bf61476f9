"""From the launcher's environment to a `World`, and from an exception to one sentence and an exit code.

Works alike under `deepspeed`, `torchrun` and plain `python` (one process).
"""

from __future__ import annotations

import gc
import io
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from launch.ending import run_to_end
from launch.launcher import launchers
from launch.overlooked import gpu_signs, warn_of_overlooked_gpu
from launch.rendezvous import Place, meet
from t2i.train.outcome import code_of
from t2i.train.processes import World


@contextmanager
def joined_world(
    settings: Mapping[str, Any] = MappingProxyType({}), patience: timedelta = timedelta(minutes=30)
) -> Iterator[World]:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs) and leave them again.

    Args:
        settings: the job's config or options, which have to be alike on all ranks.
        patience: how long to wait for the other ranks, here and in each collective.

    Raises:
        UserError: the ranks differ, or the port is taken (`rendezvous.meet`).
        StoreError: some rank did not come.
    """
    with redirect_stdout(io.StringIO()):
        import deepspeed

        from launch.agreement import agreed_values  # imports the networks, which not every job needs

    rank = int(os.environ.setdefault("RANK", "0"))
    size = int(os.environ.setdefault("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    address = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.setdefault("MASTER_PORT", "29500"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where weights are fp32
    else:
        device = torch.device("cpu")
        if local_rank == 0:
            warn_of_overlooked_gpu(gpu_signs())
    # Of GPU runs the host threads decode, and each opens a team of its own: leave them a core each.
    cores = len(os.sched_getaffinity(0)) // local_size
    if local_size == 1:  # torchrun sets it to 1 where there are several, whatever the machine has
        cores = int(os.environ.get("OMP_NUM_THREADS", cores))
    torch.set_num_threads(1 if device.type == "cuda" else max(1, cores))
    backend = "nccl" if device.type == "cuda" else "gloo"
    store: dist.Store = dist.HashStore()
    if size > 1:
        place = Place(rank, size, local_rank, address, port)
        values = agreed_values({name: it for name, it in settings.items() if name != "local_rank"}, device)
        store = meet(place, _identity(settings, size, local_size), values, patience)
    bound = device if size > 1 and device.type == "cuda" else None
    dist.init_process_group(backend, timeout=patience, world_size=size, rank=rank, store=store, device_id=bound)
    with redirect_stdout(io.StringIO()):
        # Its collective over shared memory serves inference alone, and would be compiled for minutes first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, timeout=patience, verbose=False)
    hosts: Any = dist.new_group(backend="gloo", timeout=patience) if backend == "nccl" else None
    try:
        yield World(rank, size, device, hosts)
    finally:
        gc.collect()  # engines hold process groups in cycles; one that dies with the interpreter may abort it
        try:
            dist.destroy_process_group()
        except dist.DistError as error:  # of a rank that is gone; what ended this one counts
            print(f"rank {rank}: {error}", file=sys.stderr)


def _identity(settings: Mapping[str, Any], size: int, local_size: int) -> dict[str, str]:
    """What tells this job from others that may meet at the same port. Where all ranks are of one node, they also have
    one launcher, if any."""
    folder = f"{settings['root']}/{settings['name']}" if "root" in settings else str(settings.get("out") or "none")
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if size == local_size and (found := launchers()):
        launch = f"{launch}, process {found[0][0]} on {socket.gethostname()} (started {found[0][1]})"
    return {"job": Path(sys.argv[0]).name, "folder": folder, "ranks": str(size), "launcher": launch}


def quiet(rank: int) -> None:
    """Only rank 0 speaks, and libraries do not warn about themselves."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|deepspeed|transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def main(job: Callable[[], None]) -> None:
    """Run a job; a user's mistake ends it with one sentence and exit code 2, what another start gets over with 75, a
    fault of the machine with 1."""
    rank = int(os.environ.get("RANK", "0"))
    quiet(rank)
    if code := run_to_end(job, rank=rank, code_of=code_of):
        sys.exit(code)
