"""Fixtures that several folders of tests share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from moto.server import ThreadedMotoServer

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Two tests run at a time; and some kernels round differently with another number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
ACCESS_KEY, SECRET = "AKIATHEACCESSKEY", "theverysecretkey"


class Launcher:
    """Runs a worker script on several processes; rank 0 prints one JSON object as its last line."""

    def __call__(self, script: Path, world_size: int, *arguments: str) -> Any:
        ended = run_forked(script, list(arguments), world_size)
        assert ended.codes == [0] * world_size, ended.stdout + ended.stderr
        return json.loads(ended.stdout.strip().splitlines()[-1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole runs first: last, one of them would keep a worker busy while the others have nothing left."""
    items.sort(key=lambda item: not {"launch", "engine"} & set(item.path.parts))


@pytest.fixture(autouse=True)
def launchers_variables() -> Iterator[None]:
    """Restore the launcher's variables, which a job inside the test sets and later processes must not inherit."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: os.environ.get(name) for name in names}
    yield
    for name, value in kept.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def launch() -> Launcher:
    """`launch(script, world_size, *arguments)` returns what the script's rank 0 printed."""
    return Launcher()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packed scenes, for `tiny_config`; a test that changes it copies it first."""
    from tiny import pack_scenes  # imports the packer, which most tests do without

    return pack_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The URL of an S3 server; boto3's environment variables hold its credentials."""
    kept = dict(os.environ)
    os.environ.update(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
    os.environ.clear()
    os.environ.update(kept)
