"""Training that is killed again and again, and resumed: nothing lost, nothing different.

    python tests/benchmarks/kill_soak.py [--kills 25]      # make soak

A run is two short stages of the tests' tiny model, a checkpoint every step, started as a user starts one, under
`deepspeed` or `torchrun`. It is killed (SIGKILL), started again once its lock is free, and so on to its end; a run that
ends before it has had all its kills is followed by another. All draws are of one seed.

- `zero1` and `fsdp2`: half of --kills each, always 2 processes. Compared with a run that nothing disturbed, bit by bit:
  weights and average of both models, everything in the last checkpoint of both stages, and every line of metrics.jsonl
  but for what a step cost.
- `changing`: a fifth as many kills; each start draws 1, 2 or 4 processes and ZeRO-1, ZeRO-3 or FSDP2, in fp32. All
  losses of the run are to lie within 1e-5 (relative) of the undisturbed ZeRO-1 run's.

Whom a kill hits is drawn: a launcher, one rank, or all processes at once. So is when: a fifth of the kills come at a
random moment of the start, the others after a random part of the run's steps, half of them at any moment, half as soon
as the folder of an uncommitted checkpoint is seen. `moments` counts where they fell: `start` is before the first
step of the start, `save` while a checkpoint was under way, `end` after the run's last step. `uncommitted` counts the
kills that left a checkpoint half written.

Nothing records the ids of a batch, as they follow from the data state: what a loader yields from the state that a start
resumed from, for the steps that it then trained, is compared with what a loader yields that nobody ever stopped. The
state itself, and that of each stage's last checkpoint, is compared with that loader's after the same step.

`resumes` are starts that went on from a checkpoint, at the step that the newest one on the disk says (else that is a
difference, as a damaged checkpoint is); `steps_repeated` steps that were trained more than once; `time_lost_s` the
seconds of all starts over those of as many undisturbed runs. The exit code is 1 if there are `differences`, or if the
run stands still: HANG_S seconds after a kill its launcher is there or its lock is held.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from tiny import pack_scenes, start, tiny_config, write_config

from data.loader import Batch
from t2i.config_loading import load_config, stage_config
from t2i.engine.checkpoint import Checkpoint, newest
from t2i.train.observe import JsonLines
from t2i.train.places import StagePlace, stage_places
from t2i.train.processes import World
from t2i.train.stage_data import Opened, open_data

SCRIPT = "curriculum.py"
STEPS = 20
"""Of each stage."""
LAST = f"step_{STEPS:08d}"
TOLERANCE = 1e-5
HANG_S = 120.0
POLL_S = 0.002
COSTS = {"stall_s", "skipped_checkpoints", "time", "step_s", "data_wait_s", "images_per_s", "tflops", "mfu"}
COSTS |= {"memory_gib"}
BEGUN = re.compile("(going on|starting) from")  # events.log, as the first step comes
SAVING = re.compile(r"\.step_\d+\.[0-9a-f]{8}\.\d+")  # what a checkpoint is called until it is committed


@dataclass(frozen=True)
class Engine:
    """How a run is started."""

    name: str
    launcher: str
    options: tuple[str, ...]
    ranks: int = 2


ZERO1 = Engine("zero1", "deepspeed", ("--engine.zero_stage", "1"))
ZERO3 = Engine("zero3", "deepspeed", ("--engine.zero_stage", "3"))
FSDP2 = Engine("fsdp2", "torchrun", ("--engine.name", "fsdp"))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Stand:
    """The first stage that is not done (their number: none is left), its newest checkpoint's step (0: there is none)
    and data state, and what is wrong with newer ones."""

    stage: int
    step: int
    data: dict[str, Any] | None
    faults: list[str]


class Run:
    """The folder of a run, and where it stands by what is in it."""

    def __init__(self, root: Path, name: str, scenes: Path) -> None:
        changes: dict[str, Any] = {
            "name": name,
            "train": {"steps": STEPS, "batch_size": 8, "micro_batch_size": 2},
            "validation": {"every": 10, "samples": 12, "prompts": ["a photo of a red circle"]},
            "checkpoint": {"every": 3, "keep": 2, "ephemeral_every": 1},
            # The stand-ins' gradients jump where rounding moves a unit over its kink, and losses part by 1e-3 then.
            "objective": {"features_network": "efficientnet-lite0", "lpips_weight": 0.0, "pdino_weight": 0.0},
            "stages": [{"name": "first"}, {"name": "second", "data": {"resolution": 24}}],
        }
        self.config_path = write_config(root / f"{name}.yaml", tiny_config(scenes, root, **changes))
        self.config = load_config(self.config_path)
        self.places: list[StagePlace] = stage_places(self.config)
        self.metrics = JsonLines(self.config.directory / "metrics.jsonl")
        self.events = self.config.directory / "events.log"

    @property
    def total(self) -> int:
        return STEPS * len(self.places)

    def steps_trained(self) -> int:
        """Steps with a line in metrics.jsonl, over all stages."""
        path = self.metrics.path
        return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0

    def saves(self) -> set[Path]:
        """Folders of checkpoints that are not committed."""
        found = (path for place in self.places for path in place.checkpoints.glob(".step_*"))
        return {path for path in found if SAVING.fullmatch(path.name)}

    def stands(self) -> Stand:
        """Where the next start is to go on."""
        for stage, place in enumerate(self.places):
            if not place.done:
                path, faults = newest(place.checkpoints)
                state = Checkpoint(path).state if path is not None else {"step": 0, "data": None}
                return Stand(stage, state["step"], state["data"], faults)
        return Stand(len(self.places), 0, None, [])

    def wait_until_free(self) -> bool:
        """Wait for whoever holds the run; False: it is held for ever."""
        path, deadline = self.config.directory / "run.lock", time.monotonic() + HANG_S
        while path.exists():
            with path.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        return False
            time.sleep(0.05)
        return True


# Killing


@dataclass(frozen=True)
class Aim:
    """When a kill is to come: `at` seconds after the `start`, or at a place among the steps (`step`, `save`)."""

    moment: str
    at: float


def draw_aims(rng: random.Random, count: int, start_s: float, total: int) -> Iterator[Aim]:
    """Kills of one run, the later ones further on in it. A save needs others after it, lest the run ends first."""
    places = sorted(rng.uniform(0, total + 1) for _ in range(count))
    for place in places:
        moment = rng.choice(["start", "step", "step", "save", "save"])
        at = rng.uniform(0, start_s) if moment == "start" else place
        yield Aim(moment, min(at, total - 2.0) if moment == "save" else at)


class Stuck(Exception):
    """A run that neither goes on nor can be started again."""


class Start:
    """One start of a run."""

    def __init__(self, run: Run, engine: Engine) -> None:
        self.run = run
        self.name = f"{run.config.name}: {engine.name} x{engine.ranks}"
        self._leftovers = run.saves()
        self._offset = run.events.stat().st_size if run.events.exists() else 0
        self._began = time.monotonic()
        options = ["--config", str(run.config_path), *engine.options]
        self._process = start(engine.launcher, SCRIPT, *options, ranks=engine.ranks)
        self._output: deque[str] = deque(maxlen=40)
        threading.Thread(target=self._output.extend, args=(self._process.stdout,), daemon=True).start()

    def told(self) -> str:
        """What events.log says of this start."""
        return self.run.events.read_bytes()[self._offset :].decode() if self.run.events.exists() else ""

    def begun(self) -> bool:
        """Whether its first step has come."""
        return BEGUN.search(self.told()) is not None

    def saving(self) -> bool:
        """Whether there is a checkpoint of this start that is not committed."""
        return bool(self.run.saves() - self._leftovers)

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; False: the run ended first."""
        while not condition():
            if self._process.poll() is not None:
                return False
            time.sleep(POLL_S)
        return True

    def _after(self, seconds: float) -> bool:
        then = time.monotonic() + seconds
        return self._until(lambda: time.monotonic() >= then)

    def _family(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """The launchers, the topmost first, and the ranks. It takes longer to find them than to save."""
        launchers: list[psutil.Process] = []
        ranks: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # one that has ended has no children that matter
            top = psutil.Process(self._process.pid)
            for it in [top, *top.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    words = [word.endswith(SCRIPT) for word in it.cmdline()]
                    if any(words):  # a rank is a Python that runs the script, a launcher one that is told of it
                        (ranks if any(words[1:3]) else launchers).append(it)
        return launchers, ranks

    def kill(self, aim: Aim, step_s: float, rng: random.Random) -> tuple[str, str] | None:
        """Kill it as aimed; whom and at which moment that was. None: it ended before."""
        ready = self._after(aim.at) if aim.moment == "start" else self._until(self.begun)
        launchers, ranks = self._family()
        if not ready or not launchers:
            return None
        whom = rng.choice(["launcher", "rank", "all"] if ranks else ["launcher", "all"])
        victims = {"launcher": [rng.choice(launchers)], "rank": [rng.choice(ranks or launchers)]}
        if aim.moment != "start":
            ready = self._until(lambda: self.run.steps_trained() >= int(aim.at))
            ready = ready and (self._until(self.saving) if aim.moment == "save" else self._after(aim.at % 1 * step_s))
            if not ready:
                return None
        saving = self.saving()
        for victim in victims.get(whom, launchers + ranks):
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        trained = self.run.steps_trained()
        moment = "save" if saving else "start" if not self.begun() else "end" if trained == self.run.total else "step"
        say(f"{self.name}, {whom} killed ({moment}), {trained} steps done")
        return whom, moment

    def leave(self, killed: bool) -> float:
        """Wait until it has ended and left the run; the seconds since its start.

        Raises:
            Stuck: it failed without being killed, or it is still there.
        """
        try:
            code = self._process.wait(HANG_S if killed else 10 * HANG_S)
        except subprocess.TimeoutExpired:
            for left in chain(*self._family()):
                left.kill()
            raise Stuck(f"{self.name} does not end:\n{''.join(self._output)}") from None
        if code != 0 and not killed:
            raise Stuck(f"{self.name} ended with {code}:\n{''.join(self._output)}")
        if not self.run.wait_until_free():
            raise Stuck(f"{self.name} still holds the run:\n{''.join(self._output)}")
        return time.monotonic() - self._began


@dataclass
class Tally:
    """What became of all runs of a kind; `differences` by what differs, each with where."""

    rng: random.Random
    runs: int = 0
    resumes: int = 0
    whom: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    uncommitted: int = 0
    steps_trained: int = 0
    steps_repeated: int = 0
    seconds: float = 0.0
    time_lost_s: float = 0.0
    differences: list[tuple[str, str]] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.moments.total()


# Comparing


class Stream:
    """What a loader yields that nobody stops: ids and data state of every step of every stage."""

    def __init__(self, run: Run) -> None:
        opened: Opened = {}
        self._names = [place.name for place in run.places]
        self._settings = [stage_config(run.config, stage) for stage in range(len(self._names))]
        self._data = [open_data(it, name, opened) for it, name in zip(self._settings, self._names, strict=True)]
        whole = [self._read(stage, None, STEPS) for stage in range(len(self._names))]
        self._ids = [[batch.ids for batch in batches] for batches in whole]
        self._states = [[json.loads(json.dumps(batch.state)) for batch in batches] for batches in whole]

    def _read(self, stage: int, state: dict[str, Any] | None, count: int) -> list[Batch]:
        world = World(0, 1, torch.device("cpu"))
        with self._data[stage].loader(self._settings[stage], self._names[stage], world, state) as loader:
            return [next(loader) for _ in range(count)]

    def check(
        self, name: str, stage: int, first: int, state: dict[str, Any] | None, last: int
    ) -> Iterator[tuple[str, str]]:
        """What differs of the run `name`: its data state after step `first`, and the ids from there to step `last`."""
        where = f"{name}, stage {self._names[stage]}, step {first}"
        if first and state != self._states[stage][first - 1]:
            yield "data state", where
        found = [batch.ids for batch in self._read(stage, state, max(0, last - first))]
        if found != self._ids[stage][first : first + len(found)]:
            yield "ids", f"{where} to {last}"


def numbers(run: Run) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Lines of metrics.jsonl by stage, kind and step, of which one is due; none of saves, and not what a step cost."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for line in run.metrics.lines():
        if line["kind"] != "checkpoint":
            kept = {name: value for name, value in line.items() if name not in COSTS}
            found.setdefault((line["stage"], line["kind"], line["step"]), []).append(kept)
    return found


def is_close(a: float | None, b: float | None) -> bool:
    """Whether two losses are equal, as far as another order of sums leaves them so; None is NaN."""
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=TOLERANCE))


def tensors(run: Run) -> dict[str, torch.Tensor]:
    """Everything in the models and the last checkpoints, by file and name, as bytes."""
    found = {}
    for place in run.places:
        files = [*place.model.glob("*.safetensors"), *(place.checkpoints / LAST).glob("*.safetensors")]
        for path in files:
            for name, tensor in load_file(path).items():
                found[f"{path.relative_to(run.config.directory)}:{name}"] = tensor.flatten().view(torch.uint8)
    return found


def compare(run: Run, expected: Run, exact: bool) -> Iterator[tuple[str, str]]:
    """What differs between two runs that are done: everything bit by bit, or losses by TOLERANCE."""
    ours, theirs = numbers(run), numbers(expected)
    for place in sorted(ours.keys() | theirs.keys()):
        where = f"{run.config.name}, {' '.join(map(str, place))}"
        if len(ours.get(place, ())) != len(theirs.get(place, ())):
            yield "metrics", f"{where}: {len(ours.get(place, ()))} lines"
            continue
        for our, their in zip(ours[place], theirs[place], strict=True):
            for name, value in their.items():
                is_loss, found = name.startswith("loss"), our.get(name)
                if found != value if exact else is_loss and not is_close(found, value):
                    yield "losses" if is_loss else "metrics", f"{where}: {name} {found} instead of {value}"
    if not exact:
        return
    mine, whole = tensors(run), tensors(expected)
    assert any("ema.safetensors" in name for name in whole) and any("rank_00001" in name for name in whole)
    for name in sorted(mine.keys() | whole.keys()):
        if name not in mine or name not in whole or not torch.equal(mine[name], whole[name]):
            yield "weights", name
    for ours_at, theirs_at in zip(run.places, expected.places, strict=True):
        states = [Checkpoint(it.checkpoints / LAST).state for it in (ours_at, theirs_at)]
        for name in sorted(states[0].keys() | states[1].keys()):
            if name != "config" and states[0].get(name) != states[1].get(name):
                yield "state", f"stage {ours_at.name}: {name}"


# Passes


@dataclass
class Undisturbed:
    """A run that nothing disturbed, and how long it took: as a whole, to its first step, and a step."""

    run: Run
    seconds: float
    start_s: float
    step_s: float


def undisturbed(root: Path, scenes: Path, engine: Engine) -> Undisturbed:
    """Train a run in one go."""
    run, began = Run(root, f"{engine.name}_undisturbed", scenes), time.time()
    seconds = Start(run, engine).leave(killed=False)
    steps = [line for line in run.metrics.lines() if line["kind"] == "train"]
    step_s = sum(line["step_s"] for line in steps) / len(steps)
    found = Undisturbed(run, seconds, steps[0]["time"] - began, step_s)
    say(f"{run.config.name}: {found.seconds:.0f} s, {found.start_s:.0f} s to the first step, {step_s:.2f} s a step")
    return found


def to_its_end(
    run: Run, engines: Sequence[Engine], aims: Iterator[Aim], step_s: float, stream: Stream, tally: Tally
) -> None:
    """Start a run until it is done, killed once for each aim; each start is of an engine that is drawn."""
    tally.runs += 1
    name = run.config.name
    while (at := run.stands()).stage < len(run.places):
        tally.differences += [("checkpoint", fault) for fault in at.faults]
        begun, aim = Start(run, tally.rng.choice(engines)), next(aims, None)
        killed = aim and begun.kill(aim, step_s, tally.rng)
        tally.seconds += begun.leave(killed is not None)
        if killed is not None:
            tally.whom[killed[0]] += 1
            tally.moments[killed[1]] += 1
            tally.uncommitted += begun.saving()
        if not begun.begun():
            continue
        told = begun.told()
        origin = re.search(rf" {run.places[at.stage].name}: .*going on from step_(\d+)", told)
        tally.resumes += origin is not None
        if int(origin[1] if origin else 0) != at.step:
            tally.differences.append(("resume", f"{name}: not from {at.step}: {told}"))
        trained = run.steps_trained()
        tally.steps_trained += trained - STEPS * at.stage - at.step
        for stage in range(at.stage, len(run.places)):
            first, data = (at.step, at.data) if stage == at.stage else (0, None)
            tally.differences += stream.check(name, stage, first, data, min(trained - STEPS * stage, STEPS))
    for stage, place in enumerate(run.places):
        state = Checkpoint(place.checkpoints / LAST).state["data"]
        tally.differences += stream.check(name, stage, STEPS, state, STEPS)


def soak(
    name: str, engines: Sequence[Engine], kills: int, expected: Undisturbed, stream: Stream, scenes: Path, exact: bool
) -> Tally:
    """Kill runs until there have been so many kills, and compare each with one that nothing disturbed."""
    tally = Tally(random.Random(name))
    while tally.kills < kills:
        run = Run(expected.run.config.directory.parent, f"{name}_{tally.runs}", scenes)
        aims = draw_aims(tally.rng, kills - tally.kills, expected.start_s, run.total)
        to_its_end(run, engines, aims, expected.step_s, stream, tally)
        tally.differences += compare(run, expected.run, exact)
        say(f"{run.config.name}: done, {tally.kills} of {kills} kills, {len(tally.differences)} differences")
    tally.steps_repeated = tally.steps_trained - tally.runs * expected.run.total
    tally.time_lost_s = tally.seconds - tally.runs * expected.seconds
    return tally


def report(tally: Tally, exact: bool) -> dict[str, Any]:
    """What a pass comes to."""
    differing = {what for what, _ in tally.differences}
    return {
        "kills": tally.kills,
        "killed": dict(sorted(tally.whom.items())),
        "moments": dict(sorted(tally.moments.items())),
        "uncommitted": tally.uncommitted,
        "runs": tally.runs,
        "resumes": tally.resumes,
        **({"bit_identical": not differing & {"weights", "state", "metrics", "losses"}} if exact else {}),
        "losses_equal": "losses" not in differing,
        "ids_equal": "ids" not in differing,
        "data_states_equal": "data state" not in differing,
        "steps_repeated": tally.steps_repeated,
        "time_lost_s": round(tally.time_lost_s),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="of the pass at a constant number of processes")
    kills = parser.parse_args().kills
    # Threads that spin at barriers cost seconds a step where other programs want the cores, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    root = Path(tempfile.mkdtemp(prefix="kill_soak_"))
    scenes = pack_scenes(root / "scenes")
    tallies: dict[str, Tally] = {}
    stuck: list[str] = []
    try:
        expected = {engine.name: undisturbed(root, scenes, engine) for engine in (ZERO1, FSDP2)}
        stream = Stream(expected["zero1"].run)
        for engine, share in ((ZERO1, kills - kills // 2), (FSDP2, kills // 2)):
            tallies[engine.name] = soak(engine.name, [engine], share, expected[engine.name], stream, scenes, True)
        drawn = [replace(engine, ranks=ranks) for engine in (ZERO1, ZERO3, FSDP2) for ranks in (1, 2, 4)]
        tallies["changing"] = soak("changing", drawn, max(1, kills // 5), expected["zero1"], stream, scenes, False)
    except Stuck as error:
        stuck.append(str(error))
    passes = {name: report(tally, name != "changing") for name, tally in tallies.items()}
    differences = [f"{name}: {what}: {where}" for name, it in tallies.items() for what, where in it.differences]
    totals = {
        name: sum(it[name] for it in passes.values()) for name in ("kills", "resumes", "steps_repeated", "time_lost_s")
    }
    bit_identical = not stuck and all(it.get("bit_identical", True) for it in passes.values())
    found = {**totals, "bit_identical": bit_identical, **passes, "differences": differences, "stuck": stuck}
    print(json.dumps(found, indent=1))
    if differences or stuck:
        say(f"the runs are in {root}")
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
