"""The mirror: commits by its manifest, keeps what is to be kept, never stops training, and is a place to go on from."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from altered_server import AlteredServer, without
from shard_cuts import cut, ema_of, write

from data.errors import DataError, StoreError
from data.store import LocalStore, Store, StoreOptions, open_store
from t2i.engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    Mirror,
    latest_checkpoint,
    newest,
    open_mirror,
)


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        (tmp_path / "mirror").mkdir()
        return open_mirror(str(tmp_path / "mirror"), "run/stage", StoreOptions(retry_minutes=0))
    endpoint = request.getfixturevalue("endpoint")
    bucket = f"b{time.monotonic_ns()}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    return open_mirror(f"s3://{bucket}/mirrors", "run/stage", StoreOptions(endpoint=endpoint, retry_minutes=0))


def names(store: Store) -> list[str]:
    return [info.name for info in store.list()]


def files(*steps: int, ranks: int = 1) -> list[str]:
    parts = [f"rank_{rank:05d}.safetensors" for rank in range(ranks)]
    return [f"step_{step:08d}/{file}" for step in steps for file in ["manifest.json", *parts]]


def train(folder: Path, mirror: Mirror | None, steps: list[int], **options: Any) -> CheckpointWriter:
    """Save at these steps, each one mirrored before the next."""
    writer = CheckpointWriter(folder, rank=0, world_size=1, attempt_id="x", mirror=mirror, **{"keep": 2, **options})
    (shards,) = cut(1)
    for step in steps:
        writer.save(step, shards, ema_of(shards), {"step": step}, ephemeral=step % 10 != 0)
        assert writer.wait() == step
        writer.close(20)
    return writer


def test_a_machine_that_has_nothing_goes_on_from_the_mirror(store: Store, tmp_path: Path) -> None:
    writer = train(tmp_path / "here", Mirror(store, keep=1, keep_every=20), [10, 20, 30, 40, 50, 55])
    assert writer.take_events() == []
    assert names(store) == files(20, 40, 50)  # not the ephemeral one of step 55
    path, notes = latest_checkpoint(tmp_path / "there", store)
    assert path == tmp_path / "there" / "step_00000050"
    assert notes == [f"step_00000050 taken from {store.url}"]
    assert newest(tmp_path / "there") == (path, [])
    assert Checkpoint(path).state == {"step": 50}
    (shards,) = cut(1)
    params = {name: torch.zeros_like(shard.param) for name, shard in shards.items()}
    Checkpoint(path).read(shards, {"param": params})
    assert all(torch.equal(params[name], shard.param) for name, shard in shards.items())
    assert os.listdir(tmp_path / "there") == ["step_00000050"]
    assert latest_checkpoint(tmp_path / "there", store) == (path, [])  # not fetched again


def test_a_server_that_leaves_out_what_it_may_is_a_mirror_too(endpoint: str, tmp_path: Path) -> None:
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="sparse")
    left_out = ("ETag", "LastModified", "Last-Modified", "StorageClass", "NextContinuationToken", "Content-Length")
    with AlteredServer(endpoint, without(*left_out)) as server:
        store: Any = open_mirror("s3://sparse", "run/stage", StoreOptions(endpoint=server.url, retry_minutes=0))
        store._client.meta.events.register(
            "provide-client-params.s3.ListObjectsV2", lambda params, **_: {"MaxKeys": 1, **params}
        )
        writer = train(tmp_path / "here", Mirror(store, keep=1), [10, 20, 30])
        assert writer.take_events() == [] and names(store) == files(30)
        path, _ = latest_checkpoint(tmp_path / "there", store)
        assert path is not None and Checkpoint(path).state == {"step": 30}


def test_the_newer_one_wins_and_a_bad_one_is_passed_over(store: Store, tmp_path: Path) -> None:
    train(tmp_path / "here", Mirror(store, keep=9), [10, 20, 30, 40, 50])
    text = bytes(store.read("step_00000040/manifest.json"))
    store.write("step_00000040/manifest.json", text.replace(b'"step": 40', b'"step": 41'))
    part = bytearray(store.read("step_00000050/rank_00000.safetensors"))
    part[-1] ^= 1
    store.write("step_00000050/rank_00000.safetensors", bytes(part))
    folder = tmp_path / "there"
    shutil.copytree(tmp_path / "here" / "step_00000050", folder / "step_00000050")
    (folder / "step_00000050" / "rank_00000.safetensors").write_bytes(bytes(part))
    path, notes = latest_checkpoint(folder, store)
    assert path == folder / "step_00000030"
    assert [("step_00000050" in n, "step_00000040" in n, "checksum" in n) for n in notes[:3]] == [
        (True, False, True),
        (True, False, True),
        (False, True, True),
    ]
    write(tmp_path / "behind", 20, ranks=1)
    assert latest_checkpoint(tmp_path / "behind", store)[0] == tmp_path / "behind" / "step_00000030"
    write(folder, 35, ranks=1)
    assert latest_checkpoint(folder, store)[0] == folder / "step_00000035"


def test_an_upload_that_was_cut_short_does_not_count_and_goes(store: Store, tmp_path: Path) -> None:
    train(tmp_path / "here", Mirror(store, keep=2), [10])
    store.write("step_00000020/rank_00000.safetensors", b"half")
    if isinstance(store, LocalStore):
        (Path(store.url) / "step_00000020" / ".rank_00001.safetensors.0a.partial").write_bytes(b"half")
    assert latest_checkpoint(tmp_path / "there", store)[0] == tmp_path / "there" / "step_00000010"
    train(tmp_path / "here", Mirror(store, keep=2), [30])
    assert names(store) == files(10, 30)
    if isinstance(store, LocalStore):
        assert sorted(os.listdir(store.url)) == ["step_00000010", "step_00000030"]


def test_the_manifest_comes_last_and_goes_first(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(kind: str, call: Any) -> Any:
        def wrapper(self: Store, name: str, *rest: Any) -> None:
            seen.append((kind, name))
            call(self, name, *rest)

        return wrapper

    for kind in ("write", "upload", "delete"):
        monkeypatch.setattr(type(store), kind, watched(kind, getattr(type(store), kind)))
    train(tmp_path / "here", Mirror(store, keep=1), [10, 20])
    train(tmp_path / "again", Mirror(store, keep=1), [20])  # training came by again
    manifests = [n for n, (_, name) in enumerate(seen) if name.endswith("manifest.json")]
    kinds = [kind for kind, name in seen if not name.startswith(".")]
    assert [seen[n][0] for n in manifests] == ["write", "write", "delete", "delete", "write"]
    assert seen[manifests[0] - 1][1] == "step_00000010/rank_00000.safetensors"
    assert seen[manifests[2] + 1] == ("delete", "step_00000010/rank_00000.safetensors")
    assert seen[manifests[3] + 1][1] == "step_00000020/rank_00000.safetensors"
    assert manifests[-1] == len(seen) - 1 and "delete" in kinds


def test_a_rollback_takes_later_ones_away(store: Store, tmp_path: Path) -> None:
    mirror = Mirror(store, keep=9)
    writer = train(tmp_path / "here", mirror, [10, 20, 30])
    writer.discard_after(10)
    writer.close(20)
    assert names(store) == files(10)
    assert writer.take_events() == []


def test_faults_are_events_and_the_next_checkpoint_tries_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(store, keep=2)

    def fails(*_: Any) -> None:
        raise StoreError("writing: 9 requests in a row failed over 10 minutes")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "upload", fails)
        writer = train(tmp_path / "here", mirror, [10])
    assert writer.take_events() == ["mirror: step_00000010: writing: 9 requests in a row failed over 10 minutes"]
    assert names(store) == []
    assert train(tmp_path / "here", mirror, [20]).take_events() == []
    assert names(store) == files(20)


def test_what_is_being_copied_is_not_deleted_and_what_waits_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mirror").mkdir()
    store = open_store(str(tmp_path / "mirror"))
    mirror = Mirror(store, keep=9)
    release, begun = threading.Event(), threading.Event()
    upload = LocalStore.upload

    def slow(self: LocalStore, name: str, path: Path) -> None:
        begun.set()
        assert release.wait(20)
        upload(self, name, path)

    monkeypatch.setattr(LocalStore, "upload", slow)
    writer = CheckpointWriter(tmp_path / "here", rank=0, world_size=1, attempt_id="x", keep=1, mirror=mirror)
    (shards,) = cut(1)
    for step in (10, 20, 30):
        writer.save(step, shards, ema_of(shards), {})
        assert writer.wait() == step  # none waits for the mirror
        assert begun.wait(5)
    assert sorted(os.listdir(tmp_path / "here")) == ["step_00000010", "step_00000030"]
    writer.close(0.05)
    assert writer.take_events() == [
        "mirror: step_00000020 left out, a newer one is there",
        "mirror: left before step_00000010 was done",
    ]
    release.set()
    writer.close(20)
    assert names(store) == files(10, 30)
    save_again = train(tmp_path / "here", mirror, [40], keep=1)
    assert save_again.take_events() == []
    assert os.listdir(tmp_path / "here") == ["step_00000040"]


def test_an_unreachable_mirror_stops_only_a_run_that_has_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "here", Mirror(store, keep=2), [10])

    def fails(*_: Any) -> None:
        raise StoreError("listing: 9 requests in a row failed")

    if isinstance(store, LocalStore):
        shutil.rmtree(store.url)
    else:
        monkeypatch.setattr(type(store), "list", fails)
    path, notes = latest_checkpoint(tmp_path / "here", store)
    assert path == tmp_path / "here" / "step_00000010"
    assert len(notes) == 1 and notes[0].startswith("mirror: ")
    if isinstance(store, LocalStore):
        with pytest.raises(CheckpointError, match="checkpoint.mirror cannot be used: .*set it to null"):
            latest_checkpoint(tmp_path / "there", store)
    else:  # it may pass
        with pytest.raises(StoreError, match="in a row failed"):
            latest_checkpoint(tmp_path / "there", store)


def test_an_empty_mirror_is_a_fresh_start(store: Store, tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "there", store) == (None, [])


def test_a_mirror_that_is_not_mounted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        open_mirror(str(tmp_path / "absent"), "run/stage", StoreOptions())
    assert not (tmp_path / "absent").exists()
