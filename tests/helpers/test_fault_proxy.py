"""The fault proxy: it changes nothing but what it was asked to spoil, and says what it did."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fault_proxy import FaultProxy

BODY = bytes(range(256)) * 1000


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (BODY[:70_000], BODY[70_000:]):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        elif self.path == "/endless":
            self.end_headers()
            self.wfile.write(BODY)
            self.close_connection = True
        else:
            content = self.headers["Host"].encode() if self.path == "/host" else BODY
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def do_PUT(self) -> None:  # answers "100 Continue" by itself
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "9")
        self.end_headers()
        self.wfile.write(b"%9d" % len(content))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # connections end as the proxy likes
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def connection(proxy: FaultProxy) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=1)


def get(client: http.client.HTTPConnection, path: str = "/", method: str = "GET") -> tuple[int, bytes]:
    client.request(method, path)
    answer = client.getresponse()
    return answer.status, answer.read()


def test_without_faults_all_kinds_of_requests_pass_on_one_connection(upstream: str) -> None:
    with FaultProxy(upstream, share=0) as proxy:
        client = connection(proxy)
        assert get(client) == (200, BODY)
        assert get(client, method="HEAD") == (200, b"")
        assert get(client, "/chunked") == (200, BODY)
        assert get(client, "/host") == (200, f"{client.host}:{client.port}".encode())  # as the client sent it
        client.request("PUT", "/", BODY * 4, {"Expect": "100-continue"})
        assert client.getresponse().read() == b"%9d" % (4 * len(BODY))
        assert proxy.counts == {"requests": 5, "connections": 1}
        assert get(client, "/endless") == (200, BODY)


@pytest.mark.parametrize(("kind", "error"), [("reset", ConnectionResetError), ("truncate", http.client.IncompleteRead)])
@pytest.mark.parametrize("path", ["/", "/chunked"])
def test_a_body_breaks_somewhere(upstream: str, kind: str, error: type[Exception], path: str) -> None:
    with FaultProxy(upstream, share=0, kinds=(kind,), seed=3) as proxy:
        client = connection(proxy)
        get(client)
        proxy.share = 1
        client.request("GET", path)
        if path == "/chunked":  # no length to choose a byte of: broken before its head
            with pytest.raises(ConnectionError):
                client.getresponse()
        else:
            answer = client.getresponse()
            with pytest.raises(error):
                answer.read()
        assert proxy.counts == {"requests": 2, "connections": 1, kind: 1}


def test_what_arrives_before_a_reset_is_right_and_of_any_length(upstream: str) -> None:
    lengths = set()
    with FaultProxy(upstream, share=1, kinds=("reset",)) as proxy:
        for _ in range(8):
            raw = socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])))
            raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            got = b""
            with pytest.raises(ConnectionResetError):
                while True:
                    got += raw.recv(1 << 16)
            body = got.partition(b"\r\n\r\n")[2]
            assert BODY.startswith(body)
            lengths.add(len(body))
    assert len(lengths) == 8


def test_a_stall_outlasts_the_client_and_no_longer(upstream: str) -> None:
    with FaultProxy(upstream, share=1, kinds=("stall",), stall_s=60) as proxy:
        client = connection(proxy)
        with pytest.raises(TimeoutError):
            get(client)
        client.close()
        assert proxy.counts["stall"] == 1


@pytest.mark.parametrize(("kind", "status", "code"), [("slowdown", 503, b"SlowDown"), ("error", 500, b"InternalError")])
def test_answers_in_the_servers_place_keep_the_connection(upstream: str, kind: str, status: int, code: bytes) -> None:
    with FaultProxy(upstream, share=1, kinds=(kind,)) as proxy:
        client = connection(proxy)
        for _ in range(2):
            got, xml = get(client)
            assert got == status
            assert b"<Code>%s</Code>" % code in xml
        assert get(client, method="HEAD") == (status, b"")
        assert proxy.counts == {"requests": 3, "connections": 1, kind: 3}


def test_refused_and_late(upstream: str) -> None:
    with FaultProxy(upstream, share=1, kinds=("refuse",), latency_s=0.3) as proxy:
        with pytest.raises(ConnectionError):
            get(connection(proxy))
        proxy.kinds = ("latency",)
        start = time.monotonic()
        assert get(connection(proxy)) == (200, BODY)
        assert time.monotonic() - start >= 0.3
        assert proxy.counts == {"requests": 2, "connections": 2, "refuse": 1, "latency": 1}


def test_the_command_prints_its_counts(upstream: str) -> None:
    script = Path(__file__).with_name("fault_proxy.py")
    command = [sys.executable, str(script), "--upstream", upstream, "--share", "0.5", "--seed", "1", "--kinds", "error"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    client = http.client.HTTPConnection(process.stderr.readline().strip().removeprefix("http://"), timeout=5)
    statuses = [get(client)[0] for _ in range(100)]
    process.send_signal(signal.SIGTERM)
    counts = json.loads(process.communicate(timeout=10)[0])
    assert counts == {"connections": 1, "error": statuses.count(500), "requests": 100}
    assert 30 < counts["error"] < 70
