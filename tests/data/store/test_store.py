"""Stores: a directory and an S3 server on loopback give the same names and bytes, and say what is wrong."""

from __future__ import annotations

import errno
import os
import pickle
import random
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import exceptions as aws
from fault_proxy import FAULTS, FaultProxy

import data.store.s3
from data.errors import DataError, StoreError
from data.store import ReadOnly, StoreOptions, WritableStore, open_store
from data.store.base import Fault, Retries

CONTENT = {"a.tar": b"0123456789", "deep/b.tar": b"xyz", "deep/c.txt": b"", "z.tar": bytes(range(256)) * 40}
LARGE = random.Random(0).randbytes(300_000)
PART = 5 << 20  # the least that S3 allows
ACCESS_KEY, SECRET = "AKIATHEACCESSKEY", "theverysecretkey"  # as conftest.py has them
REPORTED = {
    "reset": "broken",
    "truncate": "broken",
    "refuse": "broken",
    "stall": "timeout",
    "slowdown": "throttled",
    "error": "server",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Retries, "_FIRST_S", 0.001)
    monkeypatch.setattr(Retries, "_CAP_S", 0.01)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> WritableStore:
    if request.param == "local":
        for name, content in CONTENT.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return open_store(str(tmp_path))
    endpoint = request.getfixturevalue("endpoint")
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    for name, content in {**CONTENT, "": b"", "deep/": b""}.items():  # markers of folders, as consoles make them
        client.put_object(Bucket="bucket", Key=f"some/prefix/{name}", Body=content)
    client.put_object(Bucket="bucket", Key="some/prefix2/other.tar", Body=b"not below the prefix")
    return open_store("s3://bucket/some/prefix/", StoreOptions(endpoint=endpoint))


@pytest.fixture
def bucket(request: pytest.FixtureRequest, endpoint: str) -> str:
    """The URL of a bucket of the test's own."""
    name = f"b{zlib.crc32(request.node.name.encode()):08x}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    return f"s3://{name}/p"


@pytest.fixture
def scripted() -> Iterator[Callable[..., str]]:
    """`scripted(status, body, **headers)` makes a server that answers so to everything, and returns its URL."""
    servers = []

    def start(status: int, body: bytes = b"", **headers: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def requests_of(store: Any, operation: str) -> list[dict[str, Any]]:
    """The parameters of every request of this kind from now on."""
    seen: list[dict[str, Any]] = []
    store._client.meta.events.register(
        f"provide-client-params.s3.{operation}", lambda params, **_: seen.append(dict(params))
    )
    return seen


def refused(code: str, status: int) -> aws.ClientError:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}}}
    return aws.ClientError(answer, "Operation")


def test_list_and_read(store: WritableStore) -> None:
    infos = store.list(".tar")
    assert [(info.name, info.size) for info in infos] == [("a.tar", 10), ("deep/b.tar", 3), ("z.tar", 10240)]
    assert all(info.version and '"' not in info.version for info in infos)
    assert all(abs(info.modified - time.time()) < 60 for info in infos)
    assert len(store.list()) == 4
    assert store.read("a.tar") == b"0123456789"
    assert store.read("a.tar", 3, 7) == b"3456"
    assert store.read("a.tar", 8) == b"89"
    assert store.read("a.tar", 4, 4) == b""
    assert store.read("a.tar", 10) == b""
    assert store.read("deep/c.txt") == b""
    assert pickle.loads(pickle.dumps(store)).read("z.tar", 255, 258) == bytes([255, 0, 1])


def test_info(store: WritableStore) -> None:
    listed = {info.name: info for info in store.list()}
    assert store.info("deep/b.tar") == listed["deep/b.tar"]
    assert store.info("none.tar") is None
    assert store.info("a.tar/below") is None
    assert store.info("deep") is None


def test_an_object_that_is_gone_or_shorter_says_so(store: WritableStore) -> None:
    with pytest.raises(DataError, match=r"none\.tar"):
        store.read("none.tar")
    with pytest.raises(DataError, match=r"a\.tar ends before byte 20"):
        store.read("a.tar", 5, 20)
    with pytest.raises(DataError, match=r"a\.tar ends before byte 60"):
        store.read("a.tar", 50, 60)
    with pytest.raises(DataError, match=r"a\.tar ends before byte 11"):
        store.read("a.tar", 11)


def test_a_read_is_of_the_version_asked_for(store: WritableStore) -> None:
    info = store.info("a.tar")
    assert info is not None
    assert store.read("a.tar", 2, 4, version=info.version) == b"23"
    time.sleep(0.01)  # a clock tick of the file system
    store.write("a.tar", b"9876543210")
    with pytest.raises(DataError, match=r"a\.tar changed since it was indexed; index the source anew"):
        store.read("a.tar", 2, 4, version=info.version)
    assert store.read("a.tar", 2, 4) == b"76"


def test_write_and_upload(store: WritableStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.store.s3, "_PART", PART)
    store.write("new/folder/a", b"first")
    store.write("new/folder/a", b"second")
    assert store.read("new/folder/a") == b"second"
    content = random.Random(1).randbytes(2 * PART + 7)
    for size in (0, 1000, 2 * PART, len(content)):
        (tmp_path / "local").write_bytes(content[:size])
        store.upload("new/b", tmp_path / "local")
        assert store.read("new/b") == content[:size]
    with pytest.raises(DataError, match="nowhere"):
        store.upload("new/c", tmp_path / "nowhere")
    (tmp_path / "local").unlink()
    assert [info.name for info in store.list() if info.name not in CONTENT] == ["new/b", "new/folder/a"]


def test_delete(store: WritableStore, tmp_path: Path) -> None:
    store.write("gone/folder/a", b"1")
    store.write("gone/folder/b", b"2")

    def left() -> list[str]:
        return [info.name for info in store.list() if info.name.startswith("gone/")]

    store.delete("gone/folder/a")
    assert left() == ["gone/folder/b"]
    store.delete("gone/folder/a")  # already
    store.delete("gone/folder/b")
    assert left() == [] and not (tmp_path / "gone" / "folder").exists()
    assert store.read("a.tar")


def test_more_objects_than_one_page_are_all_listed(endpoint: str, bucket: str, quick: None) -> None:
    direct, names = open_store(bucket, StoreOptions(endpoint=endpoint)), [f"{n:02}.tar" for n in range(20)]
    for name in names:
        direct.write(name, b"x")
    with FaultProxy(endpoint, share=0.5, kinds=("truncate", "error")) as proxy:
        store: Any = open_store(bucket, StoreOptions(endpoint=proxy.url))
        store._client.meta.events.register(
            "provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 3}
        )
        pages = requests_of(store, "ListObjectsV2")
        for _ in range(5):
            assert [info.name for info in store.list(".tar")] == names
        assert proxy.counts["truncate"] > 5
        assert len(pages) == 5 * 7 + proxy.counts["truncate"] + proxy.counts["error"]


@pytest.mark.parametrize("kind", sorted(REPORTED))
def test_every_kind_of_fault_is_reported_and_no_byte_lost(endpoint: str, bucket: str, quick: None, kind: str) -> None:
    open_store(bucket, StoreOptions(endpoint=endpoint)).write("a", LARGE)
    with FaultProxy(endpoint, share=0.5, kinds=(kind,), seed=1) as proxy:
        patience = 0.3 if kind == "stall" else 60
        store, faults = open_store(bucket, StoreOptions(endpoint=proxy.url, read_timeout_s=patience)), Counter[str]()
        for start, stop in [(0, None), (1, len(LARGE) - 1), (100_000, None), (0, 200_000)]:
            content = store.read("a", start, stop, on_fault=lambda fault: faults.update([fault]))
            assert content == LARGE[start:stop]
        assert set(faults) == {REPORTED[kind]}
        # A server that is slow for once is a timeout too.
        assert faults.total() == proxy.counts[kind] or (kind == "stall" and faults.total() > proxy.counts[kind])
        assert proxy.counts[kind] >= 2


def test_everything_goes_through_all_faults_at_once(
    endpoint: str, bucket: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.store.s3, "_PART", PART)
    (tmp_path / "file").write_bytes(content := random.Random(2).randbytes(3 * PART + 1))
    with FaultProxy(endpoint, share=0.5, seed=2, latency_s=0.01) as proxy:
        store = open_store(bucket, StoreOptions(endpoint=proxy.url, read_timeout_s=0.5))
        for n in range(5):
            store.write(f"{n}.tar", bytes([n]) * 1000)
        store.upload("large", tmp_path / "file")
        for n in range(5):
            assert store.read(f"{n}.tar") == bytes([n]) * 1000
            info = store.info(f"{n}.tar")
            assert info is not None
            assert info.size == 1000
            assert store.info(f"{n}.none") is None
            assert [info.name for info in store.list(".tar")] == [f"{n}.tar" for n in range(5)]
        assert set(proxy.counts) == {"requests", "connections", *FAULTS}
    assert open_store(bucket, StoreOptions(endpoint=endpoint)).read("large") == content


def test_a_broken_body_goes_on_where_it_broke(endpoint: str, bucket: str, quick: None) -> None:
    open_store(bucket, StoreOptions(endpoint=endpoint)).write("a", LARGE)
    with FaultProxy(endpoint, share=0.7, kinds=("reset", "truncate"), seed=4) as proxy:
        store = open_store(bucket, StoreOptions(endpoint=proxy.url))
        sent = requests_of(store, "GetObject")
        assert store.read("a") == LARGE
        starts = [int(params.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]) for params in sent]
        assert len(starts) == 1 + proxy.counts["reset"] + proxy.counts["truncate"]
        assert starts == sorted(starts)
        assert 0 < starts[-1] < len(LARGE)


def test_an_object_that_changes_between_the_requests_of_a_read(endpoint: str, bucket: str, quick: None) -> None:
    direct = open_store(bucket, StoreOptions(endpoint=endpoint))
    direct.write("a", LARGE)
    with FaultProxy(endpoint, share=1, kinds=("truncate",)) as proxy:

        def overwrite(kind: str) -> None:
            direct.write("a", LARGE[::-1])
            proxy.share = 0

        with pytest.raises(DataError, match="/a changed since it was indexed"):
            open_store(bucket, StoreOptions(endpoint=proxy.url)).read("a", on_fault=overwrite)


def test_a_file_that_changes_between_the_attempts_of_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    (tmp_path / "a").write_bytes(b"content")
    store, real, errors = open_store(str(tmp_path)), os.preadv, iter([errno.EIO, errno.ESTALE, errno.ETIMEDOUT])

    def flaky(*args: Any) -> int:
        for error in errors:
            raise OSError(error, "made up")
        return real(*args)

    monkeypatch.setattr(os, "preadv", flaky)
    kinds: list[str] = []
    assert store.read("a", on_fault=kinds.append) == b"content"
    assert kinds == ["broken", "broken", "timeout"]
    errors = iter([errno.EIO])
    with pytest.raises(DataError, match="a changed"):
        store.read("a", on_fault=lambda _: (tmp_path / "a").unlink() or store.write("a", b"another"))
    errors = iter([errno.EIO] * 999)
    with pytest.raises(StoreError, match=r"reading .*/a: .*made up"):
        open_store(str(tmp_path), StoreOptions(retry_minutes=0.001)).read("a")
    errors = iter([errno.ELOOP])
    with pytest.raises(DataError, match="made up"):
        store.read("a")


def test_a_deadline_without_progress_ends_the_call(endpoint: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    store: Any = open_store("s3://bucket/p", StoreOptions(endpoint=url, retry_minutes=0.01))
    assert store._client, "it takes a while to make"
    kinds: list[str] = []
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"reading s3://bucket/p/a\.tar at http://127.*Could not connect"):
        store.read("a.tar", on_fault=kinds.append)
    assert 0.6 <= time.monotonic() - start < 20
    assert set(kinds) == {"broken"}
    assert len(kinds) >= 3
    with pytest.raises(StoreError):
        store.list()


def test_patience_is_measured_from_the_last_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now, delays = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds + 1  # an attempt takes a second
        delays.append(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def attempt() -> None:
        if len(delays) < 500:
            retries.progress()
        raise OSError("made up")

    retries = Retries("reading x", 10)
    with pytest.raises(StoreError, match="reading x: .*10 minutes.*made up"):
        retries.run(attempt, (OSError,), lambda error: Fault("broken", str(error)))
    patient, lonely = delays[:500], delays[500:]
    assert sum(patient) > 40
    assert max(patient) <= 0.4
    assert 595 < sum(lonely) + len(lonely) < 603
    assert 15 < max(lonely) <= 20
    assert min(lonely[8:]) < 10  # full jitter


ERROR = "<Error><Code>{}</Code><Message>made up {} {}</Message><AWSAccessKeyId>{}</AWSAccessKeyId></Error>"


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (403, "InvalidAccessKeyId", "access key"),
        (403, "SignatureDoesNotMatch", "the secret"),
        (403, "AccessDenied", "grant"),
        (404, "NoSuchBucket", "bucket does not exist"),
        (404, "NoSuchKey", "object does not exist"),
        (301, "PermanentRedirect", "set region to it, eu-moon-1"),
        (400, "ExpiredToken", "expired"),
        (403, "RequestTimeTooSkewed", "clock"),
        (501, "NotImplemented", "501"),
    ],
)
def test_refusals_are_named_at_once_and_keep_secrets(
    endpoint: str, scripted: Callable[..., str], status: int, code: str, says: str
) -> None:
    body = ERROR.format(code, ACCESS_KEY, SECRET, ACCESS_KEY).encode()
    url = scripted(status, body, x_amz_bucket_region="eu-moon-1")
    store = open_store("s3://bucket/p", StoreOptions(endpoint=url))
    calls = [lambda: store.read("a"), lambda: store.list(), lambda: store.write("a", b"x")]
    if code != "NoSuchKey":
        calls.append(lambda: store.info("a"))
    for call in calls:
        with pytest.raises(DataError) as caught:
            call()
        assert code in str(caught.value)
        assert says in str(caught.value)
        assert "s3://bucket/p" in str(caught.value)
        assert ACCESS_KEY not in str(caught.value)
        assert SECRET not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # from a worker to its parent
        assert isinstance(caught.value, ReadOnly) == (code == "AccessDenied" and call is calls[2])


def test_lasting_faults_keep_secrets(endpoint: str, scripted: Callable[..., str]) -> None:
    url = scripted(500, ERROR.format("InternalError", ACCESS_KEY, SECRET, ACCESS_KEY).encode())
    with pytest.raises(StoreError, match="1 requests? in a row.*500 InternalError") as caught:
        open_store("s3://bucket/p", StoreOptions(endpoint=url, retry_minutes=0)).read("a")
    assert ACCESS_KEY not in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (503, "", "throttled"),
        (429, "", "throttled"),
        (400, "RequestLimitExceeded", "throttled"),
        (500, "", "server"),
        (502, "", "server"),
        (409, "OperationAborted", "server"),
        (408, "", "timeout"),
        (400, "RequestTimeout", "timeout"),
        (400, "IncompleteBody", "broken"),
    ],
)
def test_answers_that_may_pass(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, quick: None, status: int, code: str, kind: str
) -> None:
    store: Any = open_store("s3://bucket/p", StoreOptions(endpoint=endpoint, retry_minutes=0.001))

    def answer(**_: Any) -> Any:
        raise refused(code, status)

    monkeypatch.setattr(store._client, "get_object", answer)
    kinds: list[str] = []
    with pytest.raises(StoreError, match=str(status)):
        store.read("a", on_fault=kinds.append)
    assert len(kinds) > 1
    assert set(kinds) == {kind}


def test_an_empty_answer_is_no_empty_listing(endpoint: str, scripted: Callable[..., str]) -> None:
    with pytest.raises(StoreError, match="ended early"):
        open_store("s3://bucket/p", StoreOptions(endpoint=scripted(200), retry_minutes=0)).list()


def test_64_kib_of_a_body_are_progress_over_requests_too(
    endpoint: str, bucket: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, noted = open_store(bucket, StoreOptions(endpoint=endpoint)), []
    store.write("a", LARGE)
    monkeypatch.setattr(Retries, "progress", lambda retries: noted.append(retries))
    monkeypatch.setattr(Retries, "_wait", lambda *_: None)
    store.read("a", 0, (64 << 10) - 1)
    assert len(noted) == 1, "the call begins"
    noted.clear()
    store.read("a")
    assert 3 <= len(noted) - 1 <= 4  # a piece may be a little longer
    noted.clear()
    with FaultProxy(endpoint, share=1, kinds=("truncate",), seed=5) as proxy:
        broken: Any = open_store(bucket, StoreOptions(endpoint=proxy.url))

        def once_more(kind: str) -> None:
            proxy.share = 0 if proxy.counts["truncate"] > 15 else 1

        assert broken.read("a", on_fault=once_more) == LARGE
        assert 3 <= len(noted) - 1 <= 4


def test_a_server_that_overlooks_ranges(endpoint: str, scripted: Callable[..., str]) -> None:
    store = open_store("s3://bucket/p", StoreOptions(endpoint=scripted(200, b"0123456789", ETag='"v1"')))
    assert store.read("a") == b"0123456789"
    assert store.read("a", 0, 4) == b"0123"
    with pytest.raises(DataError, match="does not answer ranged requests"):
        store.read("a", 2, 4)


def test_options_reach_every_request(
    endpoint: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.store.s3, "_PART", PART)
    options = StoreOptions(endpoint=endpoint, requester_pays=True, connect_timeout_s=3, read_timeout_s=4)
    store: Any = pickle.loads(pickle.dumps(open_store(bucket, options)))
    sent = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request))
    (tmp_path / "file").write_bytes(bytes(2 * PART))
    store.upload("large", tmp_path / "file")
    store.write("a", b"x")
    store.read("a")
    store.info("a")
    store.list()
    assert len(sent) == 8
    assert all(request.headers.get("x-amz-request-payer") == b"requester" for request in sent)
    assert (store._client.meta.config.connect_timeout, store._client.meta.config.read_timeout) == (3, 4)
    sent.clear()
    plain: Any = open_store(bucket, replace(options, requester_pays=False))
    plain._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request))
    plain.list()
    assert "x-amz-request-payer" not in sent[0].headers


def test_an_upload_whose_last_answer_is_lost_is_done(
    endpoint: str, bucket: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.store.s3, "_PART", PART)
    store: Any = open_store(bucket, StoreOptions(endpoint=endpoint))
    (tmp_path / "file").write_bytes(content := LARGE * 20)
    complete, gone = store._client.complete_multipart_upload, refused("NoSuchUpload", 404)
    errors: list[Exception] = [aws.ReadTimeoutError(endpoint_url=endpoint), gone]

    def lost(**arguments: Any) -> Any:
        if len(errors) == 2:
            complete(**arguments)
        raise errors.pop(0)

    monkeypatch.setattr(store._client, "complete_multipart_upload", lost)
    store.upload("a", tmp_path / "file")
    assert not errors
    assert store.read("a") == content
    errors = [gone]
    with pytest.raises(DataError, match="aborted from elsewhere"):
        store.upload("b", tmp_path / "file")


def test_a_failed_upload_leaves_nothing(
    endpoint: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.store.s3, "_PART", PART)
    store: Any = open_store(bucket, StoreOptions(endpoint=endpoint, retry_minutes=0))
    (tmp_path / "file").write_bytes(bytes(3 * PART))
    upload_part = store._client.upload_part

    def denied(**arguments: Any) -> Any:
        if arguments["PartNumber"] == 2:
            raise refused("AccessDenied", 403)
        return upload_part(**arguments)

    monkeypatch.setattr(store._client, "upload_part", denied)
    with pytest.raises(ReadOnly, match="s3:PutObject"):
        store.upload("a", tmp_path / "file")
    assert store.info("a") is None
    assert "Uploads" not in store._client.list_multipart_uploads(Bucket=bucket.split("/")[2])


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    for name in ("elsewhere/deep/a.tar", "root/sub/b.tar", "root/c.txt", "root/sub/.d.1234.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "sub" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "sub" / "above").symlink_to(tmp_path)
    (tmp_path / "root" / "again").symlink_to(tmp_path / "root" / "sub")
    (tmp_path / "root" / "later").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "root" / "gone.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "root" / "itself").symlink_to("itself")
    (tmp_path / "elsewhere" / "deep" / "here").symlink_to(".")
    (tmp_path / "root" / "file.tar").symlink_to(tmp_path / "root" / "sub" / "b.tar")
    os.mkfifo(tmp_path / "root" / "pipe.tar")
    (tmp_path / "root" / "e.tar.partial").touch()
    store, left_out = open_store(str(tmp_path / "root")), Counter[str]()
    infos = store.list(left_out=left_out)
    assert [info.name for info in infos] == ["c.txt", "file.tar", "later/a.tar", "sub/b.tar"]
    assert [store.info(info.name) for info in infos] == infos
    assert store.read("linked/deep/a.tar") == b"elsewhere/deep/a.tar"
    assert left_out == {
        "hidden": 1,
        "broken links": 2,
        "links to folders that are listed already": 5,
        "neither files nor folders": 1,
        "unfinished (.partial)": 1,
    }


HIDDEN = (
    ".ipynb_checkpoints/a.tar",
    ".snapshot/hourly/a.tar",
    ".snapshot/b.tar",
    "sub/.Trash-1000/a.tar",
    "sub/._b.tar",
)
SYSTEM = ("__MACOSX/a.tar", "@eaDir/a.tar", "#snapshot/a.tar", "deep/lost+found/a.tar", "$RECYCLE.BIN/a.tar")


def test_hidden_and_system_files_are_left_out_alike_everywhere(store: WritableStore) -> None:
    counted = ["@eaDir.tar", "a..b/c.tar", "lost+found.tar", "sub/a.tar"]
    for name in (*HIDDEN, *SYSTEM, *counted):
        store.write(name, b"x")
    left_out = Counter[str]()
    assert [info.name for info in store.list(".tar", left_out) if info.name not in CONTENT] == counted
    # The two files of .snapshot are one thing that is hidden.
    assert left_out == {"hidden": 4, "in system folders (snapshots, recycle bins)": 5}
    assert store.read(HIDDEN[0]) == b"x"


def test_a_folder_that_may_not_be_listed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    scandir = os.scandir

    def denied(path: str) -> Any:
        if path.endswith("sub"):
            raise OSError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"not possible: Permission denied \(.*sub\)"):
        open_store(str(tmp_path)).list()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    store.write("a", b"old")

    def fail(_: int) -> None:
        assert [info.name for info in store.list()] == ["a"]
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ReadOnly, match=r"writing .*/a is not possible: Read-only"):
        store.write("a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert store.read("a") == b"old"


def test_a_forked_process_makes_connections_of_its_own(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = open_store("s3://bucket/p", StoreOptions(endpoint=endpoint))
    mine = store._client
    assert store._client is mine
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert store._client is not mine
    assert store._client is store._client


def test_user_mistakes_are_named(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.*not a directory"):
        open_store(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="scheme"):
        open_store("gs://bucket/prefix")
    missing = open_store("s3://no-such-bucket/x", StoreOptions(endpoint=endpoint))
    for call in (missing.list, lambda: missing.info("a"), lambda: missing.read("a"), lambda: missing.write("a", b"")):
        with pytest.raises(DataError, match="bucket does not exist"):
            call()
    with pytest.raises(DataError, match="nobody"):
        open_store("s3://bucket", StoreOptions(profile="nobody"))
    for url, options in [
        (f"s3://{ACCESS_KEY}:{SECRET}@bucket/x", StoreOptions()),
        ("s3://bucket/x", StoreOptions(endpoint=f"http://{ACCESS_KEY}:{SECRET}@127.0.0.1:9000")),
    ]:
        with pytest.raises(DataError, match="credentials in boto3's usual places") as caught:
            open_store(url, options)
        assert SECRET not in str(caught.value)


def test_missing_credentials_are_named(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match="credentials"):
        open_store("s3://bucket", StoreOptions(endpoint=endpoint)).list()
    boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="k", aws_secret_access_key="s").create_bucket(
        Bucket="public", ACL="public-read"
    )
    assert open_store("s3://public", StoreOptions(endpoint=endpoint, anonymous=True)).list() == []
