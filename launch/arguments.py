"""Command lines of the jobs that take a config: jsonargparse's form over the typed tree.

`--config FILE`, then any field as `--section.field VALUE`; `--help` documents every field and
`--print_config` prints the tree. The launcher's `--local_rank` is accepted and ignored.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from t2i.config import ConfigError, RunConfig, SourceConfig, StageConfig, dump, load, merge, validate


@dataclass(frozen=True)
class Arguments:
    """A parsed command line: the config with its overrides, and the overrides apart, for the stages."""

    config: RunConfig
    overrides: dict[str, Any]


def _parser(description: str, default_config: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, epilog=_parts_help(), exit_on_error=False, print_config=None)
    parser.add_argument("--config", type=Path, default=Path(default_config), help="YAML file of the run")
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_class_arguments(RunConfig, fail_untyped=True)
    return parser


def _parts_help() -> str:
    """Help on the fields that lists hold, which have no options of their own."""
    lines = []
    for title, part in (("each of data.sources", SourceConfig), ("each of stages", StageConfig)):
        fields = [f"{name}: {field.description}" for name, field in part.model_fields.items()]
        lines.append(f"Fields of {title}: " + " | ".join(fields))
    return " ".join(lines)


def _reworded(error: ArgumentError, argv: list[str]) -> str:
    """The config's own sentence on a wrong value; the parser's where the config has none."""
    message = " ".join(str(error).split())
    found = re.search(r'key "([\w.]+)"', message)
    raw = _values(argv).get(found.group(1)) if found else None
    if found and raw is not None:
        value: Any = yaml.safe_load(raw)
        for part in reversed(found.group(1).split(".")):
            value = {part: value}
        try:
            validate(value, where="command line")
        except ConfigError as sentence:
            return str(sentence)
    return message


def _values(argv: list[str]) -> dict[str, str]:
    """The words behind the options on a command line, by dotted name."""
    found = {}
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            found[name.removeprefix("--")] = value if equals else following
    return found


def _given(argv: list[str]) -> list[str]:
    """Dotted names of the options on a command line."""
    return [word.removeprefix("--").split("=")[0] for word in argv if word.startswith("--")]


def parse(description: str, default_config: str, argv: list[str]) -> Arguments:
    """Parse a command line.

    Raises:
        ConfigError: a wrong option, value or file, in one sentence.
    """
    parser = _parser(description, default_config)
    known = [action.dest for action in parser._actions]
    for name in _given(argv):
        if name in RunConfig.model_fields and name not in ("name", "root", "seed", "stages"):
            raise ConfigError(f"--{name} is a section: set its fields, such as --{name}.FIELD VALUE")
        if name not in known and name != "help":
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise ConfigError(f"unknown option --{name}{hint}")
    try:
        space = parser.parse_args(argv)
    except ArgumentError as error:
        raise ConfigError(_reworded(error, argv)) from error
    tree = space.as_dict()
    overrides: dict[str, Any] = {}
    for name in _given(argv):
        if name in ("config", "print_config", "local_rank"):
            continue
        value: Any = tree
        for part in name.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        for part in reversed(name.split(".")):
            value = {part: value}
        overrides = merge(overrides, value)
    config = load(Path(str(space.config)))
    config = validate(merge(config.model_dump(), overrides), where="command line")
    if space.print_config:
        sys.stdout.write(dump(config))
        raise SystemExit(0)
    return Arguments(config, overrides)
