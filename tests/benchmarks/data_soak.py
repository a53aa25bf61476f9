"""20,000 samples through a network that fails, with a loader that is killed: nothing lost, nothing twice.

    python tests/benchmarks/data_soak.py      # about 6 minutes

The samples are on Ceph, behind a proxy that spoils 10 % of the requests (resets, stalls, truncation, 503, 500, refused
connections, latency). Every rank is a process of its own; all are killed (SIGKILL) and begun again, at least 20 times,
each time at another world size, from the state of a batch that all of them had, as from a checkpoint. Some samples are
undecodable, and are to be set aside.

`lost` and `duplicated` count samples of the first epoch: the epoch that a sample belongs to is in the state after it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import simplejpeg

from data.lane import Source
from data.loader import Loader, merge_states
from data.sample import ImageSettings
from data.shards.index import open_index
from data.shards.manifest import build_manifest
from data.store import StoreOptions, open_store

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, SHARDS, LANES, BLOCK, BAD_EVERY = 20_000, 200, 20, 16, 1000
WORLDS = (1, 4, 2, 5)
SOURCE = "s3://soak/shards"


def options(endpoint: str) -> StoreOptions:
    return StoreOptions(endpoint=endpoint, region="us-east-1", connect_timeout_s=2, read_timeout_s=1, retry_minutes=5)


def upload(endpoint: str) -> None:
    """Write the shards: 128 px noise of some 40 KB, so that there are enough requests to spoil."""
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="soak")
    store, rng = open_store(SOURCE, options(endpoint)), np.random.default_rng(0)
    image = simplejpeg.encode_jpeg(rng.integers(0, 256, (128, 128, 3), np.uint8), 90, "RGB", "444")
    for shard in range(SHARDS):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for n in range(shard * SAMPLES // SHARDS, (shard + 1) * SAMPLES // SHARDS):
                content = b"broken" if n % BAD_EVERY == 0 else image
                for name, part in ((f"{n:06d}.jpg", content), (f"{n:06d}.txt", b"noise")):
                    info = tarfile.TarInfo(name)
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
        store.write(f"{shard:05d}.tar", buffer.getvalue())


def rank(endpoint: str, number: int, world: int, state: Path, out: Path) -> None:
    """Read batches for ever, a line for each; one sample a lane and batch, so that its epoch is known."""
    store = open_store(SOURCE, options(endpoint))
    with (
        Loader(
            [Source(open_index(store, "soak", options=options(endpoint)))],
            ImageSettings(32),
            batch_size=LANES,
            lanes=LANES,
            seed=0,
            stage="soak",
            rank=number,
            world_size=world,
            workers=1,
            shuffle_block=BLOCK,
            buffer_bytes=2 << 30,
        ) as loader,
        out.open("w") as file,
    ):
        if state.exists():
            loader.load_state_dict(json.loads(state.read_text()))
        for batch in loader:
            aside = [it.key for it in batch.bad]
            line = {"ids": batch.ids, "state": batch.state, "set_aside": aside, "retries": loader.retries()}
            file.write(json.dumps(line) + "\n")
            file.flush()


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a rank that may have been killed while it wrote."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def run_until(endpoint: str, world: int, folder: Path, batches: int) -> list[list[dict[str, Any]]]:
    """Start all ranks, kill them when the first has so many batches, and return what each wrote."""
    outs = [folder / f"rank_{number}.jsonl" for number in range(world)]
    for out in outs:
        out.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--endpoint", endpoint, "--world", str(world), "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, "--rank", str(n)], env=environment) for n in range(world)]
    while not (outs[0].exists() and outs[0].read_bytes().count(b"\n") >= batches):
        time.sleep(0.02)
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a rank ended by itself")
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return [lines(out) for out in outs]


def soak(endpoint: str, folder: Path) -> dict[str, Any]:
    """Kill and resume until the first epoch is over."""
    rng, state = random.Random(0), folder / "state.json"
    seen: Counter[str] = Counter()
    retried: Counter[str] = Counter()
    set_aside: set[str] = set()
    kills = 0
    while True:
        per_rank = run_until(endpoint, WORLDS[kills % len(WORLDS)], folder, rng.randint(30, 65))
        kills += 1
        for written in per_rank:
            if written:
                retried.update(written[-1]["retries"])
        common = min(len(written) for written in per_rank)  # batches that every rank had
        if not common:
            continue
        for written in per_rank:
            for line in written[:common]:
                lanes = line["state"]["lanes"]
                for id_, lane in zip(line["ids"], sorted(lanes, key=int), strict=True):
                    if lanes[lane]["sources"]["soak"][0] == 0:
                        seen[id_] += 1
                set_aside.update(line["set_aside"])
        merged = merge_states([written[common - 1]["state"] for written in per_rank])
        state.write_text(json.dumps(merged))
        if all(lane["sources"]["soak"][0] > 0 for lane in merged["lanes"].values()):
            break
    good = SAMPLES - len(range(0, SAMPLES, BAD_EVERY))
    return {
        "samples": SAMPLES,
        "lost": good - len(seen),
        "duplicated": sum(count > 1 for count in seen.values()),
        "retried": dict(sorted(retried.items())),
        "set_aside": len(set_aside),
        "undecodable_samples": SAMPLES - good,
        "kills": kills,
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--endpoint", help="be a rank, of this server")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world", type=int)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.endpoint:
        out = given.folder / f"rank_{given.rank}.jsonl"
        rank(given.endpoint, given.rank, given.world, given.folder / "state.json", out)
        return
    sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "s3")]
    from ceph import Ceph
    from fault_proxy import FaultProxy

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Ceph() as ceph:
        os.environ |= {"AWS_ACCESS_KEY_ID": ceph.access_key, "AWS_SECRET_ACCESS_KEY": ceph.secret_key}
        upload(ceph.endpoint)
        with FaultProxy(ceph.endpoint, share=0.1, stall_s=30) as proxy:
            store = open_store(SOURCE, options(proxy.url))
            build_manifest([store], store)
            found = soak(proxy.url, Path(folder))
            faults = dict(sorted(proxy.counts.items()))
    print(json.dumps({**found, "proxy": faults, "seconds": round(time.monotonic() - began)}, indent=1))


if __name__ == "__main__":
    main()
