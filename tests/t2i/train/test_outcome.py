"""What a run's folder says of its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.errors import StoreError, UserError
from t2i.distributed import LOCK, OutcomeFile, Preempted, RunInUseError, RunLock, is_done
from t2i.distributed import run_exit_code as code_of


def said(directory: Path) -> dict[str, object]:
    return dict(json.loads((directory / "outcome.json").read_text()))


def test_the_first_word_stands_until_the_next_start(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "first")
    outcome = OutcomeFile(tmp_path, "first")
    (tmp_path / "metrics.jsonl").touch()
    assert not is_done(tmp_path)
    outcome.write(75, "SIGTERM came", 3)
    OutcomeFile(tmp_path, "first").write(1, "a consequence", 0)
    assert said(tmp_path).items() >= {"outcome": "resumable", "reason": "SIGTERM came", "rank": 3}.items()
    assert not is_done(tmp_path)
    lock.release()
    lock, again = RunLock(tmp_path, "second"), OutcomeFile(tmp_path, "second")
    again.clear()
    outcome.write(75, "of a rank that outlived its start", 1)
    assert not (tmp_path / "outcome.json").exists()
    again.write(0, "trained low", 0)
    assert is_done(tmp_path) and said(tmp_path)["outcome"] == "done"
    lock.release()


def test_a_run_that_left_nothing_has_no_outcome(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run", "word")
    OutcomeFile(tmp_path / "run", "word").write(2, "a mistake", 0)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    lock.release()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Preempted("SIGTERM came"), 75),
        (StoreError("no answer"), 75),
        (RunInUseError("another start holds it"), 75),
        (OSError(28, "No space left on device"), 75),
        (UserError("optimizer.lr"), 2),
        (KeyError("odd"), 1),
    ],
)
def test_what_another_start_gets_over(error: Exception, code: int) -> None:
    assert code_of(error) == code
