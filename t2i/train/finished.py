"""What finished stages were trained with, held against what the config says of them now.

A finished stage is not trained again, so the config may no longer say otherwise of what decides its weights: the run's
config.yaml would tell what never ran. Its model's folder holds the settings that it ended with; its data is not opened.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from t2i.config import OptimizerConfig, RunConfig
from t2i.config_base import ConfigError
from t2i.config_loading import changes, fields_of, load_config, stage_config
from t2i.engine.checkpoint import newest_anywhere, step_of
from t2i.train.places import StagePlace
from t2i.train.schedule import learning_rate
from t2i.train.start import mirror_of

_SECTIONS = {"seed", "model", "text", "data", "objective", "optimizer", "train", "ema", "init"}
_ACCESS = {
    "index",
    "heldout",
    "endpoint",
    "region",
    "profile",
    "anonymous",
    "requester_pays",
    "licence",
    "credit",
    "images",
}
_BESIDE = {
    # Whether another text encoder is the same one, moved, is seen in the null caption, once a stage is trained.
    "text": {"model", "cache", "release"},
    "train": {"micro_batch_size"},
    "data": {"workers", "buffer_gib", "max_set_aside", "connect_timeout_s", "read_timeout_s", "retry_minutes"},
}
"""Fields of those sections that do not decide weights."""
_SHOWN = 4
_EXTENDABLE = ("train.steps", "optimizer.")
"""Fields that may change where a finished stage is trained for longer."""


def check_finished(
    config: RunConfig, places: Sequence[StagePlace], chosen: Collection[int], extend: int | None
) -> str | None:
    """Refuse a config that says of finished stages what did not run, or would train a stage out of order. On rank 0.

    Args:
        config: the run.
        places: of every stage.
        chosen: indices of the stages that this command is for; its command line is for them alone.
        extend: index of the stage that may be trained for longer although it is finished; None: none may.

    Returns:
        Where that stage is to be trained for longer, what becomes of its learning rate, in a sentence; else None.

    Raises:
        UserError: naming the stage, the fields with both values, and the way out.
    """
    stages = [stage_config(config, index) for index in range(len(places))]
    if extend is not None and not (places[extend].done and _is_longer(stages[extend], places[extend])):
        extend = None  # it goes on as any stage does, or is done
    pending = [place for index, place in enumerate(places) if not place.done or index == extend]
    before = _stages_before(config)
    for index, (stage, place) in enumerate(zip(stages, places, strict=True)):
        follows = place.previous if stage.init.source == "previous" else None
        if follows in pending and place.begun:
            why = "would be stale" if index - 1 == extend else "would be trained out of order"
            raise ConfigError(
                f"stage {follows.name} is to be trained, and stage {place.name}, which goes on from it, has begun in "
                f"{place.folder} and {why}: move that folder away, or give this run another name"
            )
        if place.done:
            _check_stage(stage, place, bool(pending), index in chosen, index == extend)
        now = follows.name if follows is not None else None
        if place.begun and stage.init.source == "previous" and before.get(place.name, now) != now:
            raise ConfigError(
                f"stages: stage {place.name} was trained after {before[place.name] or 'no other'}, and the config "
                f"now has {now or 'no other'} before it: list the stages as they were, or give this run another name"
            )
    return None if extend is None else _extension(stages[extend], places[extend])


def _stages_before(config: RunConfig) -> dict[str, str | None]:
    """The stage before each, as the run's config.yaml has them of its last start; empty before the first one."""
    path = config.directory / "config.yaml"
    names = [stage["name"] for stage in load_config(path).stages] if path.exists() else []
    return dict(zip(names, [None, *names], strict=False))


def _trained_with(place: StagePlace) -> RunConfig:
    """The settings that a finished stage ended with."""
    return load_config(place.model / "config.yaml")


def _is_longer(stage: RunConfig, place: StagePlace) -> bool:
    return stage.train.steps > _trained_with(place).train.steps


def _check_stage(now: RunConfig, place: StagePlace, any_pending: bool, chosen: bool, extend: bool) -> None:
    """Compare a finished stage's settings with the config's."""
    old, new = (_deciding(settings, any_pending) for settings in (_trained_with(place), now))
    changed = [name for name in changes(old, new) if not (extend and name.startswith(_EXTENDABLE))]
    if not changed:
        return
    old, new = fields_of(old), fields_of(new)
    shown = changed[:_SHOWN]
    told = " and ".join(f"{name} {_short(old.get(name))}" for name in shown)
    says = " and ".join(_short(new.get(name)) for name in shown)
    more = f" (and {len(changed) - _SHOWN} more fields)" if len(changed) > _SHOWN else ""
    ways = ["give this run another name", f"set stage {place.name} back and change the stages after it in `stages`"]
    if not chosen:  # perhaps it was its own command line
        ways = [f"write that into stage {place.name} of the config file", ways[0]]
    elif changed == ["train.steps"] and _is_longer(now, place):
        ways = [f"train it for longer with --extend {place.name}", "set it back"]
    raise ConfigError(
        f"stage {place.name} was trained with {told}, and the config now says {says}{more}: {', or '.join(ways)}"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _deciding(config: RunConfig, any_pending: bool) -> dict[str, Any]:
    """The settings of a stage that decide its weights."""
    tree = config.model_dump(mode="json", include=_SECTIONS)
    for section, names in _BESIDE.items():
        for name in names:
            if any_pending or name != "model":
                del tree[section][name]
    for source in tree["data"]["sources"]:
        for name in _ACCESS:
            del source[name]
    return tree


def _extension(now: RunConfig, place: StagePlace) -> str:
    """See that a finished stage has a checkpoint to go on from, and say what becomes of its learning rate."""
    path, faults = newest_anywhere(place.checkpoints, mirror_of(now, place))
    if path is None:
        reasons = "; ".join(faults) or "it is empty"
        raise ConfigError(f"--extend {place.name}: {place.checkpoints} holds no checkpoint to go on from: {reasons}")
    was, step, steps = _trained_with(place), step_of(path), now.train.steps
    ended = _share(was.optimizer, step - 1, was.train.steps)
    begins, ends = (_share(now.optimizer, at, steps) for at in (step, steps - 1))
    return (
        f"stage {place.name} goes on from step {step} to {steps}; its learning rate was {ended:.3g} of the peak at "
        f"step {step}, and follows optimizer.schedule {now.optimizer.schedule} over all {steps} steps from here on: "
        f"{begins:.3g} at step {step + 1}, {ends:.3g} at the end"
    )


def _share(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of the peak learning rate."""
    return learning_rate(config, step, steps, peak=1.0)


def reopen(place: StagePlace, step: int) -> None:
    """Make a finished stage one to be trained: its model stays beside, under the step it is of. On rank 0."""
    names = chain([f"{place.model}_step_{step}"], (f"{place.model}_step_{step}_{n}" for n in count(2)))
    place.model.rename(next(path for path in map(Path, names) if not path.exists()))
