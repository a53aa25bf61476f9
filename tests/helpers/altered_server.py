"""A proxy that changes an S3 server's answers, to stand for servers that follow S3 only in part."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Headers = list[tuple[str, str]]
Change = Callable[[str, Headers, bytes], tuple[Headers, bytes]]
"""From a request's method ("LIST" for a listing) and the answer's headers and body to the headers and body to send.

The body is sent in chunks if the headers have no Content-Length."""


class AlteredServer:
    """A proxy on loopback to the server at `upstream` (http://host:port), within a `with`; error answers pass as is."""

    def __init__(self, upstream: str, change: Change) -> None:
        host = upstream.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                real = http.client.HTTPConnection(host)
                real.request(self.command, self.path, content, dict(self.headers.items()))
                answer = real.getresponse()
                body, dropped = answer.read(), ("transfer-encoding", "connection")
                headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in dropped]
                real.close()
                kind = "LIST" if "list-type=2" in self.path else self.command
                headers, body = change(kind, headers, body) if answer.status < 300 else (headers, body)
                has_length = "content-length" in (name.lower() for name, _ in headers)
                self.send_response_only(answer.status)
                for name, value in headers:
                    is_length = name.lower() == "content-length" and self.command != "HEAD"
                    self.send_header(name, str(len(body)) if is_length else value)
                if not has_length and self.command != "HEAD":
                    self.send_header("Transfer-Encoding", "chunked")
                    body = (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A client may leave before it has read all of an answer."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> AlteredServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def without(*names: str, kinds: str = "GET HEAD LIST PUT POST") -> Change:
    """Leave headers, and elements of listings, out of answers of these kinds."""

    def change(kind: str, headers: Headers, body: bytes) -> tuple[Headers, bytes]:
        if kind not in kinds.split():
            return headers, body
        if kind == "LIST":
            for name in names:
                body = re.sub(rf"<{name}>.*?</{name}>".encode(), b"", body)
        else:
            headers = [(name, value) for name, value in headers if name.lower() not in map(str.lower, names)]
        return headers, body

    return change


def tagged(write: Callable[[str], str], kinds: str = "GET HEAD LIST PUT") -> Change:
    """Replace the ETags of answers of these kinds; `write` gets them without quotes."""

    def change(kind: str, headers: Headers, body: bytes) -> tuple[Headers, bytes]:
        if kind in kinds.split():
            headers = [(n, write(v.strip('"')) if n.lower() == "etag" else v) for n, v in headers]
            body = re.sub(
                rb"<ETag>(?:&quot;|\")?(.*?)(?:&quot;|\")?</ETag>",
                lambda match: f"<ETag>{write(match[1].decode())}</ETag>".encode(),
                body,
            )
        return headers, body

    return change
