"""launch/slurm.sh: when it queues its job again, on a cluster faked by small scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

from data.errors import DONE, EXIT_RESUMABLE, FAILED
from t2i.distributed import LOCK, OutcomeFile

JOB = 7
# Prints the resolved config, as the jobs do; other calls go to the real Python.
PYTHON = """#!/bin/bash
[[ ${!#} == --print_config ]] && exec cat config.yaml
exec %s "$@"
"""
# Two tasks on two nodes, which log their variables and arguments; then the run's part.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    PATH=%s:$PATH SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE='1(x2)' "$@" >>tasks.log
done
source ./part
"""
TASK = """#!/bin/bash
echo "$RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE, $MASTER_ADDR:$MASTER_PORT, $*"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == requeue ]]; then echo "$2" >>requeued.log; else echo node-4; echo node-5; fi
"""


def write_outcome(folder: Path, code: int) -> None:
    """What a run that ends with this exit code leaves in its folder."""
    folder.mkdir(parents=True)
    (folder / "events.log").touch()  # a run that left nothing else has no outcome
    (folder / LOCK).write_text("attempt")
    OutcomeFile(folder, "attempt").write(code, "x", rank=0)


class Cluster:
    """Runs the script in `folder`, where the run is `runs/mine`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "runs" / "mine"
        (folder / "config.yaml").write_text(yaml.safe_dump({"name": "mine", "root": "runs"}))
        for name, text in {
            "bin/python": PYTHON % sys.executable,
            "bin/srun": SRUN % (folder / "tasks"),
            "bin/scontrol": SCONTROL,
            "tasks/python": TASK,
        }.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        for outcome, code in (("done", DONE), ("resumable", EXIT_RESUMABLE), ("failed", FAILED)):
            write_outcome(folder / "ended" / outcome, code)

    def start(self, part: str, job: int = JOB) -> tuple[int, bool]:
        """Start the job whose ranks do `part` in shell; the script's exit code, and whether it asks to be requeued."""
        (self.folder / "part").write_text(f"run=runs/mine\n{part}\n")
        requeued = self.folder / "requeued.log"
        requeued.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "slurm.sh"), "launch/stage1.py", "--config", "my.yaml"],
            cwd=self.folder,
            env={
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "SLURM_JOB_ID": str(job),
                "SLURM_JOB_NODELIST": "node-[4-5]",
                "SLURM_CPUS_PER_TASK": "1",
            },
            check=False,
        )
        assert not requeued.exists() or requeued.read_text() == f"{job}\n"
        return done.returncode, requeued.exists()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def ended(outcome: str, code: int) -> str:
    """The part of a run that writes this outcome and exits with this code."""
    return f"cp ended/{outcome}/outcome.json $run; exit {code}"


def checkpoint(step: int) -> str:
    return f"mkdir -p $run/low/checkpoints/step_{step:08d}; "


def test_each_task_gets_its_rank_and_the_job_s_arguments(cluster: Cluster) -> None:
    cluster.start(ended("done", 0))
    words = "node-4:20007, -u launch/stage1.py --config my.yaml"
    lines = (cluster.folder / "tasks.log").read_text().splitlines()
    assert lines == [f"0 of 2, 0 of 1, {words}", f"1 of 2, 0 of 1, {words}"]


@pytest.mark.parametrize(
    ("part", "code", "requeued"),
    [
        (ended("done", 0), 0, False),
        (ended("done", 1), 0, False),  # a fault after the run's end changes nothing
        ("exit 0", 0, False),  # done already
        (ended("resumable", 75), 0, True),
        (ended("resumable", 137), 0, True),  # a rank was killed, and another reported it
        ("exit 137", 0, True),
        ("exit 1", 0, True),  # the ranks ended before they could write an outcome
        (ended("failed", 1), 1, False),
        ("exit 2", 2, False),  # the user's mistake
    ],
)
def test_a_job_is_queued_again_unless_it_is_done_or_failed(
    cluster: Cluster, part: str, code: int, requeued: bool
) -> None:
    assert cluster.start(part) == (code, requeued)


def test_the_outcome_of_an_earlier_start_does_not_count(cluster: Cluster) -> None:
    assert cluster.start(ended("failed", 1)) == (1, False)
    assert cluster.start("exit 137") == (0, True)


def test_a_mistake_in_the_config_starts_nothing(cluster: Cluster) -> None:
    (cluster.folder / "config.yaml").unlink()
    assert cluster.start("exit 75") == (2, False)
    assert not (cluster.folder / "tasks.log").exists() and not cluster.run.exists()


def test_three_starts_without_a_checkpoint_end_the_job(cluster: Cluster) -> None:
    assert [cluster.start("exit 137") for _ in range(3)] == [(0, True), (0, True), (1, False)]
    assert cluster.start("exit 137", job=8) == (0, True)  # a new submission counts from zero
    shutil.rmtree(cluster.run)
    assert cluster.start(checkpoint(4) + "exit 137") == (0, True)
    assert [cluster.start("exit 137") for _ in range(3)] == [(0, True), (0, True), (1, False)]


def test_a_run_that_makes_progress_is_always_queued_again(cluster: Cluster) -> None:
    for step in range(1, 6):
        old = f"rm -rf $run/low/checkpoints/step_{step - 1:08d}; "
        assert cluster.start(checkpoint(step) + old + ended("resumable", 75)) == (0, True)
    assert [cluster.start("exit 137") for _ in range(2)] == [(0, True)] * 2
    assert cluster.start("mkdir $run/low/model; exit 137") == (0, True)  # the stage's end counts, too
