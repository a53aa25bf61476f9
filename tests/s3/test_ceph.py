"""The store against a real S3 server: signatures, ranges, conditions, multipart, listing, and real faults."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any
from urllib.request import urlopen

import ceph as harness
import psutil
import pytest
from ceph import Ceph, Unavailable
from tap import Tap

from data.errors import DataError, StoreError
from data.store import ReadOnly, StoreOptions, WritableStore, open_store

pytestmark = pytest.mark.s3


def connect(bucket: str, endpoint: str, **options: Any) -> WritableStore:
    return open_store(f"s3://{bucket}", StoreOptions(endpoint=endpoint, region="us-east-1", **options))


def digest(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()  # a failed comparison of 64 MiB would be printed in full


# Who may read


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "UNKNOWNKEY", "InvalidAccessKeyId"),
    ],
)
def test_wrong_credentials_are_named(
    ceph: Ceph, bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    store = connect(bucket, ceph.endpoint)
    for request in (store.list, lambda: store.read("a"), lambda: store.write("a", b"")):
        with pytest.raises(DataError, match=said) as error:
            request()
        assert ceph.secret_key not in str(error.value)
    with pytest.raises(DataError, match="credentials"):  # a HEAD is answered without a code
        store.info("a")


def test_no_credentials_are_named(ceph: Ceph, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match="anonymous"):
        connect(bucket, ceph.endpoint).list()


def test_anonymous_reads_what_is_public_alone(ceph: Ceph, bucket: str, client: Any) -> None:
    client.put_object(Bucket=bucket, Key="secret", Body=b"secret")
    client.put_object(Bucket=bucket, Key="public", Body=b"public", ACL="public-read")
    store = connect(bucket, ceph.endpoint, anonymous=True)
    with pytest.raises(DataError, match="AccessDenied"):
        store.list()
    with pytest.raises(DataError, match="AccessDenied"):
        store.read("secret")
    client.put_bucket_acl(Bucket=bucket, ACL="public-read")
    assert store.read("public") == b"public"
    assert [info.name for info in store.list()] == ["public", "secret"]
    with pytest.raises(ReadOnly):
        store.write("public", b"mine")
    assert connect(bucket, ceph.endpoint).read("public") == b"public"


def test_missing_bucket_and_object_are_named(ceph: Ceph, bucket: str) -> None:
    with pytest.raises(DataError, match="bucket does not exist"):
        connect("no-such-bucket", ceph.endpoint).list()
    store = connect(bucket, ceph.endpoint)
    assert store.info("absent.tar") is None
    with pytest.raises(DataError, match=r"absent\.tar"):
        store.read("absent.tar")


# What is read and written


def test_ranges_are_exact(ceph: Ceph, bucket: str) -> None:
    random_numbers = random.Random(1)
    content = random_numbers.randbytes((5 << 20) + 321)  # more than one of the server's 4 MiB pieces
    store = connect(bucket, ceph.endpoint)
    store.write("object", content)
    edges = [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, len(content) - 1, len(content)]
    ranges = [(start, stop) for start in edges for stop in edges if start <= stop]
    ranges += [tuple(sorted(random_numbers.choices(range(len(content) + 1), k=2))) for _ in range(50)]
    for start, stop in ranges:
        assert digest(store.read("object", start, stop)) == digest(content[start:stop]), (start, stop)
    assert digest(store.read("object", 4 << 20)) == digest(content[4 << 20 :])
    assert digest(store.read("object")) == digest(content)
    with pytest.raises(DataError, match="index the source anew"):
        store.read("object", 0, len(content) + 1)
    with pytest.raises(DataError, match="index the source anew"):
        store.read("object", len(content) + 1, len(content) + 2)


def test_empty_objects_and_odd_names(ceph: Ceph, bucket: str) -> None:
    store = open_store(f"s3://{bucket}/a prefix/", StoreOptions(endpoint=ceph.endpoint, region="us-east-1"))
    names = ["a b+c.tar", "d/100%25/ü&=?#.tar", "empty"]
    for name in names:
        store.write(name, b"" if name == "empty" else name.encode())
    assert [info.name for info in store.list()] == names
    assert [info.name for info in connect(bucket, ceph.endpoint).list()] == [f"a prefix/{name}" for name in names]
    assert [bytes(store.read(name)).decode() for name in names] == [*names[:-1], ""]


def test_info_agrees_with_list(ceph: Ceph, bucket: str) -> None:
    store = connect(bucket, ceph.endpoint)
    before = time.time()
    store.write("a/b.tar", b"content")
    (listed,) = store.list()
    found = store.info("a/b.tar")
    assert found is not None
    assert (found.name, found.size, found.version) == (listed.name, listed.size, listed.version)
    assert listed.version == hashlib.md5(b"content").hexdigest()
    for info in (listed, found):
        assert before - 2 < info.modified < time.time() + 2


def test_a_listing_has_all_its_pages(ceph: Ceph, bucket: str) -> None:
    store = connect(bucket, ceph.endpoint)
    names = [f"{n % 7}/{n:05d}.{'tar' if n % 10 else 'txt'}" for n in range(2100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.write(name, b"x"), names))
    assert [info.name for info in store.list()] == sorted(names)
    assert [info.name for info in store.list(".txt")] == sorted(name for name in names if name.endswith(".txt"))


def test_a_multipart_upload_is_one_version(ceph: Ceph, bucket: str, client: Any, tmp_path: Path, big: bytes) -> None:
    content = big[: (20 << 20) + 7]
    (tmp_path / "shard").write_bytes(content)
    store = connect(bucket, ceph.endpoint)
    store.upload("shard.tar", tmp_path / "shard")
    found = store.info("shard.tar")
    assert found is not None
    assert int(found.version.partition("-")[2]) >= 2, "a multipart ETag ends in the number of its parts"
    assert found.version == store.list()[0].version
    assert found.size == len(content)
    assert digest(store.read("shard.tar", version=found.version)) == digest(content)
    assert digest(client.get_object(Bucket=bucket, Key="shard.tar")["Body"].read()) == digest(content)


def test_another_version_is_refused(ceph: Ceph, bucket: str) -> None:
    store = connect(bucket, ceph.endpoint)
    store.write("shard.tar", b"old content")
    (old,) = store.list()
    assert store.read("shard.tar", 4, 11, version=old.version) == b"content"
    store.write("shard.tar", b"new content")
    with pytest.raises(DataError, match=r"shard\.tar changed since it was indexed; index the source anew"):
        store.read("shard.tar", 4, 11, version=old.version)


# Faults that a real server makes


@pytest.mark.parametrize("versioned", [True, False])
def test_an_object_replaced_under_way_is_refused(
    big_bucket: str, client: Any, tap: Tap, versioned: bool, big: bytes
) -> None:
    store = connect(big_bucket, tap.endpoint)
    version = store.list()[0].version if versioned else None

    def replace() -> None:
        client.put_object(Bucket=big_bucket, Key="big", Body=bytes(len(big)))
        tap.cut()

    tap.after(16 << 20, replace)
    with pytest.raises(DataError, match="big changed since it was indexed; index the source anew"):
        store.read("big", version=version)


def test_slow_down_is_heeded(ceph: Ceph, big_bucket: str, client: Any, big: bytes) -> None:
    parts = [(n << 20, (n + 1) << 20) for n in range(32)]
    client.put_object_acl(Bucket=big_bucket, Key="big", ACL="public-read")
    faults: list[str] = []
    with ceph.throttled(2) as endpoint, ThreadPoolExecutor(len(parts)) as pool:
        # Two unread bodies fill the gateway until it has refused someone.
        held = [urlopen(f"{endpoint}/{big_bucket}/big") for _ in range(2)]

        def on_fault(kind: str) -> None:
            faults.append(kind)
            while held:
                held.pop().close()

        store = connect(big_bucket, endpoint)
        read = list(pool.map(lambda part: store.read("big", *part, on_fault=on_fault), parts))
    assert [digest(content) for content in read] == [digest(big[start:stop]) for start, stop in parts]
    assert set(faults) == {"throttled"}


def test_a_stalled_gateway_is_waited_for(ceph: Ceph, big_bucket: str, tap: Tap, big: bytes) -> None:
    faults: list[str] = []

    def on_fault(kind: str) -> None:
        faults.append(kind)
        ceph.resume()

    tap.after(16 << 20, ceph.pause)
    content = connect(big_bucket, tap.endpoint, read_timeout_s=0.5).read("big", on_fault=on_fault)
    assert digest(content) == digest(big)
    assert set(faults) == {"timeout"}
    assert_resumed(tap)


def test_a_killed_gateway_is_waited_for(ceph: Ceph, big_bucket: str, tap: Tap, big: bytes) -> None:
    faults: list[str] = []

    def on_fault(kind: str) -> None:
        faults.append(kind)
        if len(faults) == 3:  # it breaks, then refuses twice
            ceph.restart()

    version = connect(big_bucket, ceph.endpoint).list()[0].version
    tap.after(16 << 20, ceph.kill)
    content = connect(big_bucket, tap.endpoint).read("big", 1, version=version, on_fault=on_fault)
    assert digest(content) == digest(big[1:])
    assert faults == ["broken"] * 3
    assert_resumed(tap)


def assert_resumed(tap: Tap) -> None:
    """The first request got at least 8 MiB; the next one that reached the gateway went on from there."""
    assert len(tap.starts) == 2
    assert tap.starts[0] <= 1
    assert tap.starts[1] > 8 << 20


def test_a_gateway_that_stays_dead_is_given_up(ceph: Ceph, bucket: str) -> None:
    store = connect(bucket, ceph.endpoint, retry_minutes=0.02)
    store.write("shard.tar", b"content")
    ceph.kill()
    faults: list[str] = []
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"shard\.tar"):
        store.read("shard.tar", on_fault=faults.append)
    assert time.monotonic() - begin >= 1.2
    assert set(faults) == {"broken"}
    with pytest.raises(StoreError):
        store.list()
    with pytest.raises(StoreError):
        store.write("shard.tar", b"other")
    ceph.restart()
    assert store.read("shard.tar") == b"content"


def test_an_upload_outlives_its_gateway(
    ceph: Ceph, bucket: str, client: Any, tap: Tap, big: bytes, tmp_path: Path
) -> None:
    (tmp_path / "shard").write_bytes(big)
    killed = Event()

    def kill() -> None:
        ceph.kill()
        killed.set()

    tap.after(24 << 20, kill)
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(connect(bucket, tap.endpoint).upload, "shard.tar", tmp_path / "shard")
        assert killed.wait(60)
        ceph.restart()
        upload.result()
    assert digest(client.get_object(Bucket=bucket, Key="shard.tar")["Body"].read()) == digest(big)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)


def test_an_upload_given_up_leaves_no_object(
    ceph: Ceph, bucket: str, client: Any, tap: Tap, big: bytes, tmp_path: Path
) -> None:
    (tmp_path / "shard").write_bytes(big)
    store = connect(bucket, tap.endpoint, retry_minutes=0.02)
    tap.after(24 << 20, ceph.kill)
    with pytest.raises(StoreError, match=r"shard\.tar"):
        store.upload("shard.tar", tmp_path / "shard")
    ceph.restart()
    assert store.list() == []


# The server itself


def serve(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """The server as a program, and its daemons."""
    command = [sys.executable, harness.__file__, "--port", "0"]
    env = {**os.environ, "TMPDIR": str(folder)}  # a killed program leaves its files
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert program.stdout is not None
    assert set(json.loads(program.stdout.readline())) == {"endpoint", "access_key", "secret_key"}
    daemons = psutil.Process(program.pid).children(recursive=True)
    assert sorted(daemon.name() for daemon in daemons) == ["ceph-mon", "ceph-osd", "radosgw"]
    return program, daemons


@pytest.mark.parametrize("end", ["stdin", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_daemon_outlives_the_program(server: Ceph, tmp_path: Path, end: str | signal.Signals) -> None:
    program, daemons = serve(tmp_path)
    daemons[-1].suspend()  # a stopped one has to go as well
    if isinstance(end, signal.Signals):
        program.send_signal(end)
    else:
        assert program.stdin is not None
        program.stdin.close()
    assert program.wait(30) == (-9 if end == signal.SIGKILL else 0)
    _, alive = psutil.wait_procs(daemons, timeout=30)
    assert not alive
    assert end == signal.SIGKILL or not list(tmp_path.iterdir())


def test_an_unpack_cut_short_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package" / "DEBIAN").mkdir(parents=True)
    (tmp_path / "package" / "DEBIAN" / "control").write_text(
        "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m <m@m>\nDescription: d\n"
    )
    (tmp_path / "package" / "file").write_text("content")
    subprocess.run(["dpkg-deb", "--build", tmp_path / "package", tmp_path / "a.deb"], check=True, capture_output=True)
    debs = {"a.deb": (tmp_path / "a.deb").read_bytes(), "b.deb": b"cut short"}

    def download(folder: Path, options: list[str]) -> None:
        for name, content in debs.items():
            (folder / name).write_bytes(content)

    monkeypatch.setattr(harness, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(harness, "ROOT", tmp_path / "cache" / "root")
    monkeypatch.setattr(harness, "_download", download)
    with pytest.raises(subprocess.CalledProcessError):
        harness.fetch()
    assert not harness.ROOT.exists()
    del debs["b.deb"]
    assert (harness.fetch() / "file").read_text() == "content"
    assert sorted(os.listdir(harness.CACHE)) == ["lock", "root"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="no-such-package"):
        harness._apt(tmp_path, "download", "no-such-package")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="apt-get"):
        harness.fetch()
