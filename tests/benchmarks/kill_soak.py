"""Training that is killed again and again, and resumed: nothing lost, nothing different.

    python tests/benchmarks/kill_soak.py [--kills 25]      # make soak

A run is two short stages of the tests' tiny model, a checkpoint every step, started as a user starts one, under
`deepspeed` or `torchrun`. It is killed (SIGKILL), started again once its lock is free, and so on to its end; a run that
ends before it has had all its kills is followed by another. All draws are of one seed.

- `zero1` and `fsdp2`: half of --kills each, always 2 processes. Compared with a run that nothing disturbed, bit by bit:
  weights and EMA of both models, everything in the last checkpoint of both stages, and every line of metrics.jsonl
  but for what a step cost.
- `changing`: a fifth as many kills; each start draws 1, 2 or 4 processes and ZeRO-1, ZeRO-3 or FSDP2, in fp32. All
  losses of the run are to lie within 1e-5 (relative) of the undisturbed ZeRO-1 run's.

Whom a kill hits is drawn: a launcher (then its ranks save and leave), one rank, or all processes at once. So is when: a
fifth of the kills come at a random moment of the start, the others after a random part of the run's steps, half of them
at any moment, half as soon as the folder of an uncommitted checkpoint is seen. `moments` counts where they fell:
`start` is before the first step of the start, `save` while a checkpoint was under way, `end` after the run's last step.
`uncommitted` counts the kills that left a checkpoint half written.

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
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from soak.compare import Stream, compare
from soak.kills import Aim, Start, Stuck, draw_aims
from soak.runs import FSDP2, LAST, STEPS, ZERO1, ZERO3, Parallelism, Run, say
from tiny import pack_scenes

from t2i.engine.checkpoint import Checkpoint


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


@dataclass
class Undisturbed:
    """A run that nothing disturbed, and how long it took: as a whole, to its first step, and a step."""

    run: Run
    seconds: float
    start_s: float
    step_s: float


def undisturbed(root: Path, scenes: Path, parallelism: Parallelism) -> Undisturbed:
    """Train a run in one go."""
    run, began = Run(root, f"{parallelism.name}_undisturbed", scenes), time.time()
    seconds = Start(run, parallelism).leave(killed=False)
    steps = [line for line in run.metrics.lines() if line["kind"] == "train"]
    if skipped := max(line["skipped_updates"] for line in steps):
        raise RuntimeError(f"{run.config.name}: {skipped} updates were not applied: nothing to compare with")
    step_s = sum(line["step_s"] for line in steps) / len(steps)
    found = Undisturbed(run, seconds, steps[0]["time"] - began, step_s)
    say(f"{run.config.name}: {found.seconds:.0f} s, {found.start_s:.0f} s to the first step, {step_s:.2f} s a step")
    return found


def to_its_end(
    run: Run, parallelisms: Sequence[Parallelism], aims: Iterator[Aim], step_s: float, stream: Stream, tally: Tally
) -> None:
    """Start a run until it is done, killed once for each aim; how each start is spread over processes is drawn."""
    tally.runs += 1
    name = run.config.name
    while (at := run.stands()).stage < len(run.places):
        tally.differences += [("checkpoint", fault) for fault in at.faults]
        begun, aim = Start(run, tally.rng.choice(parallelisms)), next(aims, None)
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
    name: str,
    parallelisms: Sequence[Parallelism],
    kills: int,
    expected: Undisturbed,
    stream: Stream,
    scenes: Path,
    exact: bool,
) -> Tally:
    """Kill runs `kills` times in all, and compare each with a run that was never disturbed."""
    tally = Tally(random.Random(name))
    while tally.kills < kills:
        run = Run(expected.run.config.directory.parent, f"{name}_{tally.runs}", scenes)
        aims = draw_aims(tally.rng, kills - tally.kills, expected.start_s, run.total)
        to_its_end(run, parallelisms, aims, expected.step_s, stream, tally)
        tally.differences += compare(run, expected.run, exact)
        say(f"{run.config.name}: done, {tally.kills} of {kills} kills, {len(tally.differences)} differences")
    tally.steps_repeated = tally.steps_trained - tally.runs * expected.run.total
    tally.time_lost_s = tally.seconds - tally.runs * expected.seconds
    return tally


def report(tally: Tally, exact: bool) -> dict[str, Any]:
    """The summary of a pass."""
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
        expected = {layout.name: undisturbed(root, scenes, layout) for layout in (ZERO1, FSDP2)}
        stream = Stream(expected["zero1"].run)
        for layout, share in ((ZERO1, kills - kills // 2), (FSDP2, kills // 2)):
            tallies[layout.name] = soak(layout.name, [layout], share, expected[layout.name], stream, scenes, True)
        drawn = [replace(layout, ranks=ranks) for layout in (ZERO1, ZERO3, FSDP2) for ranks in (1, 2, 4)]
        tallies["changing"] = soak("changing", drawn, max(1, kills // 5), expected["zero1"], stream, scenes, False)
    except Stuck as error:
        stuck.append(str(error))
    passes = {name: report(tally, name != "changing") for name, tally in tallies.items()}
    differences = [f"{name}: {what}: {where}" for name, tally in tallies.items() for what, where in tally.differences]
    totals = {
        name: sum(one[name] for one in passes.values())
        for name in ("kills", "resumes", "steps_repeated", "time_lost_s")
    }
    bit_identical = not stuck and all(p.get("bit_identical", True) for p in passes.values())
    found = {**totals, "bit_identical": bit_identical, **passes, "differences": differences, "stuck": stuck}
    print(json.dumps(found, indent=1))
    if differences or stuck:
        say(f"the runs are in {root}")
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
