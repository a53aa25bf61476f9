"""A wire to an S3 server that tests can watch, and on which something may happen at a chosen byte."""

from __future__ import annotations

import re
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit


class Tap:
    """A wire to a gateway: bytes pass unaltered, GETs' first bytes are noted, and something may happen on the way.

    It reads from the gateway no faster than the client reads from it and keeps buffers small, so that what `after`
    does comes in the middle of a body: the gateway cannot have sent much more than the client has received.
    """

    def __init__(self, endpoint: str) -> None:
        self._upstream = urlsplit(endpoint)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.starts: list[int] = []  # first byte asked for, by GET
        self.passed = 0  # bytes, both ways
        self._planned: tuple[int, Callable[[], None]] | None = None
        self._connections: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def after(self, passed: int, action: Callable[[], None]) -> None:
        """Call `action` once, when `passed` bytes have passed; nothing more passes before it returns."""
        self._planned = (self.passed + passed, action)

    def cut(self) -> None:
        """Break all connections that stand."""
        for connection in list(self._connections):
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.socket() as server, selectors.DefaultSelector() as ready:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            try:
                server.connect((self._upstream.hostname, self._upstream.port))
                self._connections.add(client)
                ready.register(client, selectors.EVENT_READ, server)
                ready.register(server, selectors.EVENT_READ, client)
                while all(self._pass(key.fileobj, key.data) for key, _ in ready.select()):
                    pass
            except OSError:
                pass  # either side broke: closing both is how the other one learns of it
            finally:
                self._connections.discard(client)

    def _pass(self, source: Any, sink: socket.socket) -> bool:
        piece = source.recv(64 << 10)
        if piece.startswith(b"GET "):
            first = re.search(rb"^range: *bytes=(\d+)-", piece, re.IGNORECASE | re.MULTILINE)
            self.starts.append(int(first[1]) if first else 0)
        sink.sendall(piece)
        self.passed += len(piece)
        if self._planned and self.passed >= self._planned[0]:
            action, self._planned = self._planned[1], None
            action()
        return bool(piece)
