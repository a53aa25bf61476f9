"""Commands that need no launcher: from functions to a command line, from an exception to one sentence and an exit code.

A job is a function. What it takes before "/" are words without a name (one, one that may be left out, or a list), each
dataclass among its parameters is taken apart into options, all others are options, and docstrings are the help.
For jobs that train, launch/process.py and launch/cli.py do the same.

Words of a command line, before jsonargparse makes values of them.

Command lines of the jobs that take a config: jsonargparse's form over the typed tree.

`--config FILE`, then any field as `--section.field VALUE`, which counts more than the file and its stages, or than the
one stage that a job is for; `--help` documents every field and `--print_config` prints the tree. The launcher's
`--local_rank` is accepted and ignored.

What the command lines of the jobs that draw and score share; of those that draw, --model, --weights, --size and
--sampling.FIELD.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from argparse import Action, Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse
from jsonargparse import ArgumentError, ArgumentParser, set_loader, set_parsing_settings
from pydantic import AfterValidator

from data.errors import UserError
from data.files import expand_path
from data.yaml_file import load_yaml
from launch.process import run_to_end
from t2i.config.base import ConfigError, PathText, parts_of, read_none
from t2i.config.data import CaptionConfig, SourceConfig
from t2i.config.loading import dump_config, load_config, override, validate_config, validate_section
from t2i.config.run import RunConfig
from t2i.config.train import SamplingConfig
from t2i.distributed import World
from t2i.pipeline import Pipeline
from t2i.size_limits import check_fits

set_loader("yaml", lambda text: load_yaml(text, "value"), (UserError,))
_NUMBER_OF_YAML_1_1 = re.compile(r"[-+]?(?:0b[01_]+|\d[\d_]*(?::[0-5]?\d)+(?:\.\d*)?)\Z", re.ASCII)
"""What jsonargparse would take for a number: 90 for 1:30."""
_NOT_FINITE = ("nan", "inf", "-inf", "+inf", "infinity", "-infinity")
"""Words that Python takes for numbers."""


class Parser(ArgumentParser):
    """A parser whose options follow the rules of the files that users write, wherever a type is given.

    Numbers and lists are YAML as data/yaml_file.py reads it, numbers are finite; none and null mean none where an
    option may be none; in paths `~`, `$NAME` and `${NAME}` are filled in. Raises UserError besides ArgumentError.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hints = dict[str, Any]()
        """By destination, where jsonargparse does not see the whole annotation of a function's parameter."""

    def _get_values(self, action: Action, arg_strings: list[str]) -> Any:
        hint = self.hints.get(action.dest, getattr(action, "_typehint", None))
        if hint is not None:
            name = action.option_strings[0] if action.option_strings else action.dest
            arg_strings = [read_word(word, hint, name) for word in arg_strings]
        return super()._get_values(action, arg_strings)


def read_word(word: str, hint: Any, name: str) -> str:
    """The word that jsonargparse is to see for what a user wrote.

    Args:
        word: on the command line.
        hint: what type it is to be.
        name: begins the sentences of errors.

    Raises:
        UserError: it breaks one of the rules.
    """
    parts = parts_of(hint)
    if (none := read_none(word, hint)) != word:
        return none or "null"
    if parts & {Path, AfterValidator(expand_path)}:
        try:
            return expand_path(word)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    if str in parts:
        return word
    value = load_yaml(word, name)
    numeric = bool(parts & {int, float})
    for leaf in _leaves(value):
        if (isinstance(leaf, float) and not math.isfinite(leaf)) or (numeric and str(leaf).lower() in _NOT_FINITE):
            raise UserError(f"{name} {word}: must be a finite number")
        if isinstance(leaf, str) and _NUMBER_OF_YAML_1_1.match(leaf):
            raise UserError(f"{name} {word}: {leaf} is no number: write it in decimal")
    if isinstance(value, float) and int in parts and float not in parts and value.is_integer():
        return str(int(value))
    return word


def _leaves(tree: Any) -> list[Any]:
    """What a tree of mappings and lists holds."""
    if not isinstance(tree, dict | list):
        return [tree]
    return [leaf for it in (tree.values() if isinstance(tree, dict) else tree) for leaf in _leaves(it)]


def parse_config(description: str, default_config: str, argv: list[str], only: int | None = None) -> RunConfig:
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


def job_parser(docstring: str | None) -> Parser:
    """A parser without options; a job's first line of documentation is its help."""
    parser = Parser(description=(docstring or "").splitlines()[0], exit_on_error=False)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher; ignored")
    return parser


def drawing_parser(docstring: str | None, model: str = "model/ folder of a run", required: bool = True) -> Parser:
    """A parser of the options that say which weights draw, and how.

    Args:
        docstring: of the job.
        model: help of --model.
        required: whether there is no job without it.
    """
    parser = job_parser(docstring)
    parser.add_argument("--model", type=Path, required=required, help=model)
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="which weights draw")
    add_text_model(parser)
    parser.add_argument("--sampling", type=dict, default={}, help="overrides of the model's sampling section")
    return parser


def add_text_model(parser: Parser) -> None:
    """Let the model's text encoder be elsewhere than where it was trained."""
    parser.add_argument(
        "--text_model", type=PathText, help="where the model's text encoder is now: a folder or hub name"
    )


def add_size(parser: Parser) -> None:
    """Let the size be chosen."""
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels; by default the model's training resolution")


def parsed(parser: Parser) -> Namespace:
    """What the process's command line says.

    Raises:
        ConfigError: something wrong, in one sentence.
    """
    try:
        return parser.parse_args()
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def sampling_of(config: RunConfig, overrides: dict[str, Any]) -> SamplingConfig:
    """How a model draws: its own settings, with --sampling's entered.

    Raises:
        ConfigError: a setting that is unknown or wrong.
    """
    return validate_section(SamplingConfig, {**config.sampling.model_dump(), **overrides}, "--sampling")


def check_memory(
    world: World, pipeline: Pipeline, size: tuple[int, int], sampling: SamplingConfig, option: str = "--size"
) -> None:
    """See, before anything is drawn, that a batch of pictures of this height and width fits. A collective.

    Raises:
        UserError: it does not.
    """
    advice = "give a smaller size, or a lower --sampling.batch_size"
    name = f"{option} {size[0]}x{size[1]}"
    world.broadcast_from_rank0(lambda: check_fits(pipeline, size, sampling.batch_size, name, advice, world.local_size))


def size_of(config: RunConfig, text: str | None) -> tuple[int, int]:
    """Height and width in pixels that --size asks for; without it, those the model was trained at.

    Raises:
        ConfigError: not a size, or not one of whole patches.
    """
    if text is None:
        return config.data.size
    patch = config.model.patch_size
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(side > 0 and side % patch == 0 for side in sides):
        raise ConfigError(
            f"--size {text}: must be height x width in pixels, such as {4 * patch}x{6 * patch}, "
            f"both multiples of model.patch_size ({patch})"
        )
    return sides


Job = Callable[..., None]


def run(jobs: Sequence[Job], args: list[str] | None, description: str | None, advice: str = "") -> int:
    """Run the job that a command line asks for, by its name if there are several, and return the exit code.

    0 when it is done; 2 for a user's mistake, in one sentence; 1 for a fault of the machine, or one that outlasted its
    retries; 130 when it is interrupted, 141 when its output is.

    Args:
        jobs: what there is to choose from.
        args: the command line; None takes the process's.
        description: the command's docstring, whose first line is the help.
        advice: what to do after a fault or an interruption.
    """
    return run_to_end(lambda: _run(jobs, args, description), advice)


def _run(jobs: Sequence[Job], args: list[str] | None, description: str | None) -> None:
    parser = Parser(exit_on_error=False, description=_first_line(description))
    if len(jobs) == 1:
        _add(parser, jobs[0])
        _call(jobs[0], parser.parse_args(args).as_dict())
        return
    commands = parser.add_subcommands(dest="job")
    for job in jobs:
        command = Parser(exit_on_error=False, description=_first_line(job.__doc__))
        _add(command, job)
        commands.add_subcommand(job.__name__, command, help=_first_line(job.__doc__))
    given = parser.parse_args(args)
    _call(next(job for job in jobs if job.__name__ == given.job), given[given.job].as_dict())


def _first_line(docstring: str | None) -> str:
    return (docstring or "").partition("\n")[0]


def _add(parser: Parser, job: Job) -> None:
    help_of = {it.arg_name: it.description for it in parse(job.__doc__ or "").params}
    kinds, elsewhere = get_type_hints(job, include_extras=True), set[str | int]()
    for name, parameter in signature(job).parameters.items():
        if parameter.kind is Parameter.POSITIONAL_ONLY:
            many = get_origin(kinds[name]) is list
            number = "+" if many else None if parameter.default is Parameter.empty else "?"
            kind = get_args(kinds[name])[0] if many else kinds[name]
            # In capitals, so that an option may have the name, too.
            parser.add_argument(name.upper(), type=kind, nargs=number, help=help_of.get(name))
        elif is_dataclass(kinds[name]):
            parser.add_class_arguments(kinds[name])
            parser.hints |= get_type_hints(kinds[name], include_extras=True)
        else:
            parser.hints[name] = kinds[name]
            continue
        elsewhere.add(name)
    parser.add_function_arguments(job, skip=elsewhere)


def _call(job: Job, given: dict[str, Any]) -> None:
    kinds: dict[str, Any] = get_type_hints(job)
    words = []
    for name, parameter in signature(job).parameters.items():
        if parameter.kind is Parameter.POSITIONAL_ONLY:
            words.append(given.pop(name.upper()))
        elif is_dataclass(kinds[name]):
            given[name] = kinds[name](**{field.name: given.pop(field.name) for field in fields(kinds[name])})
    job(*words, **given)
