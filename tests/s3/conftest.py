"""What the tests against a real S3 server share: the server, its buckets and a wire to it."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import boto3
import pytest
from botocore.config import Config
from ceph import Ceph, Unavailable
from tap import Tap

BIG_BYTES = 64 << 20  # far more than what lies in socket buffers: a server is in the middle of it for long


@pytest.fixture(scope="session")
def server() -> Iterator[Ceph]:
    with ExitStack() as stack:
        try:
            ceph = stack.enter_context(Ceph())
        except Unavailable as missing:
            pytest.skip(str(missing))
        yield ceph


@pytest.fixture
def ceph(server: Ceph, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ceph]:
    """The server, with its credentials in boto3's environment variables; its gateway runs again after the test."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    yield server
    server.heal()


@pytest.fixture(scope="session")
def client(server: Ceph) -> Any:
    """A plain boto3 client: what tests set up and check with, apart from the code under test."""
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


@pytest.fixture
def bucket(ceph: Ceph, client: Any) -> str:
    """Name of a new and empty bucket."""
    name = f"test-{uuid.uuid4()}"
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="session")
def big() -> bytes:
    return random.Random(0).randbytes(BIG_BYTES)


@pytest.fixture
def big_bucket(bucket: str, client: Any, big: bytes) -> str:
    """A bucket that holds `big` as the object "big"."""
    client.put_object(Bucket=bucket, Key="big", Body=big)
    return bucket


@pytest.fixture
def tap(ceph: Ceph) -> Iterator[Tap]:
    tap = Tap(ceph.endpoint)
    yield tap
    tap.close()
