"""What tests of `data` share: an S3 server on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

ACCESS_KEY, SECRET = "AKIATHEACCESSKEY", "theverysecretkey"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The server's URL; its credentials are in boto3's environment variables meanwhile."""
    kept = dict(os.environ)
    os.environ.update(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
    os.environ.clear()
    os.environ.update(kept)
