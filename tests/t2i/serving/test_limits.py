"""What a stranger may do to the page's server: real requests, without a browser."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from forked import ROOT, free_port
from PIL import Image
from random_model import write_random_model
from tiny import open_process

pytest.importorskip("gradio", reason="comes with the extra 'serve'")
import httpx
from starlette.responses import PlainTextResponse
from starlette.types import Message

from t2i.serving import limits
from t2i.serving.limits import FileCache

META = {"meta": {"_type": "gradio.FileData"}}
API = "/gradio_api"


def png(color: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(data, "png")
    return data.getvalue()


@dataclass
class Visitor:
    """A client with a session of its own; `answers` are all that it was told."""

    base: str
    model: Path
    temporary: Path
    """The server's folder for temporary files."""
    name: str = "first"
    answers: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.base, timeout=30)
        config = self.get("/config").json()
        self.ids = {component["props"].get("elem_id"): component["id"] for component in config["components"]}
        self.calls = {
            name: next(call for call in config["dependencies"] if [self.ids[name], "click"] in call["targets"])
            for name in ("draw", "edit")
        }

    def get(self, path: str) -> httpx.Response:
        return self._told(self.http.get(path))

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self._told(self.http.post(path, **options))

    def _told(self, response: httpx.Response) -> httpx.Response:
        self.answers.append(response.content)
        return response

    def upload(self, content: bytes, name: str = "a.png") -> httpx.Response:
        return self.post(f"{API}/upload", files={"files": (name, content)})

    def ask(self, button: str, values: list[Any]) -> dict[str, Any]:
        """Press a button, its fields filled in; what comes of it at the end."""
        call = self.calls[button]
        body = {"data": [None, *values], "fn_index": call["id"], "trigger_id": self.ids[button]}
        content = json.dumps({**body, "session_hash": self.name})  # Infinity, too
        joined = self.post(f"{API}/queue/join", content=content, headers={"content-type": "application/json"})
        assert joined.status_code == 200, joined.text
        with self.http.stream("GET", f"{API}/queue/data?session_hash={self.name}") as events:
            for line in events.iter_lines():
                self.answers.append(line.encode())
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "process_completed":
                    return dict(message)
        raise AssertionError("it ended without an answer")

    def edit(self, image: Any, source: str = "a red circle", target: str = "a blue star") -> dict[str, Any]:
        return self.ask("edit", [image, source, target, 2, 1, 1.0, 1.5, 0])

    def draw(self, prompt: str = "a red circle", negative: str = "") -> dict[str, Any]:
        return self.ask("draw", [prompt, negative, 16, 16, 2, 2.0, 0.0, 1.0, "euler", 2, 0, 1])


def address_of(answer: dict[str, Any]) -> str:
    """Of the picture that an answer shows."""
    assert answer["success"], answer
    shown = json.dumps(answer)
    return shown[shown.index("/pictures/") :].partition('"')[0]


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    model = write_random_model(tmp_path_factory.mktemp("somewhere") / "model")
    temporary = tmp_path_factory.mktemp("temporary files é")  # is spelled in three ways
    port = free_port()
    words = [str(ROOT / "launch" / "serve.py"), "--model", str(model), "--port", str(port), "--max_pixels", "4096"]
    process = open_process([sys.executable, *words], PYTHONPATH=str(ROOT), TMPDIR=str(temporary))
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("serving on"):
            break
    else:
        pytest.fail("".join(said))
    yield Visitor(f"http://127.0.0.1:{port}", model, temporary)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output, output
    assert "WARNING" not in "".join(said)
    assert list(temporary.iterdir()) == []


def secret(folder: Path) -> Path:
    (folder / "secret.png").write_bytes(png("blue"))
    return folder / "secret.png"


def test_a_file_that_was_not_uploaded_is_not_opened_nor_told_from_none(visitor: Visitor, tmp_path: Path) -> None:
    link, pipe = tmp_path / "link.png", tmp_path / "pipe.png"
    link.symlink_to(secret(tmp_path))
    os.mkfifo(pipe)
    other = Visitor(visitor.base, visitor.model, visitor.temporary, "other")
    theirs = address_of(other.draw())
    real = next(visitor.temporary.glob(f"*{theirs}"))
    own = visitor.upload(png()).json()[0]
    inside = next(visitor.temporary.glob(f"*{own}"))
    planted = inside.parent / "planted.png"
    planted.symlink_to(secret(tmp_path))
    paths = [secret(tmp_path), tmp_path / "missing.png", tmp_path, "/etc/passwd", "/dev/zero", "/dev/stdin", link, pipe]
    paths += ["/proc/self/environ", theirs, real, planted, f"{own}/../../../../../../..{secret(tmp_path)}", f"{own}/"]
    paths += [f"http://127.0.0.1:{visitor.http.base_url.port}/config", f"file://{secret(tmp_path)}", "", "~", "."]
    forged: list[Any] = []
    for path in map(str, paths):
        forged += [{"path": path}, {"path": path, **META}]
    path, url = str(secret(tmp_path)), "data:image/png;base64,AAAA"
    forged += [
        {"path": path, "is_stream": True, **META},
        {"path": path, "url": f"{visitor.base}{API}/file={path}", **META},
        {"path": None, "url": f"{visitor.base}{API}/file={path}"},
        {"url": url},
        {"path": "a.png", "url": url, **META},
        {"path": 7, **META},
        {"value": {"path": path, **META}},
        {"background": {"path": path, **META}, "layers": [], "composite": {"path": path, **META}},
    ]
    answers = [visitor.edit(image) for image in forged[:-2]]
    assert all(answer["success"] is False for answer in answers)
    assert {answer["output"]["error"] for answer in answers} == {
        "image: there is none, or it is no longer stored: upload one"
    }
    assert all(visitor.edit(image)["success"] is False for image in forged[-2:])
    own_answer = visitor.edit({"path": own, "url": f"{visitor.base}{API}/file={own}", "orig_name": "a.png", **META})
    assert own_answer["success"] is True


def test_files_of_other_fields_and_direct_calls_are_no_way_round(visitor: Visitor, tmp_path: Path) -> None:
    path = {"path": str(secret(tmp_path)), **META}
    answer = visitor.ask("draw", [path, "", 16, 16, 2, 2.0, 0.0, 1.0, "euler", 2, 0, 1])
    assert answer["output"]["error"] == "prompt: must be text"
    call = visitor.calls["edit"]["id"]
    body = {"data": [None, path, "a", "b", 2, 1, 1.0, 1.5, 0], "fn_index": call, "session_hash": "direct"}
    assert visitor.post(f"{API}/run/predict", json=body).status_code in (404, 500)


@pytest.mark.parametrize("value", [None, [], {}, {"a": 1}, True, "x", 10**400, -1, 1.5, float("inf"), "9" * 50])
def test_a_value_of_any_type_is_answered_in_words(visitor: Visitor, value: Any) -> None:
    values = ["a red circle", "", 16, 16, 2, 2.0, 0.0, 1.0, "euler", 2, 0, 1]
    for place in {*range(2, len(values))} - {values.index("euler")}:  # of choices Gradio answers, and logs it
        answer = visitor.ask("draw", [*values[:place], value, *values[place + 1 :]])
        assert answer["success"] or answer["output"]["error"] is not None, (place, answer)


def test_only_kept_files_are_served(visitor: Visitor, tmp_path: Path) -> None:
    own = visitor.upload(png("green")).json()[0]
    served = visitor.get(f"{API}/file={own}")
    assert (served.status_code, served.content, served.headers["content-type"]) == (200, png("green"), "image/png")
    real = str(next(visitor.temporary.glob(f"*{own}")))
    wrong = ["/etc/passwd", str(secret(tmp_path)), str(tmp_path / "missing"), real, str(visitor.model / "config.yaml")]
    wrong += [f"{own}/../../../x", own.replace("image.png", "other.png"), own.rpartition("/")[0], "launch/serve.py"]
    wrong += [f"http://127.0.0.1:{visitor.http.base_url.port}/config", "https://example.org/", "/uploads", ""]
    answers = [visitor.get(f"{API}/file={path}") for path in wrong]
    assert {(answer.status_code, answer.text) for answer in answers} == {(404, "Not Found")}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/proxy=https://example.org/"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/gradio_api/deep_link?session_hash=first"),
        ("GET", "/gradio_api/stream/first/0/0/playlist-file"),
        ("GET", "/gradio_api/custom_component/x/client/component/index.js"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/dev/reload"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/call/predict"),
        ("POST", "/gradio_api/call/v2/predict"),
        ("POST", "/gradio_api/stream/x"),
        ("POST", "/gradio_api/vibe-code"),
        ("POST", "/login"),
        ("POST", "/"),
        ("PUT", "/config"),
        ("GET", "//config"),
    ],
)
def test_what_the_page_does_not_need_is_shut(visitor: Visitor, method: str, path: str) -> None:
    answer = visitor.http.request(method, visitor.base + path, json={} if method == "POST" else None)
    assert (answer.status_code, answer.text) == (404, "Not Found")


@pytest.mark.parametrize(
    "path", ["/static/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/routes.py", "/static//etc/hosts"]
)
def test_gradios_own_files_are_no_way_out(visitor: Visitor, path: str) -> None:
    url = httpx.URL(visitor.base).copy_with(raw_path=path.encode())
    assert visitor.http.get(url).status_code in (403, 404)


def test_uploads_are_bounded(visitor: Visitor) -> None:
    def pieces(count: int) -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(count):
            yield bytes(2**20)
        yield b"\r\n--x--\r\n"

    form = {"content-type": "multipart/form-data; boundary=x"}
    assert visitor.post(f"{API}/upload", content=pieces(32), headers=form).status_code == 200
    with suppress(httpx.WriteError):  # the server does not wait for the rest
        assert visitor.post(f"{API}/upload", content=pieces(40), headers=form).status_code == 413
    two = [("files", (name, b"")) for name in ("a.png", "b.png")]
    assert visitor.post(f"{API}/upload", files=two).status_code == 400
    assert visitor.post(f"{API}/upload", content=b"x" * 100).status_code == 400
    assert visitor.post(f"{API}/upload", data={"files": "/etc/passwd"}).status_code == 400
    assert visitor.upload(b"<script>", "a.html").status_code == 415
    assert visitor.upload(b"<svg/>", "a.svg").status_code == 415
    address = visitor.upload(png(), "../../../etc/a.png").json()[0]
    assert next(visitor.temporary.glob(f"*{address}")).name == "image.png"
    assert {path.name for path in visitor.temporary.glob("*/*")} <= {"uploads", "pictures", "gradio"}
    assert visitor.post(f"{API}/queue/join", json={"data": ["x" * 2**20]}).status_code == 413
    for body in (b"{", b"[" * 100_000, b"\xff"):
        answer = visitor.post(f"{API}/queue/join", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400


def test_words_that_are_cut_are_said(visitor: Visitor) -> None:
    long, said = "a red circle " * 9, "is longer than text.length 8 tokens and is cut"
    address = visitor.upload(png()).json()[0]
    image = {"path": address, **META}
    for answer, fields in (
        (visitor.draw(), []),
        (visitor.draw(long), ["prompt"]),
        (visitor.draw(negative=long), ["negative prompt"]),
        (visitor.edit(image), []),
        (visitor.edit(image, source=long), ["what the image shows"]),
        (visitor.edit(image, long, long), ["what the image shows", "what it is to show"]),
    ):
        assert address_of(answer)
        told = json.dumps(answer["output"])
        assert told.count(said) == len(fields) and all(f"<p>{field}: {said}" in told for field in fields)


@pytest.mark.parametrize(
    ("suffix", "type_"),
    [("jfif", "jpeg"), ("JPE", "jpeg"), ("avif", "avif"), ("tif", "tiff"), ("tiff", "tiff"), ("webp", "webp")],
)
def test_every_format_that_is_decoded_may_be_brought(visitor: Visitor, suffix: str, type_: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(data, type_)
    address = visitor.upload(data.getvalue(), f"a.{suffix}").json()[0]
    assert visitor.get(f"{API}/file={address}").headers["content-type"] == f"image/{type_}"
    assert address_of(visitor.edit({"path": address, **META}))


def test_one_who_leaves_in_the_middle_of_an_upload_takes_no_place(visitor: Visitor) -> None:
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    head += (
        f'Content-Length: {2**25}\r\n\r\n--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    for _ in range(40):  # more than may be on its way at once
        with socket.create_connection(("127.0.0.1", visitor.http.base_url.port or 0)) as connection:
            connection.sendall(head.encode() + bytes(2**23))
    assert visitor.upload(png()).status_code == 200


def test_an_upload_that_stalls_gives_its_place_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UPLOAD_TIMEOUT_S", 0.1)
    monkeypatch.setattr(limits, "MOST_ARRIVING", 1000)
    uploads = FileCache(tmp_path / "uploads", 9, 2**20)
    entrance = limits.RequestFilter(PlainTextResponse("never asked"), tmp_path, uploads, uploads)
    begun = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(700)

    async def upload(*pieces: bytes) -> int:
        """The status of the answer to a form of which more is to come."""
        left, told = [*pieces], list[Message]()

        async def receive() -> Message:
            if not left:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or len(pieces) == 1}

        async def send(message: Message) -> None:
            told.append(message)

        headers = [(b"content-type", b"multipart/form-data; boundary=x")]
        await entrance({"type": "http", "method": "POST", "path": f"{API}/upload", "headers": headers}, receive, send)
        return int(told[0]["status"])

    async def visits() -> list[int]:
        stalled = asyncio.create_task(upload(begun))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        crowded = await upload(begun, b"\r\n--x--\r\n")
        return [crowded, await stalled, await upload(begun, b"\r\n--x--\r\n")]

    assert asyncio.run(visits()) == [503, 408, 200]


def test_neither_pictures_nor_answers_say_where_the_servers_files_are(visitor: Visitor) -> None:
    visitor.get("/")
    visitor.get(f"{API}/info")
    drawn = visitor.get(f"{API}/file={address_of(visitor.draw())}")
    own = visitor.upload(png()).json()[0]
    edited = visitor.get(f"{API}/file={address_of(visitor.edit({'path': own, **META}))}")
    for picture in (drawn, edited):
        settings = json.loads(Image.open(io.BytesIO(picture.content)).text["settings"])
        assert (settings["model"], settings["which"], len(settings["weights"])) == ("run", "ema", 32)
    assert len(visitor.answers) > 20
    places = {str(visitor.temporary), str(visitor.model), str(ROOT), sys.prefix, "t2i-serve-"}
    spelled = {spelling.encode() for place in places for spelling in (place, json.dumps(place)[1:-1], quote(place))}
    assert not [(spelling, answer) for answer in visitor.answers for spelling in spelled if spelling in answer]
