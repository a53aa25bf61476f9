"""Reading, merging and checking configs. Every mistake is a `ConfigError` with one sentence that names the field."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from data.errors import DataError, UserError
from data.files import expand_path
from data.order import check_layout
from data.yaml_file import dump_yaml, read_yaml
from t2i.config.base import NAME, ConfigError, Section
from t2i.config.run import STAGE_SECTIONS, RunConfig

S = TypeVar("S", bound=Section)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`; dictionaries are merged level by level."""
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def _field_names(root: type[Section], path: tuple[str | int, ...]) -> list[str]:
    """Names of the fields at a path in the tree below a section."""
    here: Any = root
    for part in path:
        if isinstance(part, int):
            continue
        annotation = here.model_fields[part].annotation if part in here.model_fields else None
        arguments = getattr(annotation, "__args__", (annotation,))
        here = next((a for a in arguments if isinstance(a, type) and issubclass(a, Section)), None)
        if here is None:
            return []
    return list(here.model_fields)


def _explain(section: type[Section], error: ValidationError, where: str) -> str:
    """The first of pydantic's errors as one sentence."""
    # A misspelt required field is also missing under its right name: report the misspelling.
    first = next((e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0])
    location = tuple(first["loc"])
    name = ".".join(map(str, location)) or "config"
    if first["type"] == "extra_forbidden":
        known = _field_names(section, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
        return f"{where}: unknown field {name!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool | type(None)) else ""
    # A section's own check begins with the field's name: prefix its path.
    if message.partition(" ")[0] in _field_names(section, location):
        return f"{where}: {'.'.join(map(str, (*location, message)))}{shown}"
    return f"{where}: {name}: {message[0].lower() + message[1:]}{shown}"


def validate_section(section: type[S], tree: dict[str, Any], where: str) -> S:
    """A section from a plain tree. `where`, in messages, says which file, stage or command line."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(section, error, where)) from error


def validate_config(tree: dict[str, Any], where: str) -> RunConfig:
    """A config from a plain tree, with every stage checked. `where`, in messages, says which file or command line."""
    config = validate_section(RunConfig, tree, where)
    if any(side % config.model.patch_size for side in config.data.size):
        raise ConfigError(
            f"{where}: data.resolution {config.data.size_text} must be a multiple of "
            f"model.patch_size ({config.model.patch_size})"
        )
    if config.engine.activation_checkpointing == "pixel" and config.model.family != "pixeldit":
        raise ConfigError(
            f"{where}: engine.activation_checkpointing pixel is for model.family pixeldit, not {config.model.family}"
        )
    if config.objective.balance_from_step is not None and config.model.family != "pixelgen":
        raise ConfigError(
            f"{where}: objective.balance_from_step {config.objective.balance_from_step}: gradients are balanced at the "
            f"head of model.family pixelgen, not {config.model.family}: leave it at null"
        )
    patch, buckets = config.model.patch_size, config.data.aspect_buckets
    for height, width in buckets.sizes if buckets is not None else ():
        if height % patch or width % patch:
            raise ConfigError(
                f"{where}: data.buckets: {height}x{width} must be a multiple of model.patch_size ({patch})"
            )
    if config.scoring.every and config.model.condition != "text":
        raise ConfigError(
            f"{where}: scoring.every {config.scoring.every}: prompts are scored, so model.condition must be text, "
            f"not {config.model.condition}; 0 turns scores off"
        )
    if config.scoring.every and config.scoring.scorer == "shapes" and len(set(config.data.size)) > 1:
        raise ConfigError(
            f"{where}: data.resolution {config.data.size_text}: scoring.scorer shapes finds objects in squares alone; "
            "scoring.every 0 turns scores off"
        )
    for index, stage in enumerate(config.stages):
        _check_stage(stage, where)
        # As the fields parse them: paths expanded, numbers and none converted.
        resolved = {**stage_config(config, index).model_dump(), "name": stage["name"]}
        config.stages[index] = _same_fields(stage, resolved)
    if len({stage["name"] for stage in config.stages}) < len(config.stages):
        raise ConfigError(f"{where}: stages: two stages have the same name")
    return config


def _same_fields(changes: Any, tree: Any) -> Any:
    """The values in `tree` of the fields that `changes` has."""
    if not (isinstance(changes, dict) and isinstance(tree, dict)):
        return tree
    return {name: _same_fields(value, tree[name]) for name, value in changes.items()}


def stage_config(config: RunConfig, index: int) -> RunConfig:
    """The settings of one stage: the run's sections with the stage's overrides, without stages."""
    if index >= len(config.stages):
        raise ConfigError(f"stages: the config has {len(config.stages)} stages, so there is no stage {index + 1}")
    changes = dict(config.stages[index])
    where = f"stage {changes.pop('name')}"
    return validate_config(merge(config.model_dump(), {**changes, "stages": []}), where)


def _check_stage(stage: dict[str, Any], where: str) -> None:
    """Refuse a stage without a valid name or with an unknown section."""
    name = stage.get("name")
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise ConfigError(f"{where}: stages: a stage needs a name of letters, digits, dots and dashes (got {name!r})")
    for key in stage.keys() - {"name", *STAGE_SECTIONS}:
        near = difflib.get_close_matches(key, STAGE_SECTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"a stage may change {', '.join(STAGE_SECTIONS)}"
        raise ConfigError(f"{where}: stage {name}: unknown section {key!r}; {hint}")


def override(config: RunConfig, changes: dict[str, Any], only: int | None = None) -> RunConfig:
    """A run with changes that override its stages' settings; `only` is the index of the one stage that they apply
    to."""
    shared = {name: value for name, value in changes.items() if name in STAGE_SECTIONS}
    stages = [
        merge(stage, shared) if only in (None, index) else stage
        for index, stage in enumerate(changes.get("stages", config.stages))
    ]
    if only is not None:
        changes = {name: value for name, value in changes.items() if name not in shared}
    return validate_config({**merge(config.model_dump(), changes), "stages": stages}, where="command line")


def fields_of(tree: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a plain tree by dotted name. Trees in a list go by their names, as stages and sources do, and the
    list is the order of these names."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) and "name" in item for item in tree):
        tree = {"": [item["name"] for item in tree], **{str(item["name"]): item for item in tree}}
    if not isinstance(tree, dict):
        return {name: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= fields_of(value, ".".join(part for part in (name, key) if part))
    return found


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted names of the fields in which two plain trees differ; a missing field counts as None."""
    old, new = fields_of(before), fields_of(now)
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def load_config(path: Path) -> RunConfig:
    """Read a YAML file and its `base` files."""
    return validate_config(_read(path, ()), where=str(path))


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The tree of a file, merged into that of its base; `above`: the files that led to it."""
    if path.resolve() in above:
        raise ConfigError(f"config {path}: base: this file is its own base, perhaps by way of others")
    try:
        tree = read_yaml(path, f"config {path}" + (f", the base of {above[-1]}" if above else ""))
    except UserError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}: must be a mapping of sections")
    if "base" not in tree:
        return tree
    name = tree.pop("base")
    if not isinstance(name, str):
        raise ConfigError(f"config {path}: base: must be the path of a config, relative to this file (got {name!r})")
    try:
        base = path.parent / expand_path(name)
    except UserError as error:
        raise ConfigError(f"config {path}: base: {error}") from error
    below = _read(base, (*above, path.resolve()))
    validate_config(below, where=str(base))  # so that messages name the base for its mistakes
    return merge(below, tree)


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to the same config."""
    return dump_yaml(config.model_dump(mode="json"))


def check_world_size(config: RunConfig, world_size: int, where: str) -> None:
    """Refuse a number of ranks that cannot share a stage's batch evenly; the message names the nearest value that
    fits."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    group = config.data.aspect_buckets.group_size if config.data.aspect_buckets is not None else 0
    try:
        check_layout(batch, config.data.lanes, world_size, group or 1)
    except DataError as error:
        raise ConfigError(f"{where}: {error}") from error
    if batch // world_size % micro:
        share = batch // world_size
        nearest = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        raise ConfigError(
            f"{where}: train.micro_batch_size {micro} does not divide a rank's share of the batch "
            f"({batch} / {world_size} = {share}); {nearest} would"
        )
    if group % micro:
        nearest = max(n for n in range(1, min(micro, group) + 1) if group % n == 0)
        raise ConfigError(
            f"{where}: train.micro_batch_size {micro} does not divide data.group_size {group}, the samples of one "
            f"size; {nearest} would"
        )
