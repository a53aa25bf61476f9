"""A real S3 server: Ceph's RADOS gateway over one monitor and one memory-backed OSD, on loopback.

    python tests/s3/ceph.py --port 0     # prints {"endpoint", "access_key", "secret_key"}, serves until stdin closes
    python tests/s3/ceph.py --fetch      # only brings the packages

- The daemons are Debian's (radosgw, ceph-mon, ceph-osd), downloaded and unpacked below .cache/ceph: nothing is
  installed or configured, and no root is needed.
- They are children in the foreground whose death the kernel ties to ours, so none outlives a test, however it ends.
- Objects live in the OSD's memory: the gateway may be killed and started again, and they are still there.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "ceph"
ROOT = CACHE / "root"  # appears whole, by one rename
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")
START_TIMEOUT_S = 60

CONFIG = """\
[global]
fsid = {fsid}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
# Without authentication there is no key for the secure mode that clients would choose.
ms_mon_client_mode = crc
# Protocol 2 alone: over protocol 1 the OSD takes the monitor's answer for another cluster's.
mon_host = [v2:127.0.0.1:{mon_port}]
public_addr = 127.0.0.1
ms_bind_ipv6 = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data_avail_warn = 2
mon_data_avail_crit = 1
mon_cluster_log_to_file = false
# A lone monitor need not wait for more changes to decide on together: 10 s less at the start.
paxos_propose_interval = 0.01
paxos_min_wait = 0.01
# Gateways tell each other of new buckets, and wait for one that was killed until its watch runs out (after 30 s).
osd_client_watch_timeout = 1
objecter_tick_interval = 0.2
osd_objectstore = memstore
memstore_device_bytes = {memory_bytes}
plugin_dir = {libraries}/ceph
erasure_code_dir = {libraries}/ceph/erasure-code
osd_class_dir = {libraries}/rados-classes
run_dir = {run}
admin_socket =
pid_file =
log_file = {run}/$name.log
mon_data = {run}/mon
osd_data = {run}/osd
rgw_data = {run}/rgw
"""


class Unavailable(RuntimeError):
    """What this machine lacks for the server; the message names it."""


def fetch() -> Path:
    """Download and unpack the daemons and all they need that the system lacks, once; return the unpacked tree.

    Raises:
        Unavailable: there is no apt-get or dpkg, or the packages cannot be had.
    """
    for tool in ("apt-get", "dpkg", "setpriv"):
        if shutil.which(tool) is None:
            raise Unavailable(f"the S3 server needs {tool}, which is not on this machine (Debian and Ubuntu have it)")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ROOT.is_dir():
            _unpack(ROOT)
    return ROOT


def _unpack(root: Path) -> None:
    partial = CACHE / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    debs = partial / "debs"
    debs.mkdir(parents=True)
    try:
        _download(debs, [])
    except Unavailable:
        # The system's package lists may be missing or outdated, and only root may renew those: take our own.
        state = partial / "apt"
        (state / "lists" / "partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}", "-o", "APT::Sandbox::User="]
        _apt(debs, *own, "update")
        _download(debs, own)
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg", "-x", deb, partial / "root"], check=True)
    (partial / "root").rename(root)
    shutil.rmtree(partial)


def _download(folder: Path, options: list[str]) -> None:
    plan = _apt(folder, *options, "install", "--no-install-recommends", "--simulate", *PACKAGES)
    names = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    if absent := set(PACKAGES) - set(names):
        raise Unavailable(f"apt-get would not unpack {', '.join(sorted(absent))}: installed already, in another place?")
    _apt(folder, *options, "download", *names)


def _apt(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["apt-get", "-q", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("E: ")]
        raise Unavailable(f"the packages {', '.join(PACKAGES)} cannot be had: {' '.join(errors) or done.stderr}")
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """Where the daemons' programs, configuration and data are, and how they are run."""

    def __init__(self, root: Path, run: Path, memory_bytes: int) -> None:
        self.run_folder = run
        libraries = next((root / "usr" / "lib").glob("*-linux-gnu"))
        search = [libraries, libraries / "ceph", root / "lib" / libraries.name]
        self._env = {
            **os.environ,
            "PATH": f"{root}/usr/bin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(map(str, search)),
            "CEPH_CONF": str(run / "ceph.conf"),
        }
        self.fsid, self.mon_port = str(uuid.uuid4()), free_port()
        for folder in ("mon", "osd", "rgw"):
            (run / folder).mkdir()
        (run / "ceph.conf").write_text(
            CONFIG.format(
                fsid=self.fsid, mon_port=self.mon_port, run=run, libraries=libraries, memory_bytes=memory_bytes
            )
        )

    def call(self, *command: str) -> None:
        done = subprocess.run(
            command, env=self._env, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a daemon that the kernel kills when the calling thread ends, even by SIGKILL."""
        with open(self.run_folder / f"{command[0]}.out", "ab") as out:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                process_group=0,  # Ctrl-C at a terminal is for the tests, which then end the daemons
            )

    def logs(self) -> str:
        """The ends of all that the daemons said."""
        files = sorted([*self.run_folder.glob("*.out"), *self.run_folder.glob("*.log")])
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


class Gateway:
    """One radosgw process, on a port that it keeps when it is started again."""

    def __init__(self, cluster: Cluster, port: int, *options: str) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self._cluster = cluster
        self._command = ["radosgw", "-f", "-n", "client.rgw", f"--rgw_frontends=beast endpoint=127.0.0.1:{port}"]
        self._command += options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._process = self._cluster.start(*self._command)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"radosgw did not start at {self.endpoint}\n{self._cluster.logs()}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True  # a refusal is an answer
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL: what is under way breaks; what was written stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def running(self) -> bool:
        return self._process is not None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the gateway is not running"
        self._process.send_signal(number)


class Ceph:
    """A running server: `with Ceph() as ceph: ... ceph.endpoint, ceph.access_key, ceph.secret_key`.

    The thread that enters it, or restarts a gateway, has to live as long as the server is used.

    Args:
        port: the gateway's port on 127.0.0.1; 0 takes a free one.
        memory_bytes: what the objects may take together; used as they grow.

    Raises:
        Unavailable: on entering, where the packages cannot be had.
    """

    def __init__(self, port: int = 0, memory_bytes: int = 4 << 30) -> None:
        self.access_key, self.secret_key = "TESTACCESSKEY", uuid.uuid4().hex
        self._port, self._memory_bytes = port, memory_bytes
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Ceph:
        root = fetch()
        with self._exit as undo:
            run = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="ceph-")))
            self._cluster = Cluster(root, run, self._memory_bytes)
            self._start_storage(undo)
            user = ["--uid=test", "--display-name=test"]
            keys = [f"--access-key={self.access_key}", f"--secret-key={self.secret_key}"]
            self._cluster.call("radosgw-admin", "user", "create", *user, *keys)
            self._gateway = Gateway(self._cluster, self._port or free_port())
            undo.callback(self._gateway.kill)
            self._gateway.start()
            self._exit = undo.pop_all()
        return self

    def _start_storage(self, undo: contextlib.ExitStack) -> None:
        cluster, run = self._cluster, self._cluster.run_folder
        address = f"[v2:127.0.0.1:{cluster.mon_port}]"
        cluster.call("monmaptool", "--create", "--fsid", cluster.fsid, "--addv", "a", address, f"{run}/monmap")
        # A first map that already holds the OSD spares asking the monitor for it.
        cluster.call("osdmaptool", "--createsimple", "1", f"{run}/osdmap")
        cluster.call("ceph-mon", "--mkfs", "-i", "a", "--monmap", f"{run}/monmap", "--osdmap", f"{run}/osdmap")
        undo.callback(_end, cluster.start("ceph-mon", "-f", "-i", "a"))
        cluster.call("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", str(uuid.uuid4()))
        undo.callback(_end, cluster.start("ceph-osd", "-f", "-i", "0"))

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every daemon and forget the objects."""
        self._exit.close()

    @property
    def endpoint(self) -> str:
        return self._gateway.endpoint

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self._gateway.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._gateway.signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL the gateway: what is under way breaks, further connections are refused, objects stay."""
        self._gateway.kill()

    def restart(self) -> None:
        """Start the gateway again after `kill`, on its port, and wait until it answers."""
        self._gateway.start()

    def heal(self) -> None:
        """Undo `pause` or `kill`, whichever there was."""
        if self._gateway.running:
            self.resume()
        else:
            self.restart()

    @contextlib.contextmanager
    def throttled(self, max_concurrent: int) -> Iterator[str]:
        """Endpoint of a second gateway to the same objects, which answers 503 SlowDown beyond `max_concurrent`."""
        limit = ["--rgw_scheduler_type=throttler", f"--rgw_max_concurrent_requests={max_concurrent}"]
        gateway = Gateway(self._cluster, free_port(), *limit)
        try:
            gateway.start()
            yield gateway.endpoint
        finally:
            gateway.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A Ceph S3 server on loopback, until stdin closes or a signal comes.")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--fetch", action="store_true", help="only download and unpack the packages")
    arguments = parser.parse_args()
    # Any of these leaves through the `with` below.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        if arguments.fetch:
            fetch()
            return
        with Ceph(arguments.port) as ceph:
            keys = {"access_key": ceph.access_key, "secret_key": ceph.secret_key}
            print(json.dumps({"endpoint": ceph.endpoint, **keys}), flush=True)
            sys.stdin.buffer.read()
    except Unavailable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
