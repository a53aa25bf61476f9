"""What stands before Gradio: every request passes here, and what the page does not need goes no farther.

- Gradio takes names of files from its visitors, as `{"path": ...}`, and opens some of them before a component has its
  say. Here such an object becomes a file that was uploaded, by its address (t2i/serving/limits.py), or nothing: alike
  whether there is a file of that name or not.
- Files come and go through here alone, bounded in size each and in all; Gradio's own ways to them are shut, with all
  of its routes that the page does not use.
- Answers say nothing of where files lie.

Files that the page keeps for its visitors: the latest, in bounded number and size, each at an address that nobody
can guess.

An address is `/FOLDER/TOKEN/NAME`. It says nothing of where the file lies, and is looked up in a table: no name that a
visitor sends ever reaches the file system.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data.listing import FORMATS

TYPES = {f".{ext}": f"image/{name.lower()}" for name, it in FORMATS.items() for ext in it.extensions}
"""Of the images that are decoded, by their files' suffixes."""


class FileCache:
    """The latest files of one kind.

    Args:
        folder: where they lie, and nothing else does; made if need be.
        most_files: kept at most; then the oldest go.
        most_bytes: the same of their sizes in all.
    """

    def __init__(self, folder: Path, most_files: int, most_bytes: int) -> None:
        self.folder, self.most_files, self.most_bytes = folder, most_files, most_bytes
        folder.mkdir(exist_ok=True)
        self._kept: dict[str, Path] = {}  # by address, the oldest first
        self._sizes: dict[str, int] = {}
        self._lock = Lock()

    def add(self, name: str, content: bytes) -> Path:
        """Keep a file under a name of plain letters; where it is.

        Raises:
            OSError: it cannot be written.
        """
        assert re.fullmatch(r"[\w-]+\.\w+", name)
        with self._lock:
            place = self.folder / secrets.token_hex(16)
            place.mkdir()
            try:
                (place / name).write_bytes(content)
            except OSError:
                shutil.rmtree(place)
                raise
            address = f"/{self.folder.name}/{place.name}/{name}"
            self._kept[address], self._sizes[address] = place / name, len(content)
            while len(self._kept) > self.most_files or sum(self._sizes.values()) > self.most_bytes:
                oldest = next(iter(self._kept))
                del self._sizes[oldest]
                shutil.rmtree(self._kept.pop(oldest).parent)
            return place / name

    def find(self, address: object) -> Path | None:
        """The file at an address; None: none is, or no longer."""
        with self._lock:
            return self._kept.get(address) if isinstance(address, str) else None

    def read(self, path: str | Path | None) -> bytes | None:
        """What a kept file holds; None of any other path, and of what is no regular file any more."""
        with self._lock:
            known = next((it for it in self._kept.values() if str(it) == str(path)), None)
        if known is None:
            return None
        try:
            descriptor = os.open(known, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # it has gone meanwhile, or is a link
            return None
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_size > self.most_bytes:
            os.close(descriptor)
            return None
        with open(descriptor, "rb") as file:
            return file.read(self.most_bytes)


MOST_UPLOAD = 2**25
"""Bytes of a file, at most."""
MOST_ARRIVING = 2**28
"""Bytes of uploads that are on their way, in all."""
MOST_SECONDS = 120.0
"""That an upload takes: then it gives up its place among them."""
MOST_REQUEST = 2**20
"""Bytes of any other request."""
API = "/gradio_api"
FILE = f"{API}/file="
READS = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon(/\w+)?|/(assets|static|svelte)/.*"
    rf"|{API}/(info/?|startup-events|theme\.css|app_id/?|heartbeat/\w+|queue/(data|status))"
)
"""What the page reads of Gradio's."""
WRITES = re.compile(rf"{API}/(queue/join|run/\w+/?|cancel|reset/?)")
"""What it asks of it."""
_WORDS = "text/html", "application/json", "text/event-stream", "text/plain"


class _Refused(Exception):
    """A request that goes no farther, with the status that says why."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.response = PlainTextResponse(words, status)


class Gate:
    """ASGI middleware.

    Args:
        app: Gradio's.
        folder: in which all kept files lie.
        uploads: what visitors bring.
        pictures: what they are shown.
    """

    def __init__(self, app: ASGIApp, folder: Path, uploads: FileCache, pictures: FileCache) -> None:
        self._app, self._uploads, self._shown = app, uploads, (uploads, pictures)
        # As JSON has it, with and without escapes, and as addresses do.
        spelled = {str(folder), json.dumps(str(folder))[1:-1], quote(str(folder))}
        self._hidden = [it.encode() for it in sorted(spelled, key=len, reverse=True)]
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        reads, path = scope["method"] in ("GET", "HEAD"), scope["path"]
        try:
            if reads and path.startswith(FILE):
                response = await run_in_threadpool(self._show, path.removeprefix(FILE))
            elif scope["method"] == "POST" and path in (f"{API}/upload", f"{API}/upload/"):
                response = await self._take(Request(scope, receive))
            elif reads and READS.fullmatch(path):
                await self._app(scope, receive, self._discreet(send))
                return
            elif scope["method"] == "POST" and WRITES.fullmatch(path):
                body = await self._admitted(Request(scope, receive))
                await self._app(scope, _replay(body, receive), self._discreet(send))
                return
            else:
                raise _Refused(404, "Not Found")
        except _Refused as refused:
            response = refused.response
        except ClientDisconnect:  # with nobody left to answer
            return
        await response(scope, receive, send)

    def _show(self, address: str) -> Response:
        """A kept file."""
        for kept in self._shown:
            if (path := kept.find(address)) is not None and (content := kept.read(path)) is not None:
                headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400"}
                return Response(content, media_type=TYPES[path.suffix], headers=headers)
        raise _Refused(404, "Not Found")

    async def _take(self, request: Request) -> Response:
        """Keep a file that comes as a form; its address, in a list."""
        most = MOST_UPLOAD + 2**14  # and what is around it
        arrived = 0

        async def pieces() -> AsyncGenerator[bytes, None]:
            nonlocal arrived
            async for piece in request.stream():
                arrived += len(piece)
                self._arriving += len(piece)
                if arrived > most:
                    raise _Refused(413, f"a file must have at most {MOST_UPLOAD:,} bytes")
                if self._arriving > MOST_ARRIVING:
                    raise _Refused(503, "too many files are being brought at once: try again")
                yield piece

        try:
            async with asyncio.timeout(MOST_SECONDS):
                form = await MultiPartParser(request.headers, pieces(), max_files=1, max_fields=0).parse()
            file = form.get("files")
            if not isinstance(file, UploadFile):
                raise _Refused(400, "an upload must have one file, under the name files")
            suffix = Path(file.filename or "").suffix.lower()
            content = await file.read()
            await form.close()
        except (MultiPartException, KeyError) as error:  # KeyError: no boundary
            raise _Refused(400, "an upload must be a form with one file") from error
        except TimeoutError as error:
            raise _Refused(408, f"an upload may take {MOST_SECONDS:.0f} seconds") from error
        finally:
            self._arriving -= arrived
        if suffix not in TYPES:
            raise _Refused(415, f"an image's name must end in one of {', '.join(TYPES)}")
        if len(content) > MOST_UPLOAD:
            raise _Refused(413, f"a file must have at most {MOST_UPLOAD:,} bytes")
        try:
            kept = await run_in_threadpool(self._uploads.add, f"image{suffix}", content)
        except OSError as error:
            raise _Refused(507, f"the file cannot be kept: {error.strerror}") from error
        return JSONResponse([f"/{kept.relative_to(self._uploads.folder.parent)}"])

    async def _admitted(self, request: Request) -> bytes:
        """A request's JSON, in which every file is one that was uploaded."""
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_REQUEST:
                raise _Refused(413, f"a request must have at most {MOST_REQUEST:,} bytes")
        try:
            return json.dumps(self._with_files(json.loads(body))).encode()
        except (ValueError, RecursionError) as error:
            raise _Refused(400, "a request must be JSON") from error

    def _with_files(self, value: Any) -> Any:
        """The same, with what is given as a file replaced by the kept one or, if there is none, by nothing."""
        if isinstance(value, list):
            return [self._with_files(it) for it in value]
        if not isinstance(value, dict):
            return value
        if not {"path", "url", "meta"} & value.keys():
            return {name: self._with_files(it) for name, it in value.items()}
        path = self._uploads.find(value.get("path"))
        return None if path is None else {"path": str(path), "meta": {"_type": "gradio.FileData"}}

    def _discreet(self, send: Send) -> Send:
        """Sends what it is given; of words, without the folder's name."""
        is_words = False

        async def discreet(message: Message) -> None:
            nonlocal is_words
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                is_words = headers.get("content-type", "").startswith(_WORDS)
                if is_words and "content-length" in headers:
                    del headers["content-length"]
            elif is_words and message["type"] == "http.response.body":
                message = {**message, "body": _without(message.get("body", b""), self._hidden)}
            await send(message)

        return discreet


def _without(content: bytes, hidden: Sequence[bytes]) -> bytes:
    for words in hidden:
        content = content.replace(words, b"")
    return content


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then what else there is: that the client has gone."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
