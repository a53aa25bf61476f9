"""From functions to a command line, from an exception to one sentence and an exit code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from errno import EISDIR, ENOSPC
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import launch.compare
import launch.dpg
import launch.edit
import launch.export
import launch.fid
import launch.geneval
import launch.import_checkpoint
import launch.index
import launch.inspect_data
import launch.pack
import launch.sample
import launch.sample_classes
import launch.serve
from data.errors import DataError, StoreError, UserError
from data.store import StoreOptions
from launch.cli import run
from launch.process import main
from launch.train import train
from t2i.config.base import PathText

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


def test_the_help_of_training_lists_extend_and_the_fields(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["curriculum.py", "--help"])
    with pytest.raises(SystemExit) as end:
        train("Train it.", only=None)
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert all(words in said for words in ("Train it.", "--extend [STAGE]", "--train.steps", "Fields of each of data."))


def full_disk(mistake: UserError) -> UserError:
    """The mistake as raised by a job that names the option whose file met a full disk."""
    mistake.__cause__ = OSError(ENOSPC, "No space left on device")
    return mistake


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (DataError("a mistake,\n told at length"), 2, "error: a mistake, told at length"),
        (StoreError("the network is down"), 1, "error: the network is down; again"),
        (
            BrokenProcessPool("a long story"),
            1,
            "error: a process was killed, perhaps because it used too much memory; again",
        ),
        (OSError(ENOSPC, "No space left on device", "/a/b"), 1, "error: /a/b: No space left on device; again"),
        (
            OSError(ENOSPC, "No space left on device"),
            1,
            "error: a file cannot be read or written: No space left on device; again",
        ),
        (IsADirectoryError(EISDIR, "Is a directory", "x"), 1, "error: x: Is a directory; again"),
        (OSError("image file is\ntruncated"), 1, "error: image file is truncated; again"),
        (MemoryError(), 1, "error: out of memory; again"),
        (
            MemoryError("Unable to allocate 8.00 PiB for an array"),
            1,
            "error: out of memory: tried to allocate 8.00 PiB at once; again",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
            1,
            "error: out of memory: tried to allocate 20.00 GiB at once; again",
        ),
        (full_disk(UserError("out is x: cannot be written")), 1, "error: out is x: cannot be written; again"),
        (KeyboardInterrupt(), 130, "interrupted; again"),
    ],
)
def test_exit_codes(fault: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        raise fault

    assert run((job,), [], "A test.", "; again") == code
    assert capsys.readouterr() == ("", said + "\n")


@pytest.mark.parametrize(
    "fail", [lambda: torch.empty(2**50), lambda: torch.empty(2**62), lambda: np.empty(2**50), lambda: bytearray(2**60)]
)
def test_memory_that_is_not_there(fail: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        fail()

    assert run((job,), [], "A test.") == 1
    assert capsys.readouterr().err.startswith("error: out of memory")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_launched_job_ends_alike(rank: int, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        ROOT.read_bytes()

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("launch.process.RANK_0_FIRST_S", 0.0)
    monkeypatch.setattr("launch.process.quiet", lambda rank: None)
    with pytest.raises(SystemExit) as end:
        main(job)
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error{' on rank 1' if rank else ''}: {ROOT}: Is a directory\n"


def test_a_bug_keeps_its_traceback() -> None:
    def job() -> None:
        raise RuntimeError("a bug")

    for attempt in (lambda: run((job,), [], "A test."), lambda: main(job)):
        with pytest.raises(RuntimeError, match="a bug"):
            attempt()


@dataclass(frozen=True)
class Values:
    """Of every kind.

    Args:
        path: Where.
        number: How many.
        share: How much.
        often: How often.
    """

    path: PathText | None = None
    number: int | None = None
    share: float = 1.0
    often: int | Literal["all"] = 1


def take(values: Values) -> None:
    """Take them."""
    SEEN.append(values)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--path ~/a", Values(path="/home/me/a")),
        ("--path=s3://$BUCKET/${BUCKET}x", Values(path="s3://pictures/picturesx")),
        ("--path none --number none", Values()),
        ("--path None --number NULL", Values()),
        ("--path 010 --number 10 --share 1e-4", Values("010", 10, 1e-4)),
        ("--number 1e3 --share 5 --often all", Values(number=1000, share=5.0, often="all")),
    ],
)
def test_words_follow_the_rules_of_files(words: str, values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("BUCKET", "pictures")
    assert did(words, take) == values


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--path $NOT_SET/a", "--path: '$NOT_SET/a': the variable NOT_SET is not set"),
        ("--path ~not_a_user", "--path: '~not_a_user': there is no user 'not_a_user'"),
        ("--number 010", "--number: 010 is octal to some"),
        ("--often=-07", "--often: -07 is octal to some"),
        ("--number 1:30", "--number 1:30: 1:30 is no number"),
        ("--number 0b11", "--number 0b11: 0b11 is no number"),
        ("--share .inf", "--share .inf: must be a finite number"),
        ("--share 1e999", "--share 1e999: must be a finite number"),
        ("--share nan", "--share nan: must be a finite number"),
        ("--number yes", "number"),
    ],
)
def test_words_that_break_them(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run((take,), words.split(), "A test.") == 2
    assert said in capsys.readouterr().err


def test_every_job_fills_in_its_paths(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """No job makes a folder called ~ or $NAME, or looks into one."""
    monkeypatch.chdir(tmp_path)
    jobs: list[tuple[Any, str]] = [
        (launch.pack, "folder {} --out o"),
        (launch.pack, "shapes --count 1 --out {}"),
        (launch.pack, "csv a.csv --out o --root {}"),
        (launch.pack, "tars a --out o --manifest {}"),
        (launch.index, "a {}"),
        (launch.index, "a --out {}"),
        (launch.inspect_data, "{}"),
        (launch.inspect_data, "--config {}"),
        (launch.inspect_data, "a --out {}"),
        (launch.inspect_data, "a --checkpoint {}"),
        (launch.export, "{} --out o"),
        (launch.export, "a --out {}"),
        (launch.import_checkpoint, "{} --out o --config c"),
        (launch.import_checkpoint, "a --out {} --config c"),
        (launch.import_checkpoint, "a --out o --config {}"),
        (launch.compare, "a {}"),
        (launch.compare, "a b --out {}"),
        (launch.serve, "--model {}"),
    ]
    for module, words in jobs:
        assert module.main(words.format("$NOT_SET/x").split()) == 2
        assert "the variable NOT_SET is not set" in capsys.readouterr().err, words
    launched: list[tuple[Any, str]] = [
        (launch.sample.sample, "--model {} --prompts a --out o"),
        (launch.sample.sample, "--model m --prompts {} --out o"),
        (launch.sample.sample, "--model m --prompts a --out {}"),
        (launch.sample_classes.sample_classes, "--model m --out {}"),
        (launch.edit.edit, "--model m --out {}"),
        (launch.edit.edit, "--model m --out o --image {}"),
        (launch.edit.edit, "--model m --out o --edits {}"),
        (launch.edit.edit, "--model m --out o --edits e --clip {}"),
        (launch.geneval.geneval, "--model m --out {}"),
        (launch.geneval.geneval, "--images {} --out o"),
        (launch.geneval.geneval, "--model m --out o --prompts {}"),
        (launch.geneval.geneval, "--model m --out o --detector_weights {}"),
        (launch.geneval.geneval, "--write_prompts {}"),
        (launch.dpg.dpg, "--model m --benchmark {} --out o"),
        (launch.dpg.dpg, "--model m --benchmark b --out o --judge {}"),
        (launch.dpg.dpg, "--model m --benchmark b --out o --answers {}"),
        (launch.dpg.dpg, "--model m --benchmark b --out o --write_questions {}"),
        (launch.fid.fid, "{} --reference r"),
        (launch.fid.fid, "a --reference {}"),
        (launch.fid.fid, "a --make_reference {}"),
        (launch.fid.fid, "a --reference r --weights {}"),
        (launch.fid.fid, "a --reference r --out {}"),
    ]
    for job, words in launched:
        monkeypatch.setattr("sys.argv", ["job.py", *words.format("$NOT_SET/x").split()])
        with pytest.raises(UserError, match="the variable NOT_SET is not set"):
            job()
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_seen_enough() -> None:
    job = "def job():\n    print(0, flush=True)\n    sys.stdin.read()\n    print(1)\n"
    program = f"import sys\nfrom launch.cli import run\n{job}sys.exit(run((job,), [], ''))"
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


@pytest.mark.parametrize("job", ["compare", "inspect_data", "index", "pack"])
def test_jobs_without_networks_import_none(job: str) -> None:
    code = f"import sys, launch.{job}; print({{'deepspeed', 't2i.pipeline', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
