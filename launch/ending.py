"""How a job ends: what an exception becomes on stderr, and which exit code follows."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

from jsonargparse import ArgumentError

from data.errors import StoreError, UserError
from t2i.exit_codes import BAD_INPUT, DONE, FAILED

RANK_0_FIRST_S = 3.0
_NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Cannot allocate memory|bad_alloc|size calculation overflow", re.IGNORECASE
)
_ASKED_FOR = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (\w+)", re.IGNORECASE)
_OF_SAFETENSORS = re.compile(r"\(os error \d+\)")
"""Its errors of a disk, which are no OSError."""
_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""No mistake of the user's, also where a job says which option's file met it."""


def code_of(error: Exception) -> int:
    """The exit code of a user's mistake, and of a fault that outlasted its retries."""
    return BAD_INPUT if isinstance(error, UserError | ArgumentError) else FAILED


def run_to_end(
    job: Callable[[], None], advice: str = "", rank: int = 0, code_of: Callable[[Exception], int] = code_of
) -> int:
    """Run a job and return the exit code, with one sentence on stderr unless it is 0.

    A fault of the machine (disk, memory, a file that cannot be opened) is 1, an interruption 130, and a reader of the
    output that has gone 141. What nobody foresaw is raised.

    Args:
        job: what is to be done.
        advice: what to do after a fault or an interruption; ends the sentence.
        rank: of this process. Rank 0 speaks, and its launcher ends the others; what it does not know of, another rank
            says later.
        code_of: the exit code of a UserError, ArgumentError or StoreError, unless it tells of a machine's fault.
    """
    try:
        job()
        sys.stdout.flush()
        return DONE
    except (UserError, ArgumentError, StoreError) as error:
        cause = error.__cause__
        code = FAILED if isinstance(cause, OSError) and cause.errno in _EXHAUSTED else code_of(error)
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
