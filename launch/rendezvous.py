"""How the ranks of a job meet before their process group starts, and check that they run the same job.

- Rank 0 keeps a store at the master's address and port; under torchrun its agent does. Each rank registers there.
- While ranks are missing, their names are printed, soon and then regularly; a wait that ends in vain is one sentence.
- A process of another run that comes to this port is turned away. A rank whose settings, source or versions differ
  from those of rank 0 ends the job on all ranks at once.
- Ranks of an earlier start, which may still be saving, are waited for. A store may also outlive its ranks (torchrun's
  agent restarts them, and counts restarts by node), so each rank 0 gives its start an id, the prefix of its keys.
- torch's own wait on a store prints stacks when it times out, and connecting to a port that is not a store may block
  without end: keys are polled instead, and the connection is made on a thread.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.errors import StoreError, UserError, first_of, shortened
from t2i.build import choose_dtype
from t2i.config.loading import fields_of
from t2i.source import installed_versions, source_files
from t2i.train.watchdog import name_ranks

VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
)
"""Environment variables that change numbers."""
_ENDS = 1 << 20
"""Bytes at the beginning and at the end of a file that, with its size, identify it."""


def agreed_values(settings: Mapping[str, Any], device: torch.device) -> dict[str, str]:
    """What must be the same on all ranks, by name: settings, source, versions, variables and the kind of device.

    Args:
        settings: the job's config or options, as a tree. A value that is the path of a file, or of a model's folder,
            counts with the files' contents.
        device: on which this rank computes.
    """
    values: dict[str, str] = {}
    for name, value in fields_of(dict(settings)).items():
        if name.endswith("engine.offload_dir"):  # may differ from node to node
            continue
        values[name] = value if isinstance(value, str) else json.dumps(value, default=str)
        if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
            values |= {f"{name}: {file}": ends for file, ends in _contents(Path(value)).items()}
    values |= {"device": device.type, "engine.dtype auto": str(choose_dtype("auto", device)).removeprefix("torch.")}
    exact = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "torch": torch.__version__}
    values |= {f"version of {name}": version for name, version in (installed_versions() | exact).items()}
    values |= {f"variable {name}": os.environ.get(name, "not set") for name in VARIABLES}
    return values | {f"source {name}": digest[:12] for name, digest in source_files().items()}


def _digest(values: Mapping[str, str]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _contents(path: Path) -> dict[str, str]:
    """Digests of a file, or of the files of a model's folder, by name; of other folders nothing."""
    try:
        if path.is_file():
            return {path.name: _digest_ends(path)}
        if (path / "config.yaml").is_file() or (path / "config.json").is_file():
            files = (file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith("."))
            return {file.name: _digest_ends(file) for file in files if file.suffix != ".md"}
    except OSError:  # reported where the file is read
        pass
    return {}


def _digest_ends(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = sha256(file.read(_ENDS))
        if size > _ENDS:
            file.seek(max(_ENDS, size - _ENDS))
            ends.update(file.read(_ENDS))
    return f"{size} bytes, {ends.hexdigest()[:12]}"


FIRST_REPORT_S, REPORT_S = 2.0, 30.0
"""Seconds until a wait is first reported, and between reports."""
POLL_S = 0.05
CONTACT_S, ANSWER_S = 60.0, 5.0
"""Seconds in which torch has to connect to the store, and that its thread gets on top."""
PORT_TAKEN_S, RETRY_S = 120.0, 0.5
"""Seconds that ranks of another run, or of an earlier start, have to leave the port, and between attempts."""
VERDICT_S = 30.0
"""Seconds that rank 0 keeps the store for ranks that have not yet read why the job ends."""
_PORT = "give each run a port of its own (--master_port of deepspeed and torchrun, else the variable MASTER_PORT)"


@dataclass(frozen=True)
class RankAddress:
    """A rank and the address of the store, from the launcher's variables."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    @property
    def store(self) -> str:
        return f"{self.address}:{self.port}"


class _PortTaken(Exception):
    """The port leads elsewhere than to this start; `same_job` if to another start with the same job and folder."""

    def __init__(self, sentence: str, same_job: bool) -> None:
        super().__init__(sentence)
        self.same_job = same_job


def meet(own: RankAddress, run: Mapping[str, str], values: Mapping[str, str], patience: timedelta) -> dist.Store:
    """Wait until all ranks of this run have come, and return the store in which they met. A collective.

    Args:
        own: this rank's address.
        run: what distinguishes this run from others, by name; the same on all its ranks.
        values: what else must be the same on all ranks (`agreed_values`).
        patience: how long to wait for the others.

    Raises:
        UserError: the port stays taken or leads to another run; or a rank's values differ from those of rank 0, which
            is raised on every rank, with rank, host, field and both values.
        StoreError: ranks did not come in time, rank 0 is gone, or an earlier start of this run does not leave.
    """
    try:
        return _Rendezvous(own, run, values, patience).meet()
    except dist.DistError as error:
        raise StoreError(f"{own.store}: rank 0, or the launcher that keeps its store, is gone: {error}") from error


class _Rendezvous:
    def __init__(
        self, own: RankAddress, run: Mapping[str, str], values: Mapping[str, str], patience: timedelta
    ) -> None:
        self.own, self.run, self.values = own, dict(run), dict(values)
        self.host = socket.gethostname()
        self.who = f"rank {own.rank} on {self.host}"
        self._began = time.monotonic()
        self._patience_s = patience.total_seconds()
        self._next_report = self._began + FIRST_REPORT_S
        self._entries: dict[int, dict[str, str]] = {}
        self._turned_away = ""
        self._agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def meet(self) -> dist.Store:
        taken: _PortTaken | None = None
        since, reported = 0.0, False
        while True:
            try:
                return self._try()
            except _PortTaken as error:
                since = since if taken else time.monotonic()
                taken = error
            except dist.DistError:
                if taken is None:
                    raise  # otherwise the store has gone with the run that had the port
            waited = time.monotonic() - since
            # The agent starts one process a rank: whoever has this rank is of a start that the agent has ended.
            patience = self._patience_s if self._agent and taken.same_job else PORT_TAKEN_S
            if waited >= FIRST_REPORT_S and not reported and self.own.local_rank == 0:
                reported = True
                print(f"{self.who} waits up to {_span(patience)}: {taken}", file=sys.stderr, flush=True)
            if waited > patience:
                same_job = taken.same_job or (self.own.rank == 0 and not self._agent and self._port_has_same_job())
                raise (StoreError if same_job else UserError)(f"{taken} (waited {_span(waited)} for it to leave)")
            time.sleep(RETRY_S)

    def _try(self) -> dist.Store:
        store = self._serve() if self.own.rank == 0 and not self._agent else self._connect()
        self._root = dist.PrefixStore("rendezvous", store)
        verdict = self._gather() if self.own.rank == 0 else self._join()
        if verdict is not None:
            raise {"UserError": UserError, "StoreError": StoreError}[verdict["kind"]](verdict["sentence"])
        return dist.PrefixStore(f"world/{self._start}", store)

    def _enter(self, start: str) -> None:
        self._start, self._entries = start, {}
        self.store = dist.PrefixStore(start, self._root)

    # The store

    def _serve(self) -> dist.Store:
        store = self._contact(is_master=True)
        if isinstance(store, dist.Store):
            return store
        if "EADDRINUSE" in store:
            sentence = f"port {self.own.port} of {self.host} is in use, perhaps by another run: {_PORT}"
            raise _PortTaken(sentence, same_job=False)
        raise UserError(
            f"{self.who} cannot keep the ranks' store at {self.own.store}: {store}; --master_addr has to lead to "
            "this host, and --master_port to be one that may be listened on"
        )

    def _connect(self) -> dist.Store:
        while (fault := self._refusal()) is not None:
            self._wait(lambda: f"rank 0 at {self.own.store} ({fault})")
        store = self._contact(is_master=False)
        if isinstance(store, dist.Store):
            return store
        raise _PortTaken(
            f"{self.who} finds another program than rank 0 of its run at {self.own.store} ({store}): {_PORT}",
            same_job=False,
        )

    def _port_has_same_job(self) -> bool:
        """Whether the port in use is the store of another start with the same job and folder."""
        store = self._contact(is_master=False)
        if not isinstance(store, dist.Store):
            return False
        self._root = dist.PrefixStore("rendezvous", store)
        try:
            if not self._root.check(["start"]):
                return False
            self._enter(self._root.get("start").decode())
            return self._is_same_job(json.loads(self._entry(0)["run"]))
        except dist.DistError:
            return False

    def _is_same_job(self, theirs: Mapping[str, str]) -> bool:
        return all(theirs.get(name) == self.run.get(name) for name in ("job", "folder"))

    def _refusal(self) -> str | None:
        try:
            socket.create_connection((self.own.address, self.own.port), timeout=5).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _contact(self, is_master: bool) -> dist.Store | str:
        """The store, or why it cannot be reached or served."""
        made: list[dist.Store | str] = []

        def make() -> None:
            try:
                patience = timedelta(seconds=CONTACT_S)
                address, port = self.own.address, self.own.port
                store = dist.TCPStore(address, port, is_master=is_master, timeout=patience, wait_for_workers=False)
                store.set_timeout(timedelta(seconds=self._patience_s))
                made.append(store)
            except (dist.DistError, ValueError) as error:
                made.append(str(error).partition("\n")[0])

        thread = threading.Thread(target=make, daemon=True)
        thread.start()
        thread.join(CONTACT_S + ANSWER_S)
        return made[0] if made else "it does not answer"

    # Rank 0

    def _gather(self) -> dict[str, str] | None:
        self._enter(uuid.uuid4().hex)
        self.store.set("values", json.dumps(self.values))
        self._register({})
        self._root.set("start", self._start)
        verdict: dict[str, str] | None = None
        try:
            while True:
                entries = self._read_entries()
                if differing := [entry["differs"] for entry in entries.values() if "differs" in entry]:
                    raise UserError(differing[0])
                if len(entries) == self.own.size:
                    break
                self._report_turned_away()
                self._wait(self._missing)
        except (UserError, StoreError) as error:
            verdict = {"kind": type(error).__name__, "sentence": str(error)}
        self.store.set("verdict", json.dumps(verdict))
        if verdict is not None:
            deadline = time.monotonic() + VERDICT_S
            while self.store.add("heard", 0) < self.own.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL_S)
        return verdict

    def _report_turned_away(self) -> None:
        """Print, once, that a process of another run was turned away: it may have been meant for this run."""
        if not self._turned_away and self.store.check(["turned_away"]):
            self._turned_away = self.store.get("turned_away").decode()
            print(f"{self.who} {self._turned_away}", file=sys.stderr, flush=True)

    # The other ranks

    def _join(self) -> dict[str, str] | None:
        while not self._root.check(["start"]):
            self._wait(lambda: f"rank 0 at {self.own.store}")
        self._enter(self._root.get("start").decode())
        first = self._entry(0)
        theirs = json.loads(first["run"])
        if other := [name for name in {**theirs, **self.run} if theirs.get(name) != self.run.get(name)]:
            shown = "; ".join(f"{name} {theirs.get(name)} there, {self.run.get(name)} here" for name in other)
            self.store.compare_set("turned_away", "", f"turned away {self.who}, which is of another run ({shown})")
            sentence = f"{self.who} met another run at {self.own.store}, on {first['host']} ({shown}): {_PORT}"
            raise _PortTaken(sentence, self._is_same_job(theirs))
        if self._agent and any(self.store.check([key]) for key in ("verdict", str(self.own.rank))):
            raise _PortTaken(f"{self.who} met an earlier start of its run at {self.own.store}", same_job=True)
        self._register({} if _digest(self.values) == first["digest"] else {"differs": self._differing(first)})
        while not self.store.check(["verdict"]):
            if self._root.get("start").decode() != self._start:
                return self._join()  # the rank 0 of that start was killed before it could end the start
            self._wait(self._missing)
        self.store.add("heard", 1)
        verdict: dict[str, str] | None = json.loads(self.store.get("verdict"))
        return verdict

    def _differing(self, first: Mapping[str, str]) -> str:
        zero = json.loads(self.store.get("values"))
        shown = [
            f"{name} ({shortened(self.values.get(name, 'none'), 60)} and {shortened(zero.get(name, 'none'), 60)})"
            for name in {**self.values, **zero}  # settings first
            if self.values.get(name) != zero.get(name)
        ]
        return (
            f"{self.who} and rank 0 on {first['host']} differ in {first_of(shown)}: "
            "all ranks need the same settings, source and versions"
        )

    # Both

    def _register(self, more: Mapping[str, str]) -> None:
        """Enter this rank into the store, unless another process is entered as the same rank."""
        own = {"host": self.host, "process": str(os.getpid()), "run": json.dumps(self.run), **more}
        own |= {"digest": _digest(self.values), "nonce": uuid.uuid4().hex}  # containers may share host names and ids
        entry = json.dumps(own)
        entered = self.store.compare_set(str(self.own.rank), "", entry).decode()
        if entered != entry:
            holder = json.loads(entered)
            raise _PortTaken(
                f"rank {self.own.rank} at {self.own.store} is taken by process {holder['process']} on "
                f"{holder['host']}; process {os.getpid()} on {self.host} has the same rank: was the run started "
                f"twice? {_PORT}",
                same_job=True,
            )
        self.store.add("count", 1)

    def _entry(self, rank: int) -> dict[str, str]:
        entry: dict[str, str] = json.loads(self.store.get(str(rank)))
        return entry

    def _read_entries(self) -> Mapping[int, Mapping[str, str]]:
        """The entries of the ranks that have come, by rank."""
        if self.store.add("count", 0) > len(self._entries):
            missing = [rank for rank in range(self.own.size) if rank not in self._entries]
            self._entries |= {rank: self._entry(rank) for rank in missing if self.store.check([str(rank)])}
        return self._entries

    def _missing(self) -> str:
        entries = self._read_entries()
        # Where none is missing, rank 0 has to say so.
        missing = [rank for rank in range(self.own.size) if rank not in entries] or [0]
        counts = Counter(entry["host"] for entry in entries.values())
        hosts = ", ".join(f"{count} on {host}" for host, count in counts.items())
        return f"{name_ranks(missing)} ({len(missing)} of {self.own.size}) at {self.own.store}; here are {hosts}"

    def _wait(self, what: Callable[[], str]) -> None:
        """Sleep for a moment; report what is waited for when that is due, on one rank of each host.

        Raises:
            StoreError: the patience is over.
        """
        time.sleep(POLL_S)
        now = time.monotonic()
        waited = now - self._began
        # Rank 0 ends the wait for all ranks; the others end it themselves only if its verdict does not reach them.
        if waited > self._patience_s + (0 if self.own.rank == 0 else VERDICT_S):
            turned_away = f"; it {self._turned_away}" if self._turned_away else ""
            raise StoreError(
                f"{self.who} has waited {_span(waited)} for {what()}{turned_away}: see that all ranks are started, "
                "with the same master's address and port, and that the network lets them through"
            )
        if now >= self._next_report:
            self._next_report = now + REPORT_S
            if self.own.local_rank == 0:
                report = f"{self.who}: waiting for {what()}; for {_span(waited)} of {_span(self._patience_s)}"
                print(report, file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
