"""From the launcher's environment to a `World`, and from an exception to one sentence and an exit code.

Works alike under `deepspeed`, `torchrun` and plain `python` (one process).

How a job ends: what an exception becomes on stderr, and which exit code follows.

Whether a job works on the CPU though a GPU seems to be there: days are lost before that is noticed.
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
from jsonargparse import ArgumentError

from data.errors import BAD_INPUT, DONE, FAILED, StoreError, UserError
from launch.preemption import launchers
from launch.rendezvous import Place, meet
from t2i.distributed import World, run_exit_code

RANK_0_FIRST_S = 3.0
_NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Cannot allocate memory|bad_alloc|size calculation overflow", re.IGNORECASE
)
_ASKED_FOR = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (\w+)", re.IGNORECASE)
_OF_SAFETENSORS = re.compile(r"\(os error \d+\)")
"""Its errors of a disk, which are no OSError."""
_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""No mistake of the user's, also where a job says which option's file met it."""


def job_exit_code(error: Exception) -> int:
    """The exit code of a user's mistake, and of a fault that outlasted its retries."""
    return BAD_INPUT if isinstance(error, UserError | ArgumentError) else FAILED


def run_to_end(
    job: Callable[[], None], advice: str = "", rank: int = 0, exit_code: Callable[[Exception], int] = job_exit_code
) -> int:
    """Run a job and return the exit code, with one sentence on stderr unless it is 0.

    A fault of the machine (disk, memory, a file that cannot be opened) is 1, an interruption 130, and a reader of the
    output that has gone 141. What nobody foresaw is raised.

    Args:
        job: what is to be done.
        advice: what to do after a fault or an interruption; ends the sentence.
        rank: of this process. Rank 0 speaks, and its launcher ends the others; what it does not know of, another rank
            says later.
        exit_code: the exit code of a UserError, ArgumentError or StoreError, unless it tells of a machine's fault.
    """
    try:
        job()
        sys.stdout.flush()
        return DONE
    except (UserError, ArgumentError, StoreError) as error:
        cause = error.__cause__
        code = FAILED if isinstance(cause, OSError) and cause.errno in _EXHAUSTED else exit_code(error)
        words = str(error) + (advice if code != BAD_INPUT else "")
    except KeyboardInterrupt:
        if rank == 0:
            print(f"interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # a pager or `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tells of it at its end
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
    """What to say of an error that is the machine's: of its disks, files, memory or processes; None: it is not."""
    words = str(error)
    if isinstance(error, BrokenProcessPool):
        return "a process was killed, perhaps for its memory"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(words):
        asked = _ASKED_FOR.search(words)
        if asked is None:
            return "the memory is not enough"
        many = f"{int(asked[1]) / 2**30:,.1f} GiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
        return f"the memory is not enough: {many} were asked for at once"
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
    """What says that this machine has a GPU or the driver of one."""
    found = [f"/{path.relative_to(root)}" for sign in _SIGNS for path in sorted(root.glob(sign))]
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        kind = vendor.with_name("class")
        if vendor.read_text().strip() == _NVIDIA and kind.exists() and kind.read_text().startswith("0x03"):
            found.append(f"the PCI device {vendor.parent.name}")
    if (tool := shutil.which("nvidia-smi")) is not None:
        found.append(tool)
    return found


def why_no_gpu() -> str:
    """Why PyTorch finds none, and what to do, as far as it can be told."""
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
    """Say it loudly on stderr, in a job that is about to work on the CPU; nothing where nothing speaks of a GPU."""
    if not signs:
        return
    shown = ", ".join(signs[:3]) + (f" and {len(signs) - 3} more signs" if len(signs) > 3 else "")
    bar = "!" * 80
    print(f"{bar}\nON THE CPU, though a GPU seems to be there ({shown}).\n{why_no_gpu()}.\n{bar}", file=sys.stderr)


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

        from launch.rendezvous import agreed_values  # imports the networks, which not every job needs

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
    cpu_group: Any = dist.new_group(backend="gloo", timeout=patience) if backend == "nccl" else None
    try:
        yield World(rank, size, device, cpu_group, local_size)
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
    if code := run_to_end(job, rank=rank, exit_code=run_exit_code):
        sys.exit(code)
