"""From the launcher's environment to a `World`, and from an exception to one sentence and an exit code.

Works alike under `deepspeed`, `torchrun` and plain `python` (one process). Also warns of a GPU that a job on the CPU
overlooks, which otherwise costs days before anybody notices.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import re
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from data.errors import BAD_INPUT, DONE, EXIT_RESUMABLE, FAILED, StoreError, UserError, first_of
from launch.preemption import launchers
from t2i.distributed import World

RANK_0_FIRST_S = 3.0
_NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Cannot allocate memory|bad_alloc|size calculation overflow", re.IGNORECASE
)
_ASKED_FOR = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (\w+)", re.IGNORECASE)
_OF_SAFETENSORS = re.compile(r"\(os error \d+\)")
"""safetensors' errors of a disk, which are not OSErrors."""
_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Faults of the machine, even if a job raises a UserError from them to name the option or file."""


def run_to_end(job: Callable[[], None], advice: str = "", rank: int = 0, store_code: int = FAILED) -> int:
    """Run a job and return its exit code, with one sentence on stderr unless that is 0.

    2 is a user's mistake, 1 a fault of the machine (disk, memory, a file that cannot be opened), 130 an interruption,
    and 141 a closed output. Any other exception is raised.

    Args:
        job: what to run.
        advice: ends the sentence on a fault or an interruption: what to do then.
        rank: of this process. Rank 0 speaks first, and its launcher ends the others; a rank whose error rank 0 does not
            share speaks RANK_0_FIRST_S later.
        store_code: the exit code of a StoreError.
    """
    try:
        job()
        sys.stdout.flush()
        return DONE
    except (UserError, StoreError) as error:
        cause = error.__cause__
        code = BAD_INPUT if isinstance(error, UserError) else store_code
        if isinstance(cause, OSError) and cause.errno in _EXHAUSTED:
            code = FAILED
        words = str(error) + (advice if code != BAD_INPUT else "")
    except KeyboardInterrupt:
        if rank == 0:
            print(f"interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # a pager or `head` has closed the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports it at exit
        return 141
    except Exception as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        code, words = FAILED, fault + advice
    if rank > 0:
        time.sleep(RANK_0_FIRST_S)
    print(f"error{f' on rank {rank}' if rank else ''}: {' '.join(words.split())}", file=sys.stderr)
    return code


def machine_fault(error: Exception) -> str | None:
    """The sentence on an error of the machine (its disks, files, memory or processes), or None for any other error."""
    words = str(error)
    if isinstance(error, BrokenProcessPool):
        return "a process was killed, perhaps because it used too much memory"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(words):
        asked = _ASKED_FOR.search(words)
        if asked is None:
            return "out of memory"
        amount = f"{int(asked[1]) / 2**30:,.1f} GiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
        return f"out of memory: tried to allocate {amount} at once"
    if isinstance(error, OSError):
        if error.strerror is None:
            return words or type(error).__name__
        return f"{error.filename or 'a file cannot be read or written'}: {error.strerror}"
    return words.partition("\n")[0] if _OF_SAFETENSORS.search(words) else None


_SIGNS = (
    "proc/driver/nvidia/version",
    "dev/nvidiactl",
    "dev/nvidia[0-9]*",
    "dev/dxg",  # GPUs under Windows' Linux
    "dev/kfd",  # AMD's
)
_NVIDIA = "0x10de"


def gpu_signs(root: Path = Path("/")) -> list[str]:
    """Files, devices and programs that suggest that this machine has a GPU."""
    found = [f"/{path.relative_to(root)}" for sign in _SIGNS for path in sorted(root.glob(sign))]
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        kind = vendor.with_name("class")
        if vendor.read_text().strip() == _NVIDIA and kind.exists() and kind.read_text().startswith("0x03"):
            found.append(f"the PCI device {vendor.parent.name}")
    if (tool := shutil.which("nvidia-smi")) is not None:
        found.append(tool)
    return found


def why_no_gpu() -> str:
    """Why PyTorch finds no GPU, as far as is known, and what to do."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built for CPUs alone: install a build for this machine's GPUs"
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and not torch.cuda.device_count():
        return f"CUDA_VISIBLE_DEVICES is {hidden!r}, which may hide it: unset it, or ask the scheduler for GPUs"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"PyTorch {torch.__version__} says: {' '.join(str(error).split())}"
    return f"PyTorch {torch.__version__} does not say why"


def warn_of_overlooked_gpu(signs: list[str]) -> None:
    """Warn, in a banner on stderr, that a job runs on the CPU despite these signs of a GPU, if there are any."""
    if not signs:
        return
    bar = "!" * 80
    print(
        f"{bar}\nON THE CPU, though a GPU seems to be there ({first_of(signs, 3)}).\n{why_no_gpu()}.\n{bar}",
        file=sys.stderr,
    )


@contextmanager
def joined_world(
    settings: Mapping[str, Any] = MappingProxyType({}), patience: timedelta = timedelta(minutes=30)
) -> Iterator[World]:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs) and leave the process group at the end.

    Args:
        settings: the job's config or options, which must be the same on all ranks.
        patience: how long to wait for the other ranks, here and in each collective.

    Raises:
        UserError: the ranks' settings differ, or the port is taken (`rendezvous.meet`).
        StoreError: a rank has not come in time.
    """
    with redirect_stdout(io.StringIO()):
        import deepspeed

        from launch.rendezvous import (  # imports the networks, which not every job needs
            RankAddress,
            agreed_values,
            meet,
        )

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
    # On GPUs the host's threads decode images, and each would start a team of its own: give each one core.
    cores = len(os.sched_getaffinity(0)) // local_size
    if local_size == 1:  # with several ranks torchrun sets OMP_NUM_THREADS to 1, whatever the machine has
        cores = int(os.environ.get("OMP_NUM_THREADS", cores))
    torch.set_num_threads(1 if device.type == "cuda" else max(1, cores))
    backend = "nccl" if device.type == "cuda" else "gloo"
    store: dist.Store = dist.HashStore()
    if size > 1:
        own = RankAddress(rank, size, local_rank, address, port)
        values = agreed_values({name: value for name, value in settings.items() if name != "local_rank"}, device)
        store = meet(own, _identity(settings, size, local_size), values, patience)
    bound = device if size > 1 and device.type == "cuda" else None
    dist.init_process_group(backend, timeout=patience, world_size=size, rank=rank, store=store, device_id=bound)
    with redirect_stdout(io.StringIO()):
        # DeepSpeed's collective over shared memory is for inference only, and compiling it takes minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, timeout=patience, verbose=False)
    cpu_group: Any = dist.new_group(backend="gloo", timeout=patience) if backend == "nccl" else None
    try:
        yield World(rank, size, device, cpu_group, local_size)
    finally:
        gc.collect()  # engines hold process groups in cycles; one that is freed at exit may abort the process
        try:
            dist.destroy_process_group()
        except dist.DistError as error:  # another rank is gone: report it, and keep this rank's own error
            print(f"rank {rank}: {error}", file=sys.stderr)


def _identity(settings: Mapping[str, Any], size: int, local_size: int) -> dict[str, str]:
    """What distinguishes this job from others at the same port; ranks on one node also share their launcher."""
    folder = f"{settings['root']}/{settings['name']}" if "root" in settings else str(settings.get("out") or "none")
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if size == local_size and (found := launchers()):
        launch = f"{launch}, process {found[0][0]} on {socket.gethostname()} (started {found[0][1]})"
    return {"job": Path(sys.argv[0]).name, "folder": folder, "ranks": str(size), "launcher": launch}


def quiet(rank: int) -> None:
    """Silence stdout on all ranks but 0, and the libraries' own warnings."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|deepspeed|transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def main(job: Callable[[], None]) -> None:
    """Run a job as one rank (`run_to_end`), and exit with its code; EXIT_RESUMABLE where ranks or stores failed."""
    rank = int(os.environ.get("RANK", "0"))
    quiet(rank)
    if code := run_to_end(job, rank=rank, store_code=EXIT_RESUMABLE):
        sys.exit(code)
