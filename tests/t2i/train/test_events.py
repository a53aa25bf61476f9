"""What is written beside checkpoints ends no run: a disk that does not take it is an event, once of each kind."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from data.files import atomic_write
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.model_folder import write_model
from t2i.pipeline import Picture
from t2i.train.guard import SkippedFile
from t2i.train.metrics import EventLog, JsonLines, Observer, Terminal, append_line
from t2i.train.scoring import Evaluator

ALONE = World(0, 1, torch.device("cpu"))
FAULTS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES]


def raised(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Full(io.FileIO):
    """A file whose disk takes `room` bytes more, and then says why not."""

    room, number = 0, errno.ENOSPC

    def write(self, content: Any) -> int:
        if not Full.room:
            raise raised(Full.number)
        taken = super().write(bytes(content)[: Full.room])
        Full.room -= taken
        return taken


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`fill(room, errno)`: from now on files take so many bytes more in all."""

    def opened(path: Path, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        if not set(mode) & set("wax"):
            return io.open(path, mode, buffering)  # noqa: UP020
        raw = Full(path, mode.replace("b", "").replace("t", ""))
        return raw if buffering == 0 else io.BufferedWriter(raw)

    def begin(room: int, number: int) -> None:
        Full.room, Full.number = room, number
        monkeypatch.setattr(Path, "open", opened)

    return begin


class White:
    """A pipeline whose pictures are white."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def draw(self, pictures: Sequence[Picture], _: Any) -> torch.Tensor:
        return torch.full((len(pictures), 3, 8, 8), 255, dtype=torch.uint8)

    def draw_batches(self, pictures: Sequence[Picture], _: Any) -> Iterator[torch.Tensor]:
        yield self.draw(pictures, _)


@pytest.mark.parametrize("number", FAULTS)
def test_a_fault_of_the_disk_is_an_event_once_and_ends_nothing(tmp_path: Path, capsys, number: int) -> None:
    events = EventLog(tmp_path, "low")
    for _ in range(3):
        with events.tolerate_disk_errors("metrics.jsonl"):
            raise raised(number)
    with events.tolerate_disk_errors("report.html"):
        raise SafetensorError("No space left on device")
    said = (tmp_path / "events.log").read_text()
    assert said.count("metrics.jsonl cannot be written") == said.count("report.html cannot be written") == 1
    assert os.strerror(number) in said and capsys.readouterr().err.count("cannot be written") == 2
    with pytest.raises(KeyError), events.tolerate_disk_errors("a mistake of ours"):
        raise KeyError


def test_a_log_that_cannot_be_written_is_said_on_the_terminal_once(tmp_path: Path, capsys) -> None:
    events = EventLog(tmp_path / "gone", "low")
    events.add("one")
    events.add("two")
    assert capsys.readouterr().err.splitlines() == [
        "low: one",
        "low: events.log cannot be written (No such file or directory): training goes on without it",
        "low: two",
    ]


@pytest.mark.parametrize("room", [0, 1, 7])
def test_a_line_is_there_whole_or_not_at_all(tmp_path: Path, fill, room: int) -> None:
    path = tmp_path / "lines"
    append_line(path, "one")
    fill(room, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        append_line(path, "a line that is longer")
    assert path.read_text() == "one\n"
    fill(1000, errno.ENOSPC)
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


def test_a_file_is_whole_or_as_before(tmp_path: Path, fill) -> None:
    path = tmp_path / "config.yaml"
    atomic_write(path, b"old")
    fill(2, errno.EDQUOT)
    with pytest.raises(OSError, match="quota"):
        atomic_write(path, b"new and longer")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_metrics_go_on_where_there_is_room_again(tmp_path: Path, fill, number: int) -> None:
    tree = {"name": tmp_path.name, "root": tmp_path.parent, "train": {"steps": 9}}
    it = Observer(RunConfig.model_validate(tree), "low", 0, active=True)
    it.write("train", 1, {"loss": 1.0})
    fill(5, number)
    for step in (2, 3, 4):
        it.write("train", step, {"loss": 1.0})
        it.take_back(step, ("train",))
    fill(10000, number)
    it.write("train", 5, {"loss": 1.0})
    it.close()
    assert [line["step"] for line in JsonLines(tmp_path / "metrics.jsonl").lines()] == [1, 5]


def test_skipped_batches_and_grids_are_no_reason_to_stop(tmp_path: Path, fill, capsys) -> None:
    config = RunConfig.model_validate({"validation": {"prompts": ["a", "b"]}})
    skipped = SkippedFile(tmp_path, "low", 0)
    grids = Evaluator(White(config), ALONE, None, tmp_path / "samples", lambda _: None, EventLog(tmp_path, "low"))
    grids.grid(1)
    fill(20, errno.ENOSPC)
    for step in (2, 3):
        skipped.write([{"event": 1, "kind": "skipped_update", "step": step}], ["x"])
        grids.grid(step)
    assert capsys.readouterr().err.count("the sample grid cannot be written") == 1
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_000001.json", "step_000001.png"]


def test_a_model_that_the_disk_does_not_take_leaves_nothing_there(tmp_path: Path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("t2i.model_folder.save_file", full)
    with pytest.raises(OSError, match="model cannot be written: .*No space left"):
        write_model(tmp_path / "model", RunConfig(), {}, {}, torch.zeros(1))
    assert not list(tmp_path.iterdir())


def test_a_terminal_that_is_gone_is_not_written_to_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        tried = 0

        def write(self, text: str) -> None:
            Broken.tried += 1
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Broken())
    terminal = Terminal()
    assert terminal.isatty()
    terminal.write("a")
    terminal.write("b")
    terminal.flush()
    assert Broken.tried == 1 and not terminal.isatty()
