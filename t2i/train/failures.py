"""What ends a run on one rank is told to all the others.

- A notice board in the store through which the ranks met. Unlike a collective it needs no other rank's attention: it
  can be written to while the others hang. The first notice stands, and carries the exit code that all ranks leave with.
- The first rank to leave takes the others with it: its launcher ends them, and with rank 0 the store may go. So
  whoever leaves waits until all ranks have taken note, for a few seconds at most.
- The store's calls know no time-out while its host is stopped or its machine is gone. Only a thread of their own ever
  makes them; whoever asks is answered within bounds.
- When a rank dies the others' collectives fail. That is a consequence, and not reported before its cause had time.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import asdict, dataclass, replace
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from data.errors import StoreError, UserError
from t2i.exit_codes import START_AGAIN
from t2i.train.outcome import Departed, code_of
from t2i.train.processes import World

POLL_S = 0.5
CAUSE_S = 5.0
"""How long a consequence waits for its cause to be posted."""
POST_S = 5.0
"""How long a post waits for the store; a rank that is not heard goes by its own notice."""
ANSWER_S = 5.0
"""How long a rank that leaves waits for the others to take note."""
_NOTICE, _ANSWERS = "notice", "answers"


@dataclass(frozen=True)
class Failure:
    """What ended the run."""

    rank: int
    """Where it happened, or was noticed."""
    code: int
    """The exit code of every rank."""
    message: str
    hang: bool = False
    """Whether training stood still, so that every rank shows its stacks."""

    def __str__(self) -> str:
        return f"error on rank {self.rank}: {self.message}"


def is_lost_contact(error: BaseException) -> bool:
    """Whether an exception tells of another rank's death or silence, and not of a fault here.

    All errors of NCCL and of the store count, since they cannot be told apart, and those of gloo's connections.
    """
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and re.search(r"gloo/(transport|rendezvous)/", str(error)) is not None


class Failures:
    """The ranks' notice board. The default process group must be there; a world of one has no use for the store.

    A context manager: it ends the thread that listens.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.first: Failure | None = None
        """What ended the run; None while nothing has."""
        self.leaving = False
        """Whether this rank's main thread has met an error, and is on its way out."""
        self._known, self._wake, self._settled = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._posted: Failure | None = None
        self._reported: Failure | None = None
        self._answering = self._answered = self._closed = False
        self._absent: list[int] = []
        self._listener: threading.Thread | None = None
        if world.size > 1:
            # A connection of its own, since a call on one waits for the call before it.
            self._store = dist.PrefixStore("failures", _get_default_store().clone())
            self._listener = threading.Thread(target=self._listen, name="failures", daemon=True)
            self._listener.start()
        else:
            self._settled.set()

    def __enter__(self) -> Failures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the listening thread; one that a mute store holds is left behind.

        While it listens, the end of rank 0's process is a failure: at a run's good end a barrier comes first.
        """
        self._closed = True
        self._wake.set()
        if self._listener is not None:
            self._listener.join(POST_S)

    def post(self, failure: Failure) -> Failure:
        """Tell all ranks, unless something was told before; return what was told first.

        Never waits longer than POST_S; if the store is mute or gone, this rank goes by its own notice.
        """
        if self._listener is None:
            return self._find(failure)
        self._posted = failure
        self._wake.set()
        self._known.wait(POST_S)
        return self._find(failure)

    def answer(self, within_s: float) -> list[int]:
        """Say that this rank has taken note of `first`, and wait until every rank has, or none can be asked any more.

        Returns:
            Ranks that did not answer; known to rank 0 and to the rank that posted, empty on others.
        """
        self._answering = True
        self._wake.set()
        return [] if self._settled.wait(within_s) else self._absent

    def report(self, error: Exception) -> Failure:
        """Tell all ranks of an exception that ends this one; the main thread calls it before it cleans up.

        Args:
            error: what this rank met. Lost contact with another rank is START_AGAIN.

        Returns:
            What is to be shown, and whose exit code is to be taken: the cause, where `error` is a consequence.
            Takes some seconds if other ranks are dead. Once told, further calls change nothing.
        """
        if self._reported is not None:
            return self._reported
        self.leaving = True
        plain = isinstance(error, UserError | StoreError | Departed)
        told = str(error) if plain else f"{type(error).__name__}: {error}"
        failure = Failure(self.world.rank, code_of(error), told)
        if is_lost_contact(error):
            self._known.wait(CAUSE_S)
            failure = Failure(self.world.rank, START_AGAIN, f"lost contact with another rank: {error}")
        self.post(failure)
        self._reported = self.conclude()
        return self._reported

    def conclude(self) -> Failure:
        """`first`, once all ranks have taken note of it or ANSWER_S are over; it then names those that did not."""
        absent = self.answer(ANSWER_S)
        assert self.first is not None
        told = f"; no answer from {name_ranks(absent)}" if absent else ""
        return replace(self.first, message=self.first.message + told)

    def _find(self, failure: Failure) -> Failure:
        with self._lock:
            if self.first is None:
                self.first = failure
                self._known.set()
            return self.first

    def _listen(self) -> None:
        try:
            while not self._closed and not self._settled.is_set():
                self._exchange()
                self._wake.wait(POLL_S)
                self._wake.clear()
        except dist.DistError:
            gone = Failure(0, START_AGAIN, "the process is gone, or its launcher: nobody answers at the ranks' store")
            self._find(self._posted or gone)
            self._settled.set()

    def _exchange(self) -> None:
        """One round with the store."""
        if self.first is None:
            if self._posted is not None:
                told = self._store.compare_set(_NOTICE, "", json.dumps(asdict(self._posted)))
            elif self._store.check([_NOTICE]):
                told = self._store.get(_NOTICE)
            else:
                return
            self._find(Failure(**json.loads(told)))
        if self._answering and not self._settled.is_set():
            self._await_answers()

    def _await_answers(self) -> None:
        rank, size = self.world.rank, self.world.size
        if not self._answered:
            self._store.set(f"{_ANSWERS}/{rank}", "")
            self._store.add(_ANSWERS, 1)
            self._answered = True
        if self._store.add(_ANSWERS, 0) >= size:
            self._settled.set()
        elif self.first is not None and rank in (0, self.first.rank):
            self._absent = [other for other in range(size) if not self._store.check([f"{_ANSWERS}/{other}"])]


def name_ranks(ranks: list[int]) -> str:
    named = ", ".join(str(rank) for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"
