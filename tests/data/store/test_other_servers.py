"""Servers that answer otherwise than Amazon's: a store goes on where it can, and else names the server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import pytest
from altered_server import AlteredServer, Change, Headers, tagged, without
from botocore.awsrequest import AWSResponse
from tar_samples import jpeg, tar_bytes

import data.store.s3
from data.errors import DataError
from data.shards.index import check_listing, index_source, open_index
from data.shards.manifest import build_manifest
from data.store import StoreOptions, WritableStore, open_store


@pytest.fixture
def altered(endpoint: str) -> Iterator[Callable[[Change], str]]:
    """`altered(change)` starts a server whose answers are those of the real one, changed, and returns its URL."""
    with ExitStack() as stack:
        yield lambda change: stack.enter_context(AlteredServer(endpoint, change)).url


CHANGES: dict[str, Change] = {
    "weak": tagged(lambda tag: f'W/"{tag}"'),
    "weak in answers alone": tagged(lambda tag: f'W/"{tag}"', "GET HEAD"),
    "without quotes": tagged(lambda tag: tag),
    "others in listings": tagged(lambda tag: f'"00{tag}-2"', "LIST"),
    "others in answers to HEAD": tagged(lambda tag: f'"00{tag}-2"', "HEAD"),
    "others everywhere": lambda kind, *rest: tagged(lambda tag: f'"{kind}{tag}"')(kind, *rest),
    "no ETag": without("ETag", kinds="GET HEAD LIST"),
    "no ETag in listings": without("ETag", kinds="LIST"),
    "no ETag in answers": without("ETag", kinds="GET HEAD"),
    "no date": without("LastModified", "Last-Modified"),
    "no length": without("Content-Length", kinds="GET"),
    "no length at all": without("Content-Length", kinds="GET HEAD"),
    "no length and no range": without("Content-Length", "Content-Range", kinds="GET"),
    "no range": without("Content-Range", kinds="GET"),
    "no size in listings": without("Size"),
    "no storage class": without("StorageClass", "KeyCount", "MaxKeys", "Name", "EncodingType"),
    "no end of the listing": without("IsTruncated"),
    "nothing at all": without(
        "ETag", "LastModified", "Last-Modified", "StorageClass", "KeyCount", kinds="GET HEAD LIST"
    ),
}


CONTENT = tar_bytes([(f"{n}.{end}", jpeg(n) if end == "jpg" else b"text") for n in range(3) for end in ("jpg", "txt")])


@pytest.fixture(scope="module")
def client(endpoint: str) -> Any:
    return boto3.client("s3", endpoint_url=endpoint)


@pytest.fixture
def bucket(request: pytest.FixtureRequest, client: Any) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[-50:].strip("-")
    client.create_bucket(Bucket=name)
    for shard in range(2):
        client.put_object(Bucket=name, Key=f"d/{shard}.tar", Body=CONTENT)
    return f"s3://{name}/d"


def at(url: str, endpoint: str) -> Any:
    return open_store(url, StoreOptions(endpoint=endpoint, retry_minutes=0))


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_server_leaves_out_or_writes_otherwise(name: str, bucket: str, altered: Callable[[Change], str]) -> None:
    store = at(bucket, altered(CHANGES[name]))
    assert [(info.name, info.size) for info in store.list(".tar")] == [(f"{n}.tar", len(CONTENT)) for n in (0, 1)]
    for version in (None, store.list()[0].version, store.info("0.tar").version):
        for start, stop in ((0, None), (0, 10), (512, 1024), (600, None), (len(CONTENT), None)):
            assert store.read("0.tar", start, stop, version=version) == CONTENT[start:stop]
    index = index_source(store, "s")
    assert index.counts.tolist() == [3, 3] and not index.corruption and check_listing(index) is None
    # By its manifest, and by the offsets beside the shards.
    build_manifest([store], store)
    listed = open_index(store, "s", notice=pytest.fail)
    assert check_listing(listed) is None
    assert [listed.offsets(n).tolist() for n in (0, 1)] == [index.offsets(n).tolist() for n in (0, 1)]
    assert store.read("1.tar", 0, 512, version=listed.versions[1]) == CONTENT[:512]
    # What is written is there.
    store.write("new", b"content")
    assert store.read("new") == b"content"
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.info("none") is None


@pytest.mark.parametrize("name", ["weak", "others in listings", "others everywhere"])
def test_what_changed_is_still_said(name: str, bucket: str, endpoint: str, altered: Callable[[Change], str]) -> None:
    store, real = at(bucket, altered(CHANGES[name])), at(bucket, endpoint)
    listed, looked_up = store.list()[0].version, store.info("0.tar").version
    content = bytes(real.read("0.tar"))
    assert store.read("0.tar", 0, 10, version=listed) == content[:10]
    real.write("0.tar", content[::-1])  # as many bytes
    for version in (listed, looked_up):
        with pytest.raises(DataError, match=r"d/0\.tar changed since it was indexed; index the source anew"):
            store.read("0.tar", 0, 10, version=version)
    assert store.read("0.tar", 0, 10, version=store.list()[0].version) == content[:-11:-1]


def test_the_ways_of_comparing_are_asked_for_once(
    bucket: str, altered: Callable[[Change], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = at(bucket, altered(CHANGES["others in listings"]))
    sent, send = list[str](), store._send
    monkeypatch.setattr(store, "_send", lambda operation, **rest: sent.append(operation) or send(operation, **rest))
    version = store.list()[0].version
    for start in range(0, 1000, 100):
        store.read("0.tar", start, start + 100, version=version)
    assert sent.count("get_object") == 10 and len(sent) == 10 + 1 + 2


def test_without_etags_a_read_is_of_one_version_still(
    bucket: str, endpoint: str, altered: Callable[[Change], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = at(bucket, endpoint)
    broken = iter([True])

    def change(kind: str, headers: Headers, body: bytes) -> tuple[Headers, bytes]:
        headers, body = CHANGES["no ETag"](kind, headers, body)
        if kind == "GET" and next(broken, False):  # its answer ends early, and then the object is another
            real.write("0.tar", bytes(9000))
            headers = [(name, "100" if name.lower() == "content-range" else value) for name, value in headers]
            return headers, body[:100]
        return headers, body

    store = open_store(bucket, StoreOptions(endpoint=altered(change)))
    with pytest.raises(DataError, match="0.tar (changed|ends before)"):
        store.read("0.tar", 0, 9500)


# --- listings ---


def paged(store: Any, keys: int) -> Any:
    store._client.meta.events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: {"MaxKeys": keys, **params}
    )
    return store


def test_a_listing_without_its_token_goes_on_after_its_last_name(
    bucket: str, endpoint: str, altered: Callable[[Change], str]
) -> None:
    real, names = at(bucket, endpoint), [f"{n:02}.x" for n in range(20)]
    for name in names:
        real.write(name, b"x")
    store = paged(at(bucket, altered(without("NextContinuationToken"))), 3)
    assert [info.name for info in store.list(".x")] == names


@pytest.mark.parametrize("kept", ["the first page", "its token"])
def test_a_listing_that_turns_in_a_circle_is_ended(kept: str, bucket: str, altered: Callable[[Change], str]) -> None:
    pages: list[bytes] = []

    def change(kind: str, headers: Headers, body: bytes) -> tuple[Headers, bytes]:
        if kind == "LIST":
            pages.append(body)
            body = pages[0]
            if kept == "the first page":  # as from a server that knows the first version of listings alone
                body = re.sub(rb"<NextContinuationToken>.*?</NextContinuationToken>", b"", body)
        return headers, body

    store = paged(at(bucket, altered(change)), 1)
    with pytest.raises(DataError, match=rf"listing {bucket} at .*the server cuts the listing short and gives no"):
        store.list()


def test_what_cannot_be_read_is_the_servers_fault(bucket: str, altered: Callable[[Change], str]) -> None:
    def change(kind: str, headers: Headers, body: bytes) -> tuple[Headers, bytes]:
        headers = [(name, "yesterday" if name.lower() == "last-modified" else value) for name, value in headers]
        return headers, re.sub(rb"<Size>.*?</Size>", b"<Size>much</Size>", body)

    store = at(bucket, altered(change))
    for call in (store.list, lambda: store.info("0.tar"), lambda: store.read("0.tar")):
        with pytest.raises(DataError, match=rf"the server of {bucket} at .* answers with what no S3 server does"):
            call()


def test_an_object_that_is_decompressed_on_its_way_is_not_cut(bucket: str, altered: Callable[[Change], str]) -> None:
    def change(kind: str, headers: Headers, body: bytes) -> tuple[Headers, bytes]:
        return CHANGES["no length and no range"](kind, headers, body * 2 if kind == "GET" else body)

    store = at(bucket, altered(change))
    for stop in (None, len(CONTENT)):
        with pytest.raises(
            DataError, match=rf"the server of {bucket}/0\.tar at .* sends more bytes than the object has"
        ):
            store.read("0.tar", 0, stop)


def test_parts_without_etags_are_said(
    bucket: str, altered: Callable[[Change], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.store.s3, "_PART", 5 << 20)
    (tmp_path / "file").write_bytes(bytes(6 << 20))
    store: WritableStore = at(bucket, altered(without("ETag", kinds="PUT")))
    with pytest.raises(DataError, match="the server gives parts no ETag"):
        store.upload("large", tmp_path / "file")
    assert store.info("large") is None


# --- names ---


def test_keys_with_empty_segments(client: Any, endpoint: str, tmp_path: Path) -> None:
    client.create_bucket(Bucket="empty-segments")
    keys = {"d/a//b.tar": 1, "d/a/b.tar": 2, "d//c.tar": 3, "/d/e.tar": 4, "d/f/g.tar": 5}
    for key, count in keys.items():
        members = [(f"{n}.jpg", jpeg(n)) for n in range(count)]
        client.put_object(Bucket="empty-segments", Key=key, Body=tar_bytes(members))
    root = at("s3://empty-segments", endpoint)
    assert sorted(info.name for info in root.list()) == sorted(keys)
    for url, names in {
        "d": ["/c.tar", "a//b.tar", "a/b.tar", "f/g.tar"],
        "/d": ["e.tar"],
        "d/a/": ["/b.tar", "b.tar"],
    }.items():
        store = at(f"s3://empty-segments/{url}", endpoint)
        assert [info.name for info in store.list()] == names
        assert all(store.info(info.name) == info and len(store.read(info.name)) == info.size for info in store.list())
    store, options = at("s3://empty-segments/d", endpoint), StoreOptions(endpoint=endpoint)
    for place in (store, open_store(str(tmp_path))):
        build_manifest([store], place)
        index = open_index(store, "s", f"{place.url}/index.json", options=options)
        assert dict(zip(index.names, index.counts.tolist(), strict=True)) == {
            name: keys[f"d/{name}"] for name in index.names
        }
        assert [len(index.offsets(n)) - 1 for n in range(4)] == index.counts.tolist()


def test_a_prefix_that_is_an_object_is_called_so(client: Any, endpoint: str) -> None:
    client.create_bucket(Bucket="one-object")
    client.put_object(Bucket="one-object", Key="d/x.tar", Body=b"tar")
    client.put_object(Bucket="one-object", Key="marker", Body=b"")
    with pytest.raises(
        DataError, match="^s3://one-object/d/x.tar is an object: give the prefix that holds it, s3://one-object/d$"
    ):
        at("s3://one-object/d/x.tar", endpoint).list()
    assert at("s3://one-object/marker", endpoint).list() == at("s3://one-object/d/x", endpoint).list() == []
    client.put_object(Bucket="one-object", Key="d/x.tar/y.tar", Body=b"tar")  # both
    assert [info.name for info in at("s3://one-object/d/x.tar", endpoint).list()] == ["y.tar"]


ARN = "arn:aws:s3:eu-west-1:123456789012:accesspoint"


@pytest.mark.parametrize(
    ("url", "bucket", "host"),
    [
        (f"{ARN}/name/some/prefix", f"{ARN}/name", "name-123456789012.s3-accesspoint.eu-west-1.amazonaws.com"),
        (f"{ARN}:name/some/prefix/", f"{ARN}:name", "name-123456789012.s3-accesspoint.eu-west-1.amazonaws.com"),
        (
            "arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-01234567890123456/accesspoint/name/some/prefix",
            "arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-01234567890123456/accesspoint/name",
            "name-123456789012.op-01234567890123456.s3-outposts.eu-west-1.amazonaws.com",
        ),
    ],
)
def test_an_access_point_is_a_bucket(url: str, bucket: str, host: str, endpoint: str) -> None:
    """The endpoint's credentials are set; no request leaves this machine."""
    store: Any = open_store(f"s3://{url}", StoreOptions())
    assert store.url == f"s3://{bucket}/some/prefix"
    sent = []

    def answer(request: Any, **_: Any) -> AWSResponse:
        sent.append(request.url)

        class Raw:
            def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
                yield b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"

        return AWSResponse(request.url, 200, {}, Raw())

    store._client.meta.events.register("before-send.s3", answer)
    assert store.list() == []
    assert sent[0].startswith(f"https://{host}/?list-type=2") and "prefix=some%2Fprefix%2F" in sent[0]
    with pytest.raises(DataError, match="must be s3://bucket/prefix"):
        open_store("s3://arn:aws:iam::123456789012:role/x", StoreOptions())


def test_another_endpoint_from_the_environment_needs_no_name_for_every_bucket(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://minio.local:9000/storage/v1/s3/")
    store: Any = open_store("s3://bucket/p", StoreOptions())
    url = store._client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "p/a"})
    assert url.startswith("http://minio.local:9000/storage/v1/s3/bucket/p/a?")


def test_manifests_of_a_server_without_etags_say_so(
    bucket: str, endpoint: str, altered: Callable[[Change], str]
) -> None:
    store, real = at(bucket, altered(CHANGES["no ETag"])), at(bucket, endpoint)
    build_manifest([store], store)
    assert [entry["version"] for entry in json.loads(bytes(store.read("index.json")))["shardlist"]] == ["", ""]
    index = open_index(real, "s", notice=pytest.fail)  # the same objects on a server that has them
    assert check_listing(index) is None
    real.write("1.tar", b"longer" * 10_000)
    with pytest.raises(DataError, match=r"1\.tar changed since it was indexed"):
        check_listing(index)
