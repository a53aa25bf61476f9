"""Command lines of the jobs that take a config: jsonargparse's form over the typed tree.

`--config FILE`, then any field as `--section.field VALUE`, which counts more than the file and its stages, or than the
one stage that a job is for; `--help` documents every field and `--print_config` prints the tree. The launcher's
`--local_rank` is accepted and ignored.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, set_parsing_settings

from data.yaml_file import load_yaml
from launch.parser import Parser
from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.config_data import CaptionConfig, SourceConfig
from t2i.config_loading import dump_config, load_config, override, validate_config


def parse(description: str, default_config: str, argv: list[str], only: int | None = None) -> RunConfig:
    """The config that a command line asks for; fields of a stage's sections are for stage `only`, or for all.

    Raises:
        ConfigError: a wrong option, value or file, in one sentence.
    """
    parser = _parser(description, default_config)
    _check_names(parser, argv)
    try:
        given = parser.parse_args(argv, defaults=False).as_dict()
    except ArgumentError as error:
        raise ConfigError(_reworded(error, argv)) from error
    given.pop("local_rank", None)
    printing = given.pop("print_config", False)
    config = override(load_config(Path(str(given.pop("config", default_config)))), given, only)
    if printing:
        sys.stdout.write(dump_config(config))
        raise SystemExit(0)
    return config


def _parser(description: str, default_config: str) -> Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    fields = [
        f"{prefix}{name}: {field.description}"
        for section, prefix in ((SourceConfig, ""), (CaptionConfig, "captions."))
        for name, field in section.model_fields.items()
    ]
    epilog = "Fields of each of data.sources: " + " ".join(fields)
    parser = Parser(description=description, epilog=epilog, exit_on_error=False, print_config=None)
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(default_config),
        help="YAML file of the run; its `base:` names another whose sections it changes",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_class_arguments(RunConfig, fail_untyped=True)
    return parser


def _check_names(parser: Parser, argv: list[str]) -> None:
    """Refuse unknown options, with the nearest known one, and whole sections, which would reset their other fields."""
    known = {action.dest for action in parser._actions}
    sections = {name for name in RunConfig.model_fields if any(option.startswith(f"{name}.") for option in known)}
    for name in values_of(argv):
        if name in sections:
            raise ConfigError(f"--{name} is a section: set its fields, such as --{name}.FIELD VALUE")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"unknown option --{name}" + (f"; did you mean --{near[0]}?" if near else ""))


def _reworded(error: ArgumentError, argv: list[str]) -> str:
    """The config's own sentence on a wrong value; the parser's where the config has none."""
    message = " ".join(str(error).split())
    found = re.search(r'key "([\w.]+)"', message)
    raw = values_of(argv).get(found.group(1)) if found else None
    if found and raw is not None:
        value: Any = load_yaml(raw, f"--{found.group(1)}")
        for part in reversed(found.group(1).split(".")):
            value = {part: value}
        try:
            validate_config(value, where="command line")
        except ConfigError as sentence:
            return str(sentence)
    return message


def values_of(argv: list[str]) -> dict[str, str]:
    """The words behind the options on a command line, by dotted name."""
    found = {}
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            found[name.removeprefix("--")] = value if equals else " ".join(argv[index + 1 : index + 2])
    return found
