"""From functions to a command line, from an exception to one sentence and an exit code."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pytest

import launch.index
import launch.pack
from data.errors import DataError, StoreError
from data.store import StoreOptions
from launch.command import run

ROOT = Path(__file__).parents[2]
SEEN: list[object] = []


@dataclass(frozen=True)
class Place:
    """A place.

    Args:
        out: Where to.
        width: How wide.
    """

    out: str
    width: int = 3


def one(source: str, /, place: Place, source_column: str = "a") -> None:
    """Do one thing.

    Args:
        source: Where from.
        source_column: Which column.
    """
    SEEN.append((source, place, source_column))


def many(sources: list[str], /, source: int = 1) -> None:
    """Do many things."""
    SEEN.append((sources, source))


def perhaps(source: str | None = None, /, *, place: Place) -> None:
    """Do it or not."""
    SEEN.append((source, place))


def did(words: str, *jobs: object) -> object:
    SEEN.clear()
    assert run(jobs, words.split(), "A test.") == 0
    (seen,) = SEEN
    return seen


def test_words_options_and_dataclasses() -> None:
    assert did("s3://a --out b --width 4", one) == ("s3://a", Place("b", 4), "a")
    assert did("a b c --source 2", many) == (["a", "b", "c"], 2)
    assert did("--out b", perhaps) == (None, Place("b"))
    assert did("x --out b", perhaps) == ("x", Place("b"))
    assert did("one x --source_column c --out b", one, many) == ("x", Place("b"), "c")
    assert did("many x", one, many) == (["x"], 1)


def test_the_help_is_what_the_docstrings_say(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run((one, many), ["one", "--help"], "A test.")
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert all(words in said for words in ("Do one thing.", "Where from.", "Which column.", "How wide.", "A place"))


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (DataError("a mistake,\n told at length"), 2, "error: a mistake, told at length"),
        (StoreError("the network is down"), 1, "error: the network is down; again"),
        (BrokenProcessPool("a long story"), 1, "error: a process was killed, perhaps for its memory; again"),
        (KeyboardInterrupt(), 130, "interrupted; again"),
    ],
)
def test_exit_codes(fault: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        raise fault

    assert run((job,), [], "A test.", "; again") == code
    assert capsys.readouterr() == ("", said + "\n")


def test_a_bug_keeps_its_traceback() -> None:
    def job() -> None:
        raise OSError("a bug")

    with pytest.raises(OSError, match="a bug"):
        run((job,), [], "A test.")


def test_a_reader_that_has_seen_enough() -> None:
    job = "def job():\n    print(0, flush=True)\n    sys.stdin.read()\n    print(1)\n"
    program = f"import sys\nfrom launch.command import run\n{job}sys.exit(run((job,), [], ''))"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_every_option_of_a_store_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def open_store(url: str, options: StoreOptions) -> None:
        seen.append(options)
        raise DataError("far enough")

    given = StoreOptions(
        endpoint="http://x", region="r", profile="p", anonymous=True, requester_pays=True,
        connect_timeout_s=1.5, read_timeout_s=2.5, retry_minutes=3.5,
    )  # fmt: skip
    words = [word for name, value in vars(given).items() for word in (f"--{name}", str(value).lower())]
    for module, job in ((launch.pack, ["tars", "s3://b/p", "--out", "o"]), (launch.index, ["s3://b/p"])):
        monkeypatch.setattr(module, "open_store", open_store)
        assert module.main([*job, *words]) == 2
    assert seen == [given, given]


def test_what_is_read_as_a_stranger_is_written_as_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def pack(*arguments: object) -> None:
        seen.append(arguments[-1])
        raise DataError("far enough")

    monkeypatch.setattr("data.packing.pack.pack", pack)
    words = "shapes --out o --count 1 --anonymous true --requester_pays true --retry_minutes 7"
    assert launch.pack.main(words.split()) == 2
    assert seen == [StoreOptions(retry_minutes=7)]
