"""How the ranks of a job meet, before their process group.

- Rank 0 keeps a store at the master's address and port; under torchrun its agent does. Each rank registers there.
- Who is still missing is said, soon and again; the end of the wait is a sentence.
- A process of another run, which the port may lead here, is turned away, and a rank that has other settings, another
  source or other versions than rank 0 ends the job on all ranks at once.
- Ranks of an earlier start, which may still be saving, are waited for. A store may also outlive its ranks (torchrun's
  agent restarts them, and counts that by node): each rank 0 names a start of its own, and its keys go below that name.
- The store's own waits print stacks to stderr when they end, and its first contact with what is no store may last for
  ever: so keys are polled, and that contact has a thread.

What must be alike on all ranks of a job: its settings and the files they name, the source, and the versions,
variables and devices that change numbers.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.errors import StoreError, UserError
from t2i.build import choose_dtype
from t2i.config.loading import fields_of
from t2i.source import source_files
from t2i.train.watchdog import name_ranks

PACKAGES = (
    *("torchvision", "deepspeed", "transformers", "tokenizers", "sentencepiece", "safetensors", "numpy", "scipy"),
    *("lpips", "webdataset", "pillow", "simplejpeg", "opencv-python-headless", "pyarrow", "flash-attn"),
)
VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
)
_ENDS = 1 << 20
"""Bytes at the beginning and at the end of a file by which it is known, besides its size."""


def agreed_values(settings: Mapping[str, Any], device: torch.device) -> dict[str, str]:
    """What this rank has, by name, to be compared with the other ranks'.

    Args:
        settings: the job's config or options, as a tree. A value that is a path counts with what a file of this
            path, or a folder with a config, holds.
        device: on which this rank computes.
    """
    values: dict[str, str] = {}
    for name, value in fields_of(dict(settings)).items():
        if name.endswith("engine.offload_dir"):  # of each node
            continue
        values[name] = value if isinstance(value, str) else json.dumps(value, default=str)
        if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
            values |= {f"{name}: {file}": ends for file, ends in _contents(Path(value)).items()}
    values |= {"device": device.type, "engine.dtype auto": str(choose_dtype("auto", device)).removeprefix("torch.")}
    values |= {
        "version of python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "version of torch": torch.__version__,
    }
    values |= {f"version of {name}": _version(name) for name in PACKAGES}
    values |= {f"variable {name}": os.environ.get(name, "not set") for name in VARIABLES}
    return values | {f"source {name}": digest[:12] for name, digest in source_files().items()}


def differences(own: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names of the values that differ, settings first."""
    return [name for name in {**own, **other} if own.get(name) != other.get(name)]


def digest(values: Mapping[str, str]) -> str:
    """One SHA-256 of all values."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _contents(path: Path) -> dict[str, str]:
    """Digests of a file, or of the files in a model's folder, by name; nothing of other folders."""
    try:
        if path.is_file():
            return {path.name: _digest_ends(path)}
        if (path / "config.yaml").is_file() or (path / "config.json").is_file():
            files = (file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith("."))
            return {file.name: _digest_ends(file) for file in files if file.suffix != ".md"}
    except OSError:  # whoever reads it in earnest says so
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


FIRST_WORD_S = 2.0
WORD_S = 30.0
POLL_S = 0.05
CONTACT_S = 60.0
ANSWER_S = 5.0
"""How long the store's first contact may take, and how much longer its thread is waited for."""
HELD_S = 120.0
RETRY_S = 0.5
"""How long another run's ranks, or those of an earlier start, are waited for at the port, and how often it is tried."""
HEARD_S = 30.0
"""How long rank 0 keeps the store for ranks that have not heard why the job ends."""
SHOWN = 4
_PORT = "give each run a port of its own (--master_port of deepspeed and torchrun, else the variable MASTER_PORT)"


@dataclass(frozen=True)
class Place:
    """A rank's place, as its launcher says it."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    @property
    def store(self) -> str:
        return f"{self.address}:{self.port}"


class _HeldError(Exception):
    """What is at the port is not, or not yet, this start; `kin` where it is of the same job and folder."""

    def __init__(self, sentence: str, kin: bool) -> None:
        super().__init__(sentence)
        self.kin = kin


def meet(place: Place, run: Mapping[str, str], values: Mapping[str, str], patience: timedelta) -> dist.Store:
    """Wait until all ranks of this run are here, and return the store in which they met. A collective.

    Args:
        place: this rank's.
        run: what tells this run from others, by name; alike on all its ranks.
        values: what has to be alike on all ranks besides (`agreement.agreed_values`).
        patience: how long to wait for the others.

    Raises:
        UserError: the port stays taken, or leads to another run; or a rank's values differ from rank 0's: then on every
            rank, and the sentence names rank, host, field and both values.
        StoreError: ranks did not come in time, rank 0 is gone, or another start of this run does not leave.
    """
    try:
        return _Rendezvous(place, run, values, patience).meet()
    except dist.DistError as error:
        raise StoreError(f"{place.store}: rank 0, or the launcher that keeps its store, is gone: {error}") from error


class _Rendezvous:
    def __init__(self, place: Place, run: Mapping[str, str], values: Mapping[str, str], patience: timedelta) -> None:
        self.place, self.run, self.values = place, dict(run), dict(values)
        self.host = socket.gethostname()
        self.who = f"rank {place.rank} on {self.host}"
        self._began = time.monotonic()
        self._patience_s = patience.total_seconds()
        self._next_word = self._began + FIRST_WORD_S
        self._here: dict[int, dict[str, str]] = {}
        self._stray = ""
        self._agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def meet(self) -> dist.Store:
        held: _HeldError | None = None
        since, said = 0.0, False
        while True:
            try:
                return self._try()
            except _HeldError as error:
                since = since if held else time.monotonic()
                held = error
            except dist.DistError:
                if held is None:
                    raise  # else its store has gone with the run that held the port
            waited = time.monotonic() - since
            # The agent has one process a rank: a place that is taken is of a start that it has ended.
            patience = self._patience_s if self._agent and held.kin else HELD_S
            if waited >= FIRST_WORD_S and not said and self.place.local_rank == 0:
                said = True
                print(f"{self.who} waits up to {_span(patience)}: {held}", file=sys.stderr, flush=True)
            if waited > patience:
                kin = held.kin or (self.place.rank == 0 and not self._agent and self._is_kin())
                raise (StoreError if kin else UserError)(f"{held} (waited {_span(waited)} for it to leave)")
            time.sleep(RETRY_S)

    def _try(self) -> dist.Store:
        store = self._serve() if self.place.rank == 0 and not self._agent else self._connect()
        self._root = dist.PrefixStore("rendezvous", store)
        verdict = self._gather() if self.place.rank == 0 else self._join()
        if verdict is not None:
            raise {"UserError": UserError, "StoreError": StoreError}[verdict["kind"]](verdict["sentence"])
        return dist.PrefixStore(f"world/{self._start}", store)

    def _enter(self, start: str) -> None:
        self._start, self._here = start, {}
        self.store = dist.PrefixStore(start, self._root)

    # The store

    def _serve(self) -> dist.Store:
        store = self._contact(is_master=True)
        if isinstance(store, dist.Store):
            return store
        if "EADDRINUSE" in store:
            sentence = f"port {self.place.port} of {self.host} is in use, perhaps by another run: {_PORT}"
            raise _HeldError(sentence, kin=False)
        raise UserError(
            f"{self.who} cannot keep the ranks' store at {self.place.store}: {store}; --master_addr has to lead to "
            "this host, and --master_port to be one that may be listened on"
        )

    def _connect(self) -> dist.Store:
        while (fault := self._refusal()) is not None:
            self._wait(lambda: f"rank 0 at {self.place.store} ({fault})")
        store = self._contact(is_master=False)
        if isinstance(store, dist.Store):
            return store
        raise _HeldError(
            f"{self.who} finds another program than rank 0 of its run at {self.place.store} ({store}): {_PORT}",
            kin=False,
        )

    def _is_kin(self) -> bool:
        """Whether a rank 0 of the same job and folder keeps its store at the port that this one was refused."""
        store = self._contact(is_master=False)
        if not isinstance(store, dist.Store):
            return False
        self._root = dist.PrefixStore("rendezvous", store)
        try:
            if not self._root.check(["start"]):
                return False
            self._enter(self._root.get("start").decode())
            return self._same_folder(json.loads(self._card(0)["run"]))
        except dist.DistError:
            return False

    def _same_folder(self, theirs: Mapping[str, str]) -> bool:
        return all(theirs.get(name) == self.run.get(name) for name in ("job", "folder"))

    def _refusal(self) -> str | None:
        try:
            socket.create_connection((self.place.address, self.place.port), timeout=5).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _contact(self, is_master: bool) -> dist.Store | str:
        """The store, or why there is none."""
        made: list[dist.Store | str] = []

        def make() -> None:
            try:
                patience = timedelta(seconds=CONTACT_S)
                address, port = self.place.address, self.place.port
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
                here = self._look()
                if differing := [card["differs"] for card in here.values() if "differs" in card]:
                    raise UserError(differing[0])
                if len(here) == self.place.size:
                    break
                self._say_turned_away()
                self._wait(self._missing)
        except (UserError, StoreError) as error:
            verdict = {"kind": type(error).__name__, "sentence": str(error)}
        self.store.set("verdict", json.dumps(verdict))
        if verdict is not None:
            deadline = time.monotonic() + HEARD_S
            while self.store.add("heard", 0) < self.place.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL_S)
        return verdict

    def _say_turned_away(self) -> None:
        """Say, once, that a process of another run was turned away: it may be one that was meant for this."""
        if not self._stray and self.store.check(["stray"]):
            self._stray = self.store.get("stray").decode()
            print(f"{self.who} {self._stray}", file=sys.stderr, flush=True)

    # The other ranks

    def _join(self) -> dict[str, str] | None:
        while not self._root.check(["start"]):
            self._wait(lambda: f"rank 0 at {self.place.store}")
        self._enter(self._root.get("start").decode())
        first = self._card(0)
        theirs = json.loads(first["run"])
        if other := [name for name in {**theirs, **self.run} if theirs.get(name) != self.run.get(name)]:
            told = "; ".join(f"{name} {theirs.get(name)} there, {self.run.get(name)} here" for name in other)
            self.store.compare_set("stray", "", f"turned away {self.who}, which is of another run ({told})")
            sentence = f"{self.who} met another run at {self.place.store}, on {first['host']} ({told}): {_PORT}"
            raise _HeldError(sentence, self._same_folder(theirs))
        if self._agent and any(self.store.check([key]) for key in ("verdict", str(self.place.rank))):
            raise _HeldError(f"{self.who} met an earlier start of its run at {self.place.store}", kin=True)
        if digest(self.values) != first["digest"]:
            self._register({"differs": self._differing(first)})
        else:
            self._register({})
        while not self.store.check(["verdict"]):
            if self._root.get("start").decode() != self._start:
                return self._join()  # that one's rank 0 had been killed before it could end
            self._wait(self._missing)
        self.store.add("heard", 1)
        verdict: dict[str, str] | None = json.loads(self.store.get("verdict"))
        return verdict

    def _differing(self, first: Mapping[str, str]) -> str:
        zero = json.loads(self.store.get("values"))
        names = differences(self.values, zero)
        told = [f"{name} ({_short(self.values.get(name))} and {_short(zero.get(name))})" for name in names[:SHOWN]]
        told += [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
        return (
            f"{self.who} and rank 0 on {first['host']} differ in {', '.join(told)}: "
            "all ranks need the same settings, source and versions"
        )

    # Both

    def _register(self, more: Mapping[str, str]) -> None:
        """Take this rank's place, unless another process has."""
        own = {"host": self.host, "process": str(os.getpid()), "run": json.dumps(self.run), **more}
        own |= {"digest": digest(self.values), "word": uuid.uuid4().hex}  # containers may share host names and ids
        card = json.dumps(own)
        taken = self.store.compare_set(str(self.place.rank), "", card).decode()
        if taken != card:
            holder = json.loads(taken)
            raise _HeldError(
                f"rank {self.place.rank} at {self.place.store} is process {holder['process']} on {holder['host']} "
                f"already, and process {os.getpid()} on {self.host} comes as the same: was the run started twice? "
                f"{_PORT}",
                kin=True,
            )
        self.store.add("count", 1)

    def _card(self, rank: int) -> dict[str, str]:
        card: dict[str, str] = json.loads(self.store.get(str(rank)))
        return card

    def _look(self) -> Mapping[int, Mapping[str, str]]:
        """The cards of the ranks that are here."""
        if self.store.add("count", 0) > len(self._here):
            coming = [rank for rank in range(self.place.size) if rank not in self._here]
            self._here |= {rank: self._card(rank) for rank in coming if self.store.check([str(rank)])}
        return self._here

    def _missing(self) -> str:
        here = self._look()
        missing = [rank for rank in range(self.place.size) if rank not in here] or [0]  # whose word is waited for
        hosts = ", ".join(f"{count} on {host}" for host, count in Counter(it["host"] for it in here.values()).items())
        return f"{name_ranks(missing)} ({len(missing)} of {self.place.size}) at {self.place.store}; here are {hosts}"

    def _wait(self, what: Callable[[], str]) -> None:
        """Wait a moment for the others; say whom for when it is time. One rank of a host speaks.

        Raises:
            StoreError: they have not come in time.
        """
        time.sleep(POLL_S)
        now = time.monotonic()
        waited = now - self._began
        # Rank 0 ends the wait for all; the others only where they do not hear of it.
        if waited > self._patience_s + (0 if self.place.rank == 0 else HEARD_S):
            stray = f"; it {self._stray}" if self._stray else ""
            raise StoreError(
                f"{self.who} has waited {_span(waited)} for {what()}{stray}: see that all ranks are started, with the "
                "same master's address and port, and that the network lets them through"
            )
        if now >= self._next_word:
            self._next_word = now + WORD_S
            if self.place.local_rank == 0:
                said = f"{self.who}: waiting for {what()}; for {_span(waited)} of {_span(self._patience_s)}"
                print(said, file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _short(value: str | None) -> str:
    text = "none" if value is None else value
    return text if len(text) <= 60 else f"{text[:57]}..."
