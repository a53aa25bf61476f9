"""Images a second from shards to 256 px batches, beside a plain webdataset pipeline and beside bare decoding.

    python tests/benchmarks/data_throughput.py            # about 6 minutes, and 3 GB below .cache

Real photographs are packed into shards, and each case runs in a process of its own, three times, in turns; the figures
are medians. All cases have the same number of workers. The shards are read once before each, so that the system holds
them in memory: what the disk of a machine does is not measured.

    ours_local, ours_s3    this project's loader, from a folder, and from Ceph on loopback (on the same cores)
    webdataset_local       webdataset + Pillow (decode, bicubic to 256, centre crop) in torch's DataLoader, whose
                           memory is its main process's alone
    decode_limit           `decode` alone, over bytes in memory, in as many threads
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photographs import crops, describe

from data.decode import decode
from data.lane import Source
from data.loader import Loader, merge_states
from data.sample import ImageSettings
from data.shards.index import open_index
from data.shards.tar import parse_sample
from data.store import StoreOptions, open_store

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "throughput"
SHARDS, PER_SHARD, BATCH, LANES, BLOCK, RESOLUTION, WORKERS = 10, 200, 64, 16, 1024, 256, 2
WARM_UP, MEASURED, ROUNDS = 8, 40, 3  # batches, batches (multiples of 8: decode_limit works in eights), turns
SCALES = (10, 1000, 40_000)


# --- the data ---


def make_shards() -> None:
    """Write FOLDER/10/*.tar and its index, and folders of links to the same tars for the other scales."""
    import webdataset

    first = FOLDER / str(SCALES[0])
    if not (first / "index.json").exists():
        first.mkdir(parents=True, exist_ok=True)
        images = crops()
        for shard in range(SHARDS):
            with webdataset.TarWriter(str(first / f"{shard:06d}.tar"), encoder=False) as tar:
                for n in range(PER_SHARD):
                    number = shard * PER_SHARD + n
                    image = images[number % len(images)]
                    tar.write({"__key__": f"{number:08d}", "jpg": image, "txt": f"photograph {number}".encode()})
        index(first)
    for scale in SCALES[1:]:
        folder = FOLDER / str(scale)
        if (folder / "index.json").exists():
            continue
        folder.mkdir(exist_ok=True)
        for shard in range(scale):
            for suffix in (".tar", ".tar.idx"):
                link = folder / f"{shard:06d}{suffix}"
                if not link.exists():
                    os.link(first / f"{shard % SHARDS:06d}{suffix}", link)
        index(folder)


def index(folder: Path | str, *options: str) -> float:
    """Run launch/index.py; its seconds."""
    began = time.perf_counter()
    command = [sys.executable, "launch/index.py", str(folder), "--out", f"{folder}/index.json", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": "."})
    return time.perf_counter() - began


# --- the cases, each in its own process ---


def open_loader(url: str, options: StoreOptions, state: dict[str, Any] | None = None) -> Loader:
    loader = Loader(
        [Source(open_index(open_store(url, options), "photographs"))],
        ImageSettings(RESOLUTION),
        batch_size=BATCH,
        lanes=LANES,
        seed=0,
        stage="bench",
        rank=0,
        world_size=1,
        workers=WORKERS,
        shuffle_block=BLOCK,
        buffer_bytes=16 << 30,
    )
    if state is not None:
        loader.load_state_dict(state)
    return loader


def timed(batches: Iterator[Any]) -> float:
    """Count the images a second after the warm-up."""
    for _ in range(WARM_UP):
        next(batches)
    began = time.perf_counter()
    for _ in range(MEASURED):
        next(batches)
    return MEASURED * BATCH / (time.perf_counter() - began)


def ours(url: str, options: StoreOptions) -> dict[str, float]:
    """Throughput; seconds from nothing to the first batch, at the start and deep in the epoch."""
    began = time.perf_counter()
    with open_loader(url, options) as loader:
        next(loader)
        first_s = time.perf_counter() - began
        rate = timed(loader)
        deep = merge_states([loader.state_dict()])
    samples = int(open_index(open_store(url, options), "photographs").counts.sum())
    for lane in deep["lanes"].values():  # the cursor is a few integers: put it where it would be after many hours
        lane["sources"]["photographs"] = [0, int(0.6 * samples / LANES)]
    began = time.perf_counter()
    with open_loader(url, options, deep) as loader:
        next(loader)
        resumed_s = time.perf_counter() - began
    return {"images_per_s": rate, "first_batch_s": first_s, "first_batch_after_deep_resume_s": resumed_s}


def webdataset_local() -> dict[str, float]:
    import webdataset
    from PIL import Image

    def transform(data: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = RESOLUTION / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - RESOLUTION) // 2, (image.height - RESOLUTION) // 2
        cropped = image.crop((left, top, left + RESOLUTION, top + RESOLUTION))
        return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)

    urls = sorted(str(path) for path in (FOLDER / str(SCALES[0])).glob("*.tar"))
    data = webdataset.WebDataset(urls, resampled=True).shuffle(BLOCK)
    data = data.to_tuple("jpg", "txt").map_tuple(transform, bytes.decode)
    return {"images_per_s": timed(iter(torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=WORKERS)))}


def decode_limit() -> dict[str, float]:
    store = open_store(str(FOLDER / str(SCALES[0])))
    source = open_index(store, "photographs")
    images = []
    for shard in range(2):
        offsets, content = source.offsets(shard), store.read(source.names[shard])
        images += [parse_sample(content[a:b]).members["jpg"] for a, b in pairwise(offsets)]
    with ThreadPoolExecutor(WORKERS) as pool:

        def batches() -> Iterator[None]:
            at = 0
            while True:
                list(pool.map(lambda n: decode(images[n % len(images)], RESOLUTION), range(at, at + 8 * BATCH)))
                at += 8 * BATCH
                yield from [None] * 8

        return {"images_per_s": timed(batches())}


# --- the whole ---


def run_case(case: str, **environment: str) -> dict[str, Any]:
    """Run a case in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", case],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1", **environment},
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout.splitlines()[-1]))


def case_figures(case: str) -> dict[str, Any]:
    cases: dict[str, Callable[[], dict[str, float]]] = {
        "ours_local": lambda: ours(str(FOLDER / str(SCALES[0])), StoreOptions()),
        "ours_s3": lambda: ours("s3://bench/photographs", StoreOptions(endpoint=os.environ["BENCH_ENDPOINT"])),
        "webdataset_local": webdataset_local,
        "decode_limit": decode_limit,
        **{f"scale_{scale}": lambda scale=scale: ours(str(FOLDER / str(scale)), StoreOptions()) for scale in SCALES},
    }
    torch.set_num_threads(1)
    for path in (FOLDER / str(SCALES[0])).glob("*.tar"):
        path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = cases[case]()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {**figures, "peak_mib": used.ru_maxrss / 1024, "of_it_imports_mib": before / 1024}


@contextmanager
def ceph() -> Iterator[dict[str, str]]:
    """A real S3 server with the shards in it; its address and keys as environment."""
    command = [sys.executable, ROOT / "tests" / "s3" / "ceph.py", "--port", "0"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None and server.stdout is not None
    try:
        found = json.loads(server.stdout.readline())
        environment = {
            "BENCH_ENDPOINT": found["endpoint"],
            "AWS_ACCESS_KEY_ID": found["access_key"],
            "AWS_SECRET_ACCESS_KEY": found["secret_key"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ.update(environment)
        import boto3

        boto3.client("s3", endpoint_url=found["endpoint"]).create_bucket(Bucket="bench")
        store = open_store("s3://bench/photographs", StoreOptions(endpoint=found["endpoint"]))
        for path in sorted((FOLDER / str(SCALES[0])).glob("*.tar")):
            store.upload(path.name, path)
        index("s3://bench/photographs", "--endpoint", found["endpoint"])
        yield environment
    finally:
        server.stdin.close()
        server.wait(30)


def server_cpu_s() -> float:
    """CPU seconds that the server's processes have used."""
    total = 0.0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        if name in ("radosgw", "ceph-osd", "ceph-mon"):
            fields = rest.split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="run one case in this process")
    case = parser.parse_args().case
    if case:
        print(json.dumps(case_figures(case)))
        return
    make_shards()
    found: dict[str, list[dict[str, Any]]] = {}
    server_shares = []
    with ceph() as environment:
        for _ in range(ROUNDS):
            for name in ("decode_limit", "ours_local", "webdataset_local", "ours_s3"):
                before, began = server_cpu_s(), time.perf_counter()
                found.setdefault(name, []).append(run_case(name, **environment))
                if name == "ours_s3":
                    server_shares.append((server_cpu_s() - before) / (time.perf_counter() - began) / WORKERS)
    medians = {
        name: {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
        for name, runs in found.items()
    }

    def ratio(over: str, under: str) -> float:
        pairs = zip(found[over], found[under], strict=True)
        return round(statistics.median(a["images_per_s"] / b["images_per_s"] for a, b in pairs), 3)

    scales = {f"{scale} shards": run_case(f"scale_{scale}", BENCH_ENDPOINT="") for scale in SCALES}
    report = {
        "data": describe(crops()),
        "workers": WORKERS,
        "cores": len(os.sched_getaffinity(0)),
        **medians,
        "ratio_vs_webdataset": ratio("ours_local", "webdataset_local"),
        "ratio_vs_decode_limit": ratio("ours_local", "decode_limit"),
        "s3_ratio_vs_decode_limit": ratio("ours_s3", "decode_limit"),
        "s3_server_share_of_cores": round(statistics.median(server_shares), 3),
        "as_the_work_grows": scales,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
