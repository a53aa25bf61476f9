"""Weights & Biases ends no run and confuses none: what fails or hangs there is an event."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from t2i.config.run import RunConfig
from t2i.train import metrics
from t2i.train.metrics import STEP, JsonLines, Observer


class Service:
    """In place of the library: notes what is logged; a call may do something else."""

    def __init__(self, **instead: Callable[[], object]) -> None:
        self.instead = instead
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str | None]] = []
        self.ended = 0

    def _meet(self, name: str) -> None:
        if (act := self.instead.get(name)) is not None:
            act()

    def login(self, prompt: bool) -> bool:
        assert not prompt
        self._meet("login")
        return "no login" not in self.instead

    def init(self, **settings: Any) -> Service:
        self.begun.append(settings)
        self._meet(f"init {settings['mode']}")
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        if len(self.logged) == 2:
            self._meet("log")
        self.logged.append(values)

    def finish(self) -> None:
        self._meet("finish")
        self.ended += 1

    def teardown(self) -> None:
        self._meet("teardown")


def fails(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.fixture
def hang() -> Iterator[Callable[[], None]]:
    """A call that does not return before the test is over."""
    over = threading.Event()
    yield lambda: over.wait(60)
    over.set()


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BEGIN_S", "FINISH_S", "CALL_S"):
        monkeypatch.setattr(metrics, name, 0.3)


def observed(
    directory: Path, service: Service, monkeypatch: pytest.MonkeyPatch, steps: range, mode: str = "online"
) -> str:
    """Log some steps; what events.log then says."""
    monkeypatch.setitem(sys.modules, "wandb", service)
    tree = {"name": directory.name, "root": directory.parent, "train": {"steps": 9}, "logging": {"wandb": mode}}
    it = Observer(RunConfig.model_validate(tree), "low", steps.start, active=True)
    for step in steps:
        began = time.perf_counter()
        it.write("train", step + 1, {"loss": 1.0 / (step + 1)})
        assert time.perf_counter() - began < 0.2  # whatever it meets
    it.close()
    events = directory / "events.log"
    return events.read_text() if events.exists() else ""


def modes(service: Service) -> list[str]:
    return [settings["mode"] for settings in service.begun]


def test_every_value_carries_its_step_also_where_a_run_goes_back(tmp_path: Path, monkeypatch) -> None:
    first, second = Service(), Service()
    assert observed(tmp_path, first, monkeypatch, range(6)) == ""
    assert observed(tmp_path, second, monkeypatch, range(3, 8)) == ""  # killed after step 6, saved at 3
    for service, steps in ((first, range(1, 7)), (second, range(4, 9))):
        assert service.logged == [{STEP: step, "low/train/loss": 1.0 / step} for step in steps]
        assert service.defined == [(STEP, None), ("*", STEP)]
        assert service.ended == 1 and modes(service) == ["online"]


def test_a_run_keeps_its_id_and_no_other_of_its_name_has_it(tmp_path: Path, monkeypatch) -> None:
    ids = []
    for folder in (tmp_path / "here" / "run", tmp_path / "here" / "run", tmp_path / "there" / "run"):
        folder.mkdir(parents=True, exist_ok=True)
        service = Service()
        observed(folder, service, monkeypatch, range(1))
        assert service.begun[0]["name"] == "run" and service.begun[0]["resume"] == "allow"
        ids.append(service.begun[0]["id"])
        assert (folder / "wandb_id").read_text() == ids[-1]
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) >= 8
    (tmp_path / "there" / "run" / "wandb_id").write_text("")  # torn
    observed(tmp_path / "there" / "run", service := Service(), monkeypatch, range(1))
    assert service.begun[0]["id"] not in ("", *ids)


FAULTS = [OSError("no route to host"), RuntimeError("x"), SystemExit(1), KeyboardInterrupt(), ValueError("two\nlines")]


@pytest.mark.parametrize("error", FAULTS, ids=repr)
@pytest.mark.parametrize("where", ["login", "init online"])
def test_what_cannot_begin_online_begins_offline(where: str, error: BaseException, tmp_path: Path, monkeypatch) -> None:
    service = Service(**{where: fails(error)})
    events = observed(tmp_path, service, monkeypatch, range(3))
    assert type(error).__name__ in events and "writing offline" in events and len(events.splitlines()) == 1
    assert modes(service)[-1] == "offline" and len(service.logged) == 3 and service.ended == 1


def test_without_a_login_it_begins_offline(tmp_path: Path, monkeypatch) -> None:
    service = Service(**{"no login": fails(AssertionError())})
    assert "(no login): writing offline" in observed(tmp_path, service, monkeypatch, range(1))
    assert modes(service) == ["offline"]


@pytest.mark.parametrize("error", FAULTS, ids=repr)
@pytest.mark.parametrize("where", ["init offline", "log", "finish"])
def test_what_fails_later_is_dropped_and_training_goes_on(
    where: str, error: BaseException, tmp_path: Path, monkeypatch
) -> None:
    service = Service(**{where: fails(error), "teardown": fails(RuntimeError("it too"))})
    events = observed(tmp_path, service, monkeypatch, range(5), mode="offline")
    assert type(error).__name__ in events and "it is dropped, and training goes on" in events
    assert len(events.splitlines()) == 1
    assert len(service.logged) == {"init offline": 0, "log": 2, "finish": 5}[where]
    assert [line["step"] for line in JsonLines(tmp_path / "metrics.jsonl").lines()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("where", ["login", "init online", "init offline", "log", "finish"])
def test_what_hangs_is_left_behind(where: str, hang: Callable[[], None], tmp_path: Path, monkeypatch) -> None:
    mode = "offline" if where == "init offline" else "online"
    service = Service(**{where: hang, "teardown": hang})
    began = time.monotonic()
    events = observed(tmp_path, service, monkeypatch, range(5), mode)
    assert time.monotonic() - began < 10
    assert "no answer for 0.3 s" in events
    assert ("writing offline" in events) == (where in ("login", "init online"))
    assert ("is dropped" in events) == (where not in ("login", "init online"))


def test_what_waits_is_bounded(hang: Callable[[], None], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "MOST_WAITING", 3)
    monkeypatch.setattr(metrics, "BEGIN_S", 30.0)
    events = observed(tmp_path, Service(**{"init offline": hang}), monkeypatch, range(9), mode="offline")
    assert events.count("does not keep up") == 1 and "left behind" in events
    assert len(JsonLines(tmp_path / "metrics.jsonl").lines()) == 9


def test_a_package_that_is_not_there_is_an_event(tmp_path: Path, monkeypatch) -> None:
    events = observed(tmp_path, None, monkeypatch, range(2), mode="offline")  # type: ignore[arg-type]
    assert "ModuleNotFoundError" in events and "is dropped" in events
