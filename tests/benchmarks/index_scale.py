"""What opening a source costs as it grows: 10, 1,000 and 40,000 shards of 900 samples, from a synthetic manifest.

    python tests/benchmarks/index_scale.py

Prints one JSON object: for each size the seconds to open the manifest in a fresh process (after its imports), the MB
that process grew by (at the most, and what stays), and the MB and seconds of pickling it to another rank; and the
microseconds that `parse_sample` takes for a sample of jpg, txt and json, as tarfile and as webdataset write it.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLES = 900
SHARDS = (10, 1_000, 40_000)

OPEN = """
import json, pickle, resource, sys, time
from data.shards.index import open_index
from data.store import open_store

def now_mb():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6

before, began = now_mb(), time.perf_counter()
index = open_index(open_store(sys.argv[1]), "source")
index.fingerprint
opened = time.perf_counter() - began
stays = now_mb() - before
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before
began = time.perf_counter()
content = pickle.dumps(index)
pickle.loads(content)
pickled = time.perf_counter() - began
print(json.dumps({
    "shards": len(index.names), "samples": int(index.counts.sum()), "open_s": round(opened, 3),
    "peak_mb": round(max(peak, 0), 1), "stays_mb": round(stays, 1),
    "pickle_mb": round(len(content) / 1e6, 2), "pickle_s": round(pickled, 3),
}))
"""


def opening(folder: Path, shards: int) -> dict[str, Any]:
    """Write a manifest as launch/index.py does, and open it in a process of its own."""
    entries = [
        {
            "url": f"part-{n // 1000:03d}/{n:06d}.tar",
            "nsamples": SAMPLES,
            "filesize": 100_000_000 + n,
            "version": f"{n * 2654435761 % 2**128:032x}",
        }
        for n in range(shards)
    ]
    manifest = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": entries}
    (folder / "index.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-c", OPEN, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return json.loads(done.stdout)


def parsing(form: int, headers: dict[str, str], rounds: int = 20_000) -> float:
    """Microseconds a sample."""
    from data.shards.tar import parse_sample

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for extension, size in (("jpg", 60_000), ("txt", 200), ("json", 500)):
            info = tarfile.TarInfo(f"000123456.{extension}")
            info.size, info.pax_headers = size, headers
            tar.addfile(info, io.BytesIO(b"x" * size))
        end = tar.offset
    content = buffer.getvalue()[:end]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(rounds // 5):
            parse_sample(content)
        times.append((time.perf_counter() - began) / (rounds // 5))
    return round(1e6 * min(times), 2)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        opened = [opening(Path(folder), shards) for shards in SHARDS]
    parse_us = {
        "ustar": parsing(tarfile.USTAR_FORMAT, {}),
        "pax": parsing(tarfile.PAX_FORMAT, {"mtime": "1795334554.636116"}),
    }
    print(json.dumps({"opening": opened, "parse_sample_us": parse_us}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
