"""Traces hold the chosen steps and no others; what cannot be looked into is said, and costs no step."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
import torch

from t2i.config.train import ProfilingConfig
from t2i.train.profiling import Profiler

CPU = torch.device("cpu")


class Stage:
    """Steps of a stage that each multiply two matrices."""

    def __init__(self, folder: Path, device: torch.device = CPU, **settings: int) -> None:
        self.folder, self.said = folder, list[str]()
        self.profiler = Profiler(ProfilingConfig(**settings), folder, 3, device, self.said.append)

    def run(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            with self.profiler.step(step):
                torch.ones(4, 4) @ torch.ones(4, 4)

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []

    def traced(self, name: str) -> tuple[list[str], int]:
        """The steps in a trace, and how many products."""
        events: list[dict[str, Any]] = json.loads(gzip.decompress((self.folder / name).read_bytes()))["traceEvents"]
        names = [str(event.get("name")) for event in events if event.get("ph") == "X"]
        return sorted({name for name in names if name.startswith("step ")}), names.count("aten::mm")


def test_the_chosen_steps_are_traced_and_no_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "profile", trace_step=5, trace_steps=2)
    stage.run(1, 5)
    assert stage.files == []
    stage.run(6, 9)
    name = "trace_00000005-00000006_rank_00003.json.gz"
    assert stage.files == [name] and stage.said == [f"wrote {tmp_path / 'profile' / name}"]
    assert stage.traced(name) == (["step 5", "step 6"], 2)


@pytest.mark.parametrize(
    "steps, name, traced",
    [
        ((1, 4), "trace_00000002-00000004_rank_00003.json.gz", 3),
        ((3, 9), "trace_00000003-00000004_rank_00003.json.gz", 2),  # a stage that goes on inside the range
        ((1, 3), "trace_00000002-00000003_rank_00003.json.gz", 2),  # one that ends there
        ((2, 2), "trace_00000002-00000002_rank_00003.json.gz", 1),
    ],
)
def test_where_the_stage_has_only_some_of_the_steps_those_are_traced(
    tmp_path: Path, steps: tuple[int, int], name: str, traced: int
) -> None:
    stage = Stage(tmp_path, trace_step=2, trace_steps=3)
    with stage.profiler:
        stage.run(*steps)
    assert stage.files == [name]
    assert stage.traced(name)[1] == traced


def test_the_first_step_can_be_traced(tmp_path: Path) -> None:
    stage = Stage(tmp_path, trace_step=1, trace_steps=1)
    stage.run(1, 2)
    assert stage.traced("trace_00000001-00000001_rank_00003.json.gz") == (["step 1"], 1)


def test_a_stage_that_does_not_come_to_the_steps_writes_nothing(tmp_path: Path) -> None:
    for last in (3, 4):  # 4 is the warm-up
        stage = Stage(tmp_path / "profile", trace_step=5)
        with stage.profiler:
            stage.run(1, last)
        assert stage.files == [] == stage.said


def test_a_rollback_begins_the_trace_anew(tmp_path: Path) -> None:
    stage = Stage(tmp_path, trace_step=5, trace_steps=3)
    stage.run(1, 5)
    stage.run(2, 8)
    assert stage.files == [f"trace_00000005-0000000{last}_rank_00003.json.gz" for last in (5, 7)]
    assert stage.traced(stage.files[1]) == (["step 5", "step 6", "step 7"], 3)


def test_an_error_in_a_step_is_raised_and_the_steps_before_it_are_written(tmp_path: Path) -> None:
    stage = Stage(tmp_path, trace_step=2, trace_steps=3)
    with pytest.raises(KeyError), stage.profiler:
        stage.run(1, 2)
        with stage.profiler.step(3):
            raise KeyError
    assert stage.files == ["trace_00000002-00000002_rank_00003.json.gz"]


def test_steps_that_are_not_looked_into_cost_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "profile")
    contexts = [stage.profiler.step(step) for step in range(1, 100)]
    assert all(context is contexts[0] for context in contexts)


def test_a_trace_that_cannot_be_written_is_said_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    stage = Stage(tmp_path / "profile" / "here", trace_step=2, trace_steps=1)
    stage.run(1, 3)
    assert len(stage.said) == 1 and stage.said[0].startswith("rank 3 could not write ")


def test_without_cuda_a_memory_snapshot_is_refused_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, memory_step=2)
    with stage.profiler:
        stage.run(1, 4)
    assert stage.said == ["profiling.memory_step 2: no memory snapshot, cpu is no CUDA device"]
    assert stage.files == []


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """torch.cuda.memory's two functions, with their own signatures; a snapshot is an empty file."""
    calls = Mock()
    for name in ("_record_memory_history", "_dump_snapshot"):
        stand_in = create_autospec(getattr(torch.cuda.memory, name))
        calls.attach_mock(stand_in, name)
        monkeypatch.setattr(torch.cuda.memory, name, stand_in)
    calls._dump_snapshot.side_effect = lambda path: Path(path).touch()
    return calls


def test_with_cuda_the_allocations_of_the_chosen_step_are_recorded(tmp_path: Path, memory: Mock) -> None:
    stage = Stage(tmp_path, torch.device("cuda"), memory_step=2)
    stage.run(1, 1)
    assert memory.mock_calls == []
    stage.run(2, 4)
    begun, dumped, ended = memory.mock_calls
    assert begun[0] == ended[0] == "_record_memory_history" and "enabled" not in begun.kwargs
    assert dumped[0] == "_dump_snapshot" and ended.kwargs == {"enabled": None}
    assert stage.files == ["memory_00000002_rank_00003.pickle"]


def test_the_allocations_of_a_step_that_fails_are_written_too(tmp_path: Path, memory: Mock) -> None:
    stage = Stage(tmp_path, torch.device("cuda"), memory_step=2)
    with pytest.raises(torch.OutOfMemoryError), stage.profiler, stage.profiler.step(2):
        raise torch.OutOfMemoryError
    assert stage.files == ["memory_00000002_rank_00003.pickle"]
    assert memory.mock_calls[-1].kwargs == {"enabled": None}
