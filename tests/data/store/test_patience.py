"""What a store waits for, how long, and what it says meanwhile: credentials to come, bodies that drip, servers gone."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

import data.store.base
import data.store.s3_client
from data.errors import DataError, StoreError
from data.store import StoreOptions, open_store
from data.store.base import Fault, Retries


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Retries, "_FIRST_S", 0.001)
    monkeypatch.setattr(Retries, "_CAP_S", 0.01)
    monkeypatch.setattr(data.store.base, "_last_warning", float("-inf"))


@pytest.fixture
def serving() -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler], None]], str]]:
    """`serving(answer)` makes a server that answers every request so, and returns its URL."""
    servers = []

    def start(answer: Callable[[BaseHTTPRequestHandler], None]) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer(self)

            do_PUT = do_GET

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


# --- credentials ---


@pytest.fixture
def bare(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The endpoint, with no credentials configured."""
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bucket")
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_DEFAULT_REGION"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return endpoint


class Metadata:
    """A metadata service of an instance with a role; fails for its first `failing` requests."""

    ROLE = "/latest/meta-data/iam/security-credentials/"

    def __init__(self, failing: float = 0, seconds: float = 0) -> None:
        self.failing, self.seconds, self.requests = failing, seconds, list[str]()

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(request.path)
        time.sleep(self.seconds)
        keys = {"AccessKeyId": "ASIA", "SecretAccessKey": "s", "Token": "t", "Expiration": "2099-01-01T00:00:00Z"}
        said = {"/latest/api/token": "token", self.ROLE: "role", f"{self.ROLE}role": json.dumps(keys)}
        fails = len(self.requests) <= self.failing
        body = b"" if fails else said[request.path].encode()
        request.send_response(500 if fails else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


def test_a_metadata_service_that_fails_for_a_while(
    bare: str, serving: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Metadata(failing=16)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", serving(service))
    store, kinds = open_store("s3://bucket/role", StoreOptions(endpoint=bare)), list[str]()
    assert not service.requests, "opening a store asks nothing"
    with pytest.raises(DataError, match="does not exist"):
        store.read("a", on_fault=kinds.append)
    assert kinds == ["credentials"] * 3  # 4 requests each and our own; the 17th is a second attempt
    asked = len(service.requests)
    store.write("a", b"x")
    assert store.read("a") == b"x"
    assert len(service.requests) == asked, "credentials are kept"


def test_threads_ask_a_metadata_service_once(
    bare: str, serving: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Metadata(failing=float("inf"), seconds=0.1)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", serving(service))
    store = open_store("s3://bucket/threads", StoreOptions(endpoint=bare, retry_minutes=0))
    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(store.list) for _ in range(16)]
        assert all(isinstance(call.exception(), DataError) for call in calls)
    assert len(service.requests) in (5, 10), "5 an attempt; a thread that was late makes one of its own"
    service.failing = 0
    service.requests.clear()
    with ThreadPoolExecutor(16) as pool:
        assert [call.result() for call in [pool.submit(store.list) for _ in range(16)]] == [[]] * 16
    assert len(service.requests) == 3


def test_a_metadata_service_that_goes_on_failing(
    bare: str, serving: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data.store.s3_client._CREDENTIALS_MINUTES == 1
    monkeypatch.setattr(data.store.s3_client, "_CREDENTIALS_MINUTES", 0.01)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", serving(Metadata(failing=float("inf"))))
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"listing s3://bucket/p at .*credentials; configure boto3's"):
        open_store("s3://bucket/p", StoreOptions(endpoint=bare)).list()
    assert 0.6 <= time.monotonic() - begin < 5
    with pytest.raises(DataError, match="configure boto3's"):
        open_store("s3://bucket/p", StoreOptions(endpoint=bare, retry_minutes=0)).list()


def test_nothing_that_could_give_credentials_is_said_soon(
    bare: str, closed_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = data.store.s3_client
    assert 2 * client._METADATA_ATTEMPTS * client._METADATA_TIMEOUT_S + client._PROBE_S <= 10
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", closed_port)
    store, kinds, begin = open_store("s3://bucket/p", StoreOptions(endpoint=bare)), list[str](), time.monotonic()
    with pytest.raises(DataError, match="^source s3://bucket/p at [^ ]*: there are no credentials; configure boto3's"):
        store.read("a", on_fault=kinds.append)
    assert time.monotonic() - begin < 2 and not kinds


def test_a_metadata_service_that_is_switched_off_is_left_alone(
    bare: str, serving: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Metadata()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", serving(service))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match="there are no credentials"):
        open_store("s3://bucket/p", StoreOptions(endpoint=bare)).list()
    assert not service.requests


@pytest.mark.parametrize(("status", "passing"), [(404, False), (403, False), (401, True), (429, True), (503, True)])
def test_a_metadata_service_without_a_role_is_not_waited_for(
    bare: str, serving: Callable[..., str], monkeypatch: pytest.MonkeyPatch, status: int, passing: bool
) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", "0")
        request.end_headers()

    monkeypatch.setattr(data.store.s3_client, "_CREDENTIALS_MINUTES", 0.001)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", serving(answer))
    kinds: list[str] = []
    with pytest.raises(DataError, match="configure boto3's"):
        open_store("s3://bucket/p", StoreOptions(endpoint=bare)).read("a", on_fault=kinds.append)
    assert set(kinds) == ({"credentials"} if passing else set())


def test_a_metadata_service_that_accepts_and_is_mute_is_waited_for(bare: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_METADATA_TIMEOUT_S", "_METADATA_ATTEMPTS"):
        monkeypatch.setattr(data.store.s3_client, name, 1)
    monkeypatch.setattr(data.store.s3_client, "_PROBE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        kinds: list[str] = []
        with pytest.raises(DataError, match="configure boto3's"):
            open_store("s3://bucket/p", StoreOptions(endpoint=bare, retry_minutes=0)).read("a", on_fault=kinds.append)
    assert kinds == ["credentials"]


def test_the_users_own_patience_with_the_metadata_service_may_be_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def patience() -> tuple[int, int]:
        session = data.store.s3_client.open_session("here", StoreOptions())
        return tuple(session.get_config_variable(f"metadata_service_{name}") for name in ("num_attempts", "timeout"))

    monkeypatch.delenv("AWS_METADATA_SERVICE_TIMEOUT", raising=False)
    assert patience() == (2, 2)
    monkeypatch.setenv("AWS_METADATA_SERVICE_TIMEOUT", "7")
    monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "1")
    assert patience() == (2, 7)


def test_a_provider_that_fails_once(bare: str, tmp_path: Path) -> None:
    keys = json.dumps({"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s"})
    script = tmp_path / "provider"
    script.write_text(f"#!/bin/sh\n[ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; exit 1; }}\necho '{keys}'\n")
    script.chmod(0o700)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {script}\n")
    kinds: list[str] = []
    store = open_store("s3://bucket/p", StoreOptions(endpoint=bare))
    with pytest.raises(DataError, match="does not exist"):
        store.read("a", on_fault=kinds.append)
    assert kinds == ["credentials"]


# --- bodies that drip ---


def dripping(content: bytes, piece: int, seconds: float, requests: int) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answers GET with ranges; the first `requests` of them in pieces of so many bytes, each after so long."""
    seen: list[int] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        start = int((request.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        seen.append(start)
        request.send_response(206)
        request.send_header("Content-Length", str(len(content) - start))
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("ETag", '"v"')
        request.end_headers()
        slow = len(seen) <= requests
        try:
            for at in range(start, len(content), piece if slow else len(content)):
                request.wfile.write(content[at : at + piece] if slow else content[at:])
                time.sleep(seconds if slow else 0)
        except OSError:
            request.close_connection = True  # the client gave it up

    answer.seen = seen
    return answer


CONTENT = bytes(range(256)) * 1024


def test_a_dripping_body_is_a_stall_and_goes_on_elsewhere(endpoint: str, serving: Callable[..., str]) -> None:
    answer: Any = dripping(CONTENT, 1, 0.02, requests=2)
    store = open_store("s3://bucket/p", StoreOptions(endpoint=serving(answer), read_timeout_s=0.3))
    kinds: list[str] = []
    begin = time.monotonic()
    assert store.read("a", on_fault=kinds.append) == CONTENT
    assert kinds == ["timeout"] * 2 and time.monotonic() - begin < 3
    assert 0 < answer.seen[1] < answer.seen[2] < 100, "what dripped in is kept"


def test_a_body_that_only_drips_is_given_up(endpoint: str, serving: Callable[..., str]) -> None:
    url = serving(dripping(CONTENT, 10 << 10, 0.2, requests=999))  # 50 KiB a second, but 100 in two of them
    store = open_store("s3://bucket/p", StoreOptions(endpoint=url, read_timeout_s=1, retry_minutes=0.03))
    with pytest.raises(StoreError, match=r"reading s3://bucket/p/a .*: only \d+ bytes in 1 s"):
        store.read("a")


def test_a_slow_body_that_is_fast_enough_is_read(endpoint: str, serving: Callable[..., str]) -> None:
    answer: Any = dripping(CONTENT, 16 << 10, 0.1, requests=1)  # 64 KiB in 0.4 s; 1.6 s in all
    store = open_store("s3://bucket/p", StoreOptions(endpoint=serving(answer), read_timeout_s=1.2, retry_minutes=0))
    assert store.read("a") == CONTENT and len(answer.seen) == 1


def test_the_last_bytes_may_come_late(endpoint: str, serving: Callable[..., str]) -> None:
    answer: Any = dripping(CONTENT[:3], 1, 0.2, requests=1)
    store = open_store("s3://bucket/p", StoreOptions(endpoint=serving(answer), read_timeout_s=0.3, retry_minutes=0))
    assert store.read("a") == CONTENT[:3]


# --- what is said meanwhile ---


def test_faults_that_go_on_are_told_once(
    endpoint: str, closed_port: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert data.store.base._SILENT_S == 3
    monkeypatch.setattr(data.store.base, "_SILENT_S", 0.2)
    monkeypatch.setattr(data.store.base.random, "uniform", lambda low, high: high / 2)
    store: Any = open_store("s3://bucket/p", StoreOptions(endpoint=closed_port, retry_minutes=0.02))
    assert store._client, "it takes a while to make"
    with caplog.at_level(logging.WARNING, "data"):
        with pytest.raises(StoreError):
            store.read("a.tar")
        with pytest.raises(StoreError):
            store.read("b.tar")
    (said,) = [record.getMessage() for record in caplog.records if record.name == "data.store.base"]
    assert said.startswith(f"reading s3://bucket/p/a.tar at {closed_port}: Could not connect")
    assert said.endswith("; trying again, for up to 0.02 minutes without progress")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", lambda _: None)


def failing(retries: Retries, clock: Clock, faults: list[tuple[float, Fault | None]]) -> None:
    """Meet these faults, or progress, each so many seconds after the one before, and succeed."""
    left = iter(faults)

    def attempt() -> None:
        for seconds, fault in left:
            clock.now += seconds
            if fault:
                raise OSError(fault)
            retries.progress()

    retries.run(attempt, (OSError,), lambda error: error.args[0])


def test_a_call_warns_once_and_a_process_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, broken = Clock(monkeypatch), Fault("broken", "reset")

    def said() -> list[str]:
        words = [record.getMessage().partition(":")[0] for record in caplog.records]
        caplog.clear()
        return words

    failing(Retries("a", 10), clock, [(50, broken), (2.9, broken)])
    assert said() == [], "faults of a moment are not told, however long the first took"
    failing(Retries("a", 10), clock, [(0, broken), (2, None), (2, broken), (2, None), (2, broken)])
    assert said() == [], "it gets on"
    failing(Retries("b", 10), clock, [(0, broken), (3, broken), (100, broken)])
    assert said() == ["b"]
    clock.now += 60
    failing(Retries("c", 10), clock, [(0, broken), (3, broken)])
    assert said() == ["c"]
    failing(Retries("d", 10), clock, [(0, broken), (50, broken), (6, broken)])
    assert said() == []
    failing(Retries("e", 10), clock, [(0, broken), (3, broken), (3, broken)])
    assert said() == ["e"], "one that was not heard tries again"


def test_a_fault_with_less_patience_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, broken = Clock(monkeypatch), Fault("broken", "reset")
    none = Fault("credentials", "none", 1, DataError("no credentials"))
    failing(Retries("a", 10), clock, [(300, broken), (1, none), (59, none), (1, broken), (1, none), (59, none)])
    with pytest.raises(DataError, match="no credentials"):
        failing(Retries("a", 10), clock, [(300, broken), (1, none), (60, none)])
    with pytest.raises(DataError, match="no credentials"):
        failing(Retries("a", 0.5), clock, [(0, none), (30, none)])
    with pytest.raises(StoreError, match="10 minutes"):
        failing(Retries("a", 10), clock, [(0, broken), (601, broken)])
