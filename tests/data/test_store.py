"""Stores: a directory and a real S3 server on loopback give the same names and bytes, and say what is wrong."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from data.errors import DataError, StoreError
from data.store import Store, open_store

CONTENT = {"a.tar": b"0123456789", "deep/b.tar": b"xyz", "deep/c.txt": b"", "z.tar": bytes(range(256)) * 40}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    kept = dict(os.environ)
    os.environ.update(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        for name, content in CONTENT.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return open_store(str(tmp_path))
    endpoint = request.getfixturevalue("endpoint")
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    for name, content in CONTENT.items():
        client.put_object(Bucket="bucket", Key=f"some/prefix/{name}", Body=content)
    client.put_object(Bucket="bucket", Key="some/prefix2/other.tar", Body=b"not below the prefix")
    return open_store("s3://bucket/some/prefix/", endpoint=endpoint)


def test_list_and_read(store: Store) -> None:
    infos = store.list(".tar")
    assert [(info.name, info.size) for info in infos] == [("a.tar", 10), ("deep/b.tar", 3), ("z.tar", 10240)]
    assert all(info.version for info in infos)
    assert len(store.list()) == 4
    assert store.read("a.tar") == b"0123456789"
    assert store.read("a.tar", 3, 7) == b"3456"
    assert store.read("a.tar", 8) == b"89"
    assert store.read("a.tar", 4, 4) == b""
    assert store.read("deep/c.txt") == b""
    assert pickle.loads(pickle.dumps(store)).read("z.tar", 255, 258) == bytes([255, 0, 1])


def test_an_object_that_is_gone_or_shorter_says_so(store: Store) -> None:
    with pytest.raises(DataError, match=r"none\.tar"):
        store.read("none.tar")
    with pytest.raises(DataError, match=r"a\.tar.*(ends before byte 20|shorter)"):
        store.read("a.tar", 5, 20)
    with pytest.raises(DataError, match="a.tar"):
        store.read("a.tar", 50, 60)


def test_more_objects_than_one_page_are_all_listed(endpoint: str) -> None:
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="many")
    for n in range(7):
        client.put_object(Bucket="many", Key=f"p/{n}.tar", Body=b"x")
    store: Any = open_store("s3://many/p", endpoint=endpoint)
    pages = []

    def three_a_page(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        pages.append(params)
        return {**params, "MaxKeys": 3}

    store._client.meta.events.register("provide-client-params.s3.ListObjectsV2", three_a_page)
    assert [info.name for info in store.list(".tar")] == [f"{n}.tar" for n in range(7)]
    assert len(pages) == 3


def test_user_mistakes_are_named(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.*not a directory"):
        open_store(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="scheme"):
        open_store("gs://bucket/prefix")
    with pytest.raises(DataError, match="does not exist"):
        open_store("s3://no-such-bucket/x", endpoint=endpoint).list()
    with pytest.raises(DataError, match="nobody"):
        open_store("s3://bucket", profile="nobody")
    with pytest.raises(DataError) as caught:
        open_store("s3://AKIA:verysecret@bucket/x")
    assert "verysecret" not in str(caught.value)


def test_missing_credentials_are_named(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match="credentials"):
        open_store("s3://bucket", endpoint=endpoint).list()
    boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="k", aws_secret_access_key="s").create_bucket(
        Bucket="public", ACL="public-read"
    )
    assert open_store("s3://public", endpoint=endpoint, anonymous=True).list() == []


def test_faults_are_retried_and_end_as_store_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    store, real, faults = open_store(str(tmp_path)), os.pread, iter([OSError("stale handle")] * 2)
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def flaky(*args: int) -> bytes:
        for fault in faults:
            raise fault
        return real(*args)

    monkeypatch.setattr(os, "pread", flaky)
    assert store.read("a") == b"content"
    faults = iter([OSError("stale handle")] * 99)
    with pytest.raises(StoreError, match="stale handle"):
        store.read("a")
