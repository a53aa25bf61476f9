"""What protects the page's server: a filter before Gradio, and the cache of files that the filter serves.

- Gradio takes names of files from its clients, as `{"path": ...}`, and opens some of them before a component can
  refuse. The filter replaces each such object by the uploaded file that has this address, or by null, so an answer
  does not depend on which files exist.
- Uploads and downloads are handled by the filter alone, and each of them and their sum are bounded. Gradio's own
  routes for files are closed, as are all routes that the page does not use.
- A file's address is `/FOLDER/TOKEN/NAME`, which nobody can guess. It is looked up in a table: no name that a client
  sends reaches the file system, and no answer says where files are.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import AsyncGenerator
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

MEDIA_TYPES = {f".{ext}": f"image/{name.lower()}" for name, kind in FORMATS.items() for ext in kind.extensions}
"""Of the image formats that can be decoded, by suffix."""

MOST_UPLOAD = 2**25
"""Largest upload, in bytes."""
MOST_ARRIVING = 2**28
"""Largest sum of the uploads that are arriving, in bytes."""
UPLOAD_TIMEOUT_S = 120.0
MOST_REQUEST = 2**20
"""Largest other request, in bytes."""
API = "/gradio_api"
FILE = f"{API}/file="
GET_ROUTES = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon(/\w+)?|/(assets|static|svelte)/.*"
    rf"|{API}/(info/?|startup-events|theme\.css|app_id/?|heartbeat/\w+|queue/(data|status))"
)
"""Gradio's routes that the page reads."""
POST_ROUTES = re.compile(rf"{API}/(queue/join|run/\w+/?|cancel|reset/?)")
_TEXT_TYPES = "text/html", "application/json", "text/event-stream", "text/plain"


class FileCache:
    """The latest files of one kind, at most `most_files` and `most_bytes` in all; the oldest are removed.

    `folder` is made if need be and holds nothing else.
    """

    def __init__(self, folder: Path, most_files: int, most_bytes: int) -> None:
        self.folder, self.most_files, self.most_bytes = folder, most_files, most_bytes
        folder.mkdir(exist_ok=True)
        self._cached: dict[str, Path] = {}  # by address, the oldest first
        self._sizes: dict[str, int] = {}
        self._lock = Lock()

    def add(self, name: str, content: bytes) -> Path:
        """Write a file, whose name has plain letters only, and return its path."""
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
            self._cached[address], self._sizes[address] = place / name, len(content)
            while len(self._cached) > self.most_files or sum(self._sizes.values()) > self.most_bytes:
                oldest = next(iter(self._cached))
                del self._sizes[oldest]
                shutil.rmtree(self._cached.pop(oldest).parent)
            return place / name

    def find(self, address: object) -> Path | None:
        """The path of the file at an address, or None if there is none or it was removed."""
        with self._lock:
            return self._cached.get(address) if isinstance(address, str) else None

    def read(self, path: str | Path | None) -> bytes | None:
        """The content of a cached file, or None for any other path or one that is no longer a regular file."""
        with self._lock:
            known = next((cached for cached in self._cached.values() if str(cached) == str(path)), None)
        if known is None:
            return None
        try:
            descriptor = os.open(known, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # it was removed meanwhile, or is a link
            return None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > self.most_bytes:
            os.close(descriptor)
            return None
        with open(descriptor, "rb") as file:
            return file.read(self.most_bytes)


class _Refused(Exception):
    """A request that is refused, with its answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.response = PlainTextResponse(message, status)


class RequestFilter:
    """ASGI middleware before Gradio's `app`; `folder` holds both caches and is removed from all answers."""

    def __init__(self, app: ASGIApp, folder: Path, uploads: FileCache, images: FileCache) -> None:
        self._app, self._uploads, self._caches = app, uploads, (uploads, images)
        # As JSON spells it, with and without escapes, and as URLs do.
        spellings = {str(folder), json.dumps(str(folder))[1:-1], quote(str(folder))}
        self._hidden = [text.encode() for text in sorted(spellings, key=len, reverse=True)]
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        is_get, path = scope["method"] in ("GET", "HEAD"), scope["path"]
        try:
            if is_get and path.startswith(FILE):
                response = await run_in_threadpool(self._serve_file, path.removeprefix(FILE))
            elif scope["method"] == "POST" and path in (f"{API}/upload", f"{API}/upload/"):
                response = await self._receive_upload(Request(scope, receive))
            elif is_get and GET_ROUTES.fullmatch(path):
                await self._app(scope, receive, self._hide_folder(send))
                return
            elif scope["method"] == "POST" and POST_ROUTES.fullmatch(path):
                body = await self._checked_body(Request(scope, receive))
                await self._app(scope, _replay(body, receive), self._hide_folder(send))
                return
            else:
                raise _Refused(404, "Not Found")
        except _Refused as refused:
            response = refused.response
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    def _serve_file(self, address: str) -> Response:
        for cache in self._caches:
            if (path := cache.find(address)) is not None and (content := cache.read(path)) is not None:
                headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400"}
                return Response(content, media_type=MEDIA_TYPES[path.suffix], headers=headers)
        raise _Refused(404, "Not Found")

    async def _receive_upload(self, request: Request) -> Response:
        """Store the file of a form; the answer is a list with its address."""
        most = MOST_UPLOAD + 2**14  # with the form around the file
        arrived = 0

        async def chunks() -> AsyncGenerator[bytes, None]:
            nonlocal arrived
            async for chunk in request.stream():
                arrived += len(chunk)
                self._arriving += len(chunk)
                if arrived > most:
                    raise _Refused(413, f"a file must have at most {MOST_UPLOAD:,} bytes")
                if self._arriving > MOST_ARRIVING:
                    raise _Refused(503, "too many files are being uploaded at once: try again")
                yield chunk

        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                form = await MultiPartParser(request.headers, chunks(), max_files=1, max_fields=0).parse()
            file = form.get("files")
            if not isinstance(file, UploadFile):
                raise _Refused(400, "an upload must have one file, under the name files")
            suffix = Path(file.filename or "").suffix.lower()
            content = await file.read()
            await form.close()
        except (MultiPartException, KeyError) as error:  # KeyError: no boundary
            raise _Refused(400, "an upload must be a form with one file") from error
        except TimeoutError as error:
            raise _Refused(408, f"an upload may take {UPLOAD_TIMEOUT_S:.0f} seconds") from error
        finally:
            self._arriving -= arrived
        if suffix not in MEDIA_TYPES:
            raise _Refused(415, f"an image's name must end in one of {', '.join(MEDIA_TYPES)}")
        if len(content) > MOST_UPLOAD:
            raise _Refused(413, f"a file must have at most {MOST_UPLOAD:,} bytes")
        try:
            path = await run_in_threadpool(self._uploads.add, f"image{suffix}", content)
        except OSError as error:
            raise _Refused(507, f"the file cannot be stored: {error.strerror}") from error
        return JSONResponse([f"/{path.relative_to(self._uploads.folder.parent)}"])

    async def _checked_body(self, request: Request) -> bytes:
        """A request's JSON, in which every file is an uploaded one."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_REQUEST:
                raise _Refused(413, f"a request must have at most {MOST_REQUEST:,} bytes")
        try:
            return json.dumps(self._replace_files(json.loads(body))).encode()
        except (ValueError, RecursionError) as error:
            raise _Refused(400, "a request must be JSON") from error

    def _replace_files(self, value: Any) -> Any:
        """JSON in which what Gradio would take for a file is the uploaded file or, if there is none, null."""
        if isinstance(value, list):
            return [self._replace_files(element) for element in value]
        if not isinstance(value, dict):
            return value
        if not {"path", "url", "meta"} & value.keys():
            return {name: self._replace_files(element) for name, element in value.items()}
        path = self._uploads.find(value.get("path"))
        return None if path is None else {"path": str(path), "meta": {"_type": "gradio.FileData"}}

    def _hide_folder(self, send: Send) -> Send:
        """Removes the folder's path from text that is sent."""
        is_text = False

        async def send_filtered(message: Message) -> None:
            nonlocal is_text
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                is_text = headers.get("content-type", "").startswith(_TEXT_TYPES)
                if is_text and "content-length" in headers:
                    del headers["content-length"]
            elif is_text and message["type"] == "http.response.body":
                body = message.get("body", b"")
                for spelling in self._hidden:
                    body = body.replace(spelling, b"")
                message = {**message, "body": body}
            await send(message)

        return send_filtered


def _replay(body: bytes, receive: Receive) -> Receive:
    """Receives a body that was read already, then what follows: that the client has disconnected."""
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
