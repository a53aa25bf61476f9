"""How runs end that stand still or lose a rank: everyone leaves with one code and one message, and shows where it was.

The ranks are real processes over gloo, without a launcher that would end them.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import watch_ranks

from data.errors import UserError
from t2i.config.train import TimeoutsConfig
from t2i.distributed import World
from t2i.train.watchdog import Failure, Failures, is_lost_contact, slowest

RANKS = Path(__file__).with_name("watch_ranks.py")
KILLED = -9


class Ends:
    """How the cases of watch_ranks.py ended."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(RANKS), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        self.codes: dict[str, list[int]] = json.loads(done.stdout.strip().splitlines()[-1])
        self._folder = folder

    def said(self, case: str) -> list[str]:
        """What each rank wrote to stderr."""
        return [(self._folder / case / f"rank_{rank}.err").read_text() for rank in range(len(self.codes[case]))]

    def stacks(self, case: str) -> dict[int, str]:
        """Of each rank that wrote its stacks."""
        files = (self._folder / case / "stacks").glob("attempt_rank_*.txt")
        return {int(file.stem[-5:]): file.read_text() for file in files}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return Ends(tmp_path_factory.mktemp("ranks"))


def line_of(function: Any, words: str) -> str:
    """The line of a function with these words, as stacks name it."""
    lines, first = inspect.getsourcelines(function)
    offset = next(n for n, line in enumerate(lines) if words in line)
    return f'watch_ranks.py", line {first + offset} in {function.__name__}\n'


ASLEEP = line_of(watch_ranks.asleep, "time.sleep")
TOTAL = line_of(watch_ranks.total, "dist.all_reduce")


def test_slow_steps_and_a_long_end_after_the_watch_is_closed_are_no_hang(ends: Ends) -> None:
    assert ends.codes["healthy"] == [0, 0, 0], ends.said("healthy")
    assert ends.stacks("healthy") == {}


def test_a_process_that_was_stopped_for_longer_than_is_allowed_goes_on(ends: Ends) -> None:
    assert ends.codes["suspended"] == [0], ends.said("suspended")


def test_on_a_hang_every_rank_shows_where_it_is_and_all_leave_to_be_started_again(ends: Ends) -> None:
    assert ends.codes["sleeps"] == [75, 75, 75]
    found = ends.stacks("sleeps")
    assert [ASLEEP in found[rank] for rank in range(3)] == [False, True, False]
    assert [TOTAL in found[rank] for rank in range(3)] == [True, False, True]
    assert found[1].startswith("rank 1 of 3, process ") and " s in step 2\n" in found[1].splitlines(keepends=True)[0]
    for said in ends.said("sleeps"):
        assert "stood still for 0.1 minutes in step 2" in said and "stacks are in " in said
        assert "no answer" not in said


def test_a_hang_before_the_first_step_is_one_too(ends: Ends) -> None:
    assert ends.codes["sleeps_at_start"] == [75, 75]
    assert ASLEEP in ends.stacks("sleeps_at_start")[0]
    assert all("minutes in building" in said for said in ends.said("sleeps_at_start"))


def test_ranks_that_wait_in_different_collectives_are_found_there(ends: Ends) -> None:
    assert ends.codes["disagree"] == [75, 75]
    assert TOTAL in ends.stacks("disagree")[0]
    assert line_of(watch_ranks.disagree, "dist.barrier") in ends.stacks("disagree")[1]


def test_the_others_leave_a_stopped_rank_and_name_it(ends: Ends) -> None:
    assert ends.codes["stopped"] == [75, KILLED, 75]
    assert set(ends.stacks("stopped")) == {0, 2}
    assert "no answer from rank 1\n" in ends.said("stopped")[0]


def test_the_others_leave_a_stopped_rank_0_whose_store_is_mute(ends: Ends) -> None:
    assert ends.codes["stopped_first"] == [KILLED, 75]
    assert TOTAL in ends.stacks("stopped_first")[1]
    assert "stood still" in ends.said("stopped_first")[1]


def test_a_rank_that_holds_the_interpreters_lock_shows_where(ends: Ends) -> None:
    assert ends.codes["holds_lock"] == [75, KILLED]
    assert line_of(watch_ranks.holds_lock, "ctypes") in ends.said("holds_lock")[1]
    assert "no answer from rank 1\n" in ends.said("holds_lock")[0]


def test_an_error_on_one_rank_ends_those_in_a_collective_and_those_that_hang(ends: Ends) -> None:
    assert ends.codes["raises"] == [1, 1, 1]
    assert all("error on rank 1: KeyError: 'odd'\n" in said for said in ends.said("raises"))
    assert ends.stacks("raises") == {}


def test_rank_0_is_heard_before_its_store_goes_with_it(ends: Ends) -> None:
    assert ends.codes["raises_first"] == [2, 2]
    assert all("error on rank 0: lr must be positive\n" in said for said in ends.said("raises_first"))


def test_a_killed_rank_is_lost_contact_and_named(ends: Ends) -> None:
    assert ends.codes["killed"] == [75, KILLED]
    assert "error on rank 0: lost contact with another rank: " in ends.said("killed")[0]
    assert "no answer from rank 1\n" in ends.said("killed")[0]


def test_a_killed_rank_0_is_named_by_those_in_a_collective_and_those_that_hang(ends: Ends) -> None:
    assert ends.codes["killed_first"] == [KILLED, 75, 75]
    assert all("error on rank 0: the process is gone" in said for said in ends.said("killed_first")[1:])


def test_time_outs_of_all_groups_can_be_shortened_and_tell_of_lost_contact(ends: Ends) -> None:
    assert ends.codes["times_out"] == [75, 75]
    assert all("lost contact with another rank: " in s and "Timed out" in s for s in ends.said("times_out"))


def test_the_first_report_of_one_rank_stands() -> None:
    with Failures(World(0, 1, torch.device("cpu"))) as failures:
        first = failures.report(UserError("lr must be positive"))
        assert first == failures.first == Failure(0, 2, "lr must be positive")
        assert failures.report(KeyError("odd")) == first
        assert failures.post(Failure(0, 1, "later")) == first


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistBackendError("NCCL communicator was aborted on rank 0"), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # a store of data, say
    ],
)
def test_lost_contact_is_told_from_faults_of_this_rank(error: Exception, lost: bool) -> None:
    assert is_lost_contact(error) is lost


def test_the_straggler_is_the_rank_that_takes_longest() -> None:
    world: Any = SimpleNamespace(gather=lambda mine: [1.0, 2.0, 4.0, 9.0])
    assert slowest(world, 1.0) == {"rank_s_max": 9.0, "rank_s_median": 3.0, "slowest_rank": 3}
    world.gather = lambda mine: [2.0, 2.0]
    assert slowest(world, 2.0)["slowest_rank"] == 0


@pytest.mark.parametrize("wrong", [{"start_minutes": 0}, {"step_minutes": -1}, {"wall_clock_minutes": -1}])
def test_limits_are_positive(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TimeoutsConfig.model_validate(wrong)
    assert TimeoutsConfig().wall_clock_minutes == 0
