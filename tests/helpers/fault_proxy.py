"""An HTTP proxy on loopback that makes a share of the requests fail, as networks and busy servers do.

    python tests/helpers/fault_proxy.py --upstream 127.0.0.1:9000 --port 9001 --share 0.1     # counts as JSON at exit

- One draw a request, on connections that are kept alive too. Heads pass untouched, so signatures hold.
- `reset` (RST), `stall` and `truncate` (an orderly close) strike at a random byte of the answer's body, or before its
  head where it has none; `slowdown` (503) and `error` (500) answer in the server's place with S3's XML; `refuse` closes
  unanswered, at accept where it is a connection's first request; `latency` only delays.
- A stall lasts until the client closes the connection.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType

FAULTS = ("reset", "stall", "truncate", "slowdown", "error", "refuse", "latency")
_ANSWERS = {"slowdown": ("503 Slow Down", "SlowDown"), "error": ("500 Internal Server Error", "InternalError")}


class _Head:
    """The first line and the headers of a request or an answer."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        first, *lines = raw.decode("latin-1").split("\r\n")
        self.words = first.split(" ")
        fields = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in fields}

    @property
    def length(self) -> int | None:
        """Bytes of the body, or None if only its end says."""
        return int(self.headers["content-length"]) if "content-length" in self.headers and not self.chunked else None

    @property
    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def closes(self) -> bool:
        connection = self.headers.get("connection", "").lower()
        return connection == "close" or ("HTTP/1.0" in self.words and connection != "keep-alive")


async def _head(reader: asyncio.StreamReader) -> _Head:
    return _Head(await reader.readuntil(b"\r\n\r\n"))


async def _body(reader: asyncio.StreamReader, head: _Head) -> AsyncIterator[bytes]:
    """The body's bytes as they arrive, chunks with their framing; without a length, up to the close."""
    if head.length is not None:
        left = head.length
        while left:
            if not (piece := await reader.read(min(left, 1 << 16))):
                raise ConnectionError("the other side ended a body early")
            left -= len(piece)
            yield piece
    elif head.chunked:
        size = -1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
    elif head.words[0].startswith("HTTP/"):
        while piece := await reader.read(1 << 16):
            yield piece


class FaultProxy:
    """The proxy in a thread, for the time of a `with`. `share`, `kinds` and `stall_s` may be changed meanwhile.

    Args:
        upstream: host:port of the server.
        share: of the requests are spoiled, 0 to 1.
        kinds: which of FAULTS, all with the same probability.
        stall_s: seconds that a stall lasts at most.
        latency_s: seconds that a delay lasts.

    Attributes:
        url: where clients find it.
        counts: faults made by kind, and "requests" and "connections" in all.
    """

    def __init__(
        self,
        upstream: str,
        share: float = 0.1,
        seed: int = 0,
        kinds: tuple[str, ...] = FAULTS,
        *,
        port: int = 0,
        stall_s: float = 600,
        latency_s: float = 0.2,
    ) -> None:
        host, _, number = upstream.removeprefix("http://").rpartition(":")
        self._upstream = host, int(number)
        self.share, self.kinds, self.stall_s, self.latency_s = share, kinds, stall_s, latency_s
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._socket = socket.create_server(("127.0.0.1", port), backlog=256)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, sock=self._socket))
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _draw(self) -> str:
        return self._random.choice(self.kinds) if self._random.random() < self.share else ""

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        upstream = None
        fault = self._draw()
        try:
            if fault == "refuse":
                self.counts.update(("requests", fault))
                return
            request = await _head(reader)
            while True:
                self.counts.update(("requests", fault) if fault else ("requests",))
                if fault == "refuse":
                    return
                if fault == "latency":
                    await asyncio.sleep(self.latency_s)
                if fault in _ANSWERS:
                    keep = await self._answer(fault, request, writer)
                else:
                    if not upstream or upstream[0].at_eof():
                        upstream = await asyncio.open_connection(*self._upstream)
                    keep = await self._pass(fault, request, reader, writer, *upstream)
                if not keep:
                    return
                request = await _head(reader)
                fault = self._draw()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one side closed, or the proxy ends: close the other
        finally:
            for side in filter(None, (writer, upstream and upstream[1])):
                side.close()

    async def _answer(self, fault: str, request: _Head, writer: asyncio.StreamWriter) -> bool:
        status, code = _ANSWERS[fault]
        xml = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>made up</Message></Error>"
        keep = request.length in (None, 0)  # otherwise the body follows: a new connection skips it
        lines = [f"HTTP/1.1 {status}", "Content-Type: application/xml", f"Content-Length: {len(xml)}"]
        lines += [f"Connection: {'keep-alive' if keep else 'close'}", "", "" if request.words[0] == "HEAD" else xml]
        writer.write("\r\n".join(lines).encode())
        await writer.drain()
        return keep

    async def _pass(
        self,
        fault: str,
        request: _Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        async def send() -> None:
            try:
                to_server.write(request.raw)
                async for piece in _body(reader, request):
                    to_server.write(piece)
                    await to_server.drain()
            except (OSError, asyncio.IncompleteReadError):
                to_server.close()  # otherwise the server would wait for the rest
                raise

        # Meanwhile the server may answer already: "100 Continue", or a refusal.
        sending = asyncio.create_task(send())
        try:
            while (answer := await _head(from_server)).words[1].startswith("1"):
                writer.write(answer.raw)
            empty = request.words[0] == "HEAD" or answer.words[1] in ("204", "304")
            if fault in ("reset", "stall", "truncate"):
                await self._spoil(fault, None if empty else answer, reader, writer, from_server)
                return False
            writer.write(answer.raw)
            if not empty:
                async for piece in _body(from_server, answer):
                    writer.write(piece)
                    await writer.drain()
            await writer.drain()
            endless = not empty and answer.length is None and not answer.chunked
            return sending.done() and not (endless or request.closes or answer.closes)
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError, OSError, asyncio.IncompleteReadError):
                await sending

    async def _spoil(
        self,
        fault: str,
        answer: _Head | None,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
    ) -> None:
        if answer and answer.length:
            left = self._random.randrange(answer.length)
            writer.write(answer.raw)
            async for piece in _body(from_server, answer):
                writer.write(piece[:left])
                left -= len(piece[:left])
                if not left:
                    break
            await writer.drain()
        if fault == "stall":
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), self.stall_s)
        elif fault == "reset":
            await asyncio.sleep(0.01)  # what was sent before arrives before
            lingering = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingering)
            writer.transport.abort()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--upstream", required=True, help="host:port of the server")
    parser.add_argument("--port", type=int, default=0, help="port on loopback; 0 takes a free one")
    parser.add_argument("--share", type=float, default=0.1, help="of the requests to spoil, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(FAULTS), help="faults to make, with commas between")
    parser.add_argument("--stall", type=float, default=600, help="seconds that a stall lasts at most")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that a delay lasts")
    given = parser.parse_args()
    kinds = tuple(given.kinds.split(","))
    if unknown := set(kinds) - set(FAULTS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is not among {', '.join(FAULTS)}")
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # before the thread starts, which inherits it
    with FaultProxy(
        given.upstream,
        given.share,
        given.seed,
        kinds,
        port=given.port,
        stall_s=given.stall,
        latency_s=given.latency,
    ) as proxy:
        print(proxy.url, file=sys.stderr, flush=True)
        signal.sigwait(stops)
    print(json.dumps(dict(sorted(proxy.counts.items()))))


if __name__ == "__main__":
    main()
