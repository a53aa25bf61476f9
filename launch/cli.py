"""The command line of every entry point, over jsonargparse. Three kinds of jobs share one `Parser`:

- Jobs that are plain functions (pack, index, inspect_data, export, compare, serve, ...): `run`. Parameters before "/"
  are positional arguments, the fields of dataclasses and all other parameters are options, docstrings are the help.
- Jobs that take a run's config (the training jobs, plan): `config_parser`, `read_config`. `--config FILE`, then any
  field as `--section.field VALUE`, which overrides the file, its stages included; `--print_config` prints the tree.
- Jobs of several processes that sample and score (sample, geneval, dpg, edit, fid, ...): `job_parser` or
  `drawing_parser`, `parsed`. The launcher's `--local_rank` is accepted and ignored, as by the training jobs.

How a job ends, its exit code and its one sentence are in launch/process.py.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from argparse import Action
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

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

if TYPE_CHECKING:  # the networks, which not every job needs
    from t2i.distributed import World
    from t2i.pipeline import Pipeline

set_loader("yaml", lambda text: load_yaml(text, "value"), (UserError,))
_NUMBER_OF_YAML_1_1 = re.compile(r"[-+]?(?:0b[01_]+|\d[\d_]*(?::[0-5]?\d)+(?:\.\d*)?)\Z", re.ASCII)
"""What jsonargparse would take for a number, such as 90 for 1:30."""
_NOT_FINITE = ("nan", "inf", "-inf", "+inf", "infinity", "-infinity")
"""Words that Python takes for numbers."""
_NOT_OF_TYPE = re.compile(r"""Parser key "(\w+)": Expected a <class '(int|float)'>\. Got value: (.*)""")


class Parser(ArgumentParser):
    """A parser whose arguments follow the same rules as config files, wherever a type is given.

    Numbers and lists are YAML as data/yaml_file.py reads it; numbers are finite; none and null mean none for an
    optional value; in paths `~`, `$NAME` and `${NAME}` are expanded. Raises UserError besides ArgumentError.
    """

    def __init__(self, description: str | None = None, exit_on_error: bool = False, **options: Any) -> None:
        first_line = (description or "").partition("\n")[0]
        super().__init__(description=first_line, exit_on_error=exit_on_error, **options)
        self.hints = dict[str, Any]()
        """Annotations by destination, for parameters of functions: jsonargparse drops what Annotated adds."""

    def _get_values(self, action: Action, arg_strings: list[str]) -> Any:
        hint = self.hints.get(action.dest, getattr(action, "_typehint", None))
        if hint is not None:
            name = action.option_strings[0] if action.option_strings else action.dest
            arg_strings = [read_word(word, hint, name) for word in arg_strings]
        return super()._get_values(action, arg_strings)


def read_word(word: str, hint: Any, name: str) -> str:
    """Check a word of the command line against its type `hint`, and spell it as jsonargparse reads it.

    Raises:
        UserError: the word breaks one of the parser's rules; the sentence begins with `name`.
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


def _leaves(tree: Any) -> Iterator[Any]:
    if not isinstance(tree, dict | list):
        yield tree
        return
    for value in tree.values() if isinstance(tree, dict) else tree:
        yield from _leaves(value)


def parsed(parser: Parser, args: list[str] | None = None) -> Any:
    """The namespace that a command line gives; by default the process's own.

    Raises:
        ConfigError: a wrong argument, in one sentence.
    """
    try:
        return parser.parse_args(args)
    except ArgumentError as error:
        raise ConfigError(_sentence(error)) from error


def _sentence(error: ArgumentError) -> str:
    message = " ".join(str(error).split())
    found = _NOT_OF_TYPE.fullmatch(message)
    return message if found is None else f"--{found[1]}: {found[3]!r} is not a number of type {found[2]}"


# Jobs that are plain functions

Job = Callable[..., None]


def run(jobs: Sequence[Job], args: list[str] | None, description: str | None, advice: str = "") -> int:
    """Run the only job, or the one that the command line names, and return the exit code (`process.run_to_end`).

    The first line of `description` is the help; `advice` ends the sentence on a fault or an interruption.
    """
    return run_to_end(lambda: _run(jobs, args, description), advice)


def _run(jobs: Sequence[Job], args: list[str] | None, description: str | None) -> None:
    parser = Parser(description)
    if len(jobs) == 1:
        _add(parser, jobs[0])
        _call(jobs[0], parsed(parser, args).as_dict())
        return
    commands = parser.add_subcommands(dest="job")
    for job in jobs:
        command = Parser(job.__doc__)
        _add(command, job)
        commands.add_subcommand(job.__name__, command, help=command.description)
    given = parsed(parser, args)
    _call(next(job for job in jobs if job.__name__ == given.job), given[given.job].as_dict())


def _add(parser: Parser, job: Job) -> None:
    help_of = {parameter.arg_name: parameter.description for parameter in parse(job.__doc__ or "").params}
    kinds, done = get_type_hints(job, include_extras=True), set[str | int]()
    for name, parameter in signature(job).parameters.items():
        if parameter.kind is Parameter.POSITIONAL_ONLY:
            many = get_origin(kinds[name]) is list
            number = "+" if many else None if parameter.default is Parameter.empty else "?"
            kind = get_args(kinds[name])[0] if many else kinds[name]
            # In capitals, so that an option may have the same name.
            parser.add_argument(name.upper(), type=kind, nargs=number, help=help_of.get(name))
            done.add(name)
        elif is_dataclass(kinds[name]):
            parser.add_class_arguments(kinds[name])
            parser.hints |= get_type_hints(kinds[name], include_extras=True)
            done.add(name)
        else:
            parser.hints[name] = kinds[name]
    parser.add_function_arguments(job, skip=done)


def _call(job: Job, given: dict[str, Any]) -> None:
    kinds: dict[str, Any] = get_type_hints(job)
    positional = []
    for name, parameter in signature(job).parameters.items():
        if parameter.kind is Parameter.POSITIONAL_ONLY:
            positional.append(given.pop(name.upper()))
        elif is_dataclass(kinds[name]):
            given[name] = kinds[name](**{field.name: given.pop(field.name) for field in fields(kinds[name])})
    job(*positional, **given)


# Jobs that take a run's config


def config_parser(description: str | None, default_config: str) -> Parser:
    """A parser of `--config` and every field of the config; a job adds options of its own."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    entries = [
        f"{prefix}{name}: {field.description}"
        for section, prefix in ((SourceConfig, ""), (CaptionConfig, "captions."))
        for name, field in section.model_fields.items()
    ]
    epilog = "Fields of each of data.sources: " + " ".join(entries)
    parser = Parser(description, epilog=epilog, print_config=None)
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(default_config),
        help="YAML file of the run; its `base:` names another whose sections it changes",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(parser: Parser, argv: list[str], only: int | None = None) -> tuple[RunConfig, dict[str, Any]]:
    """The config that a command line gives, and by name the options of the parser that are not the config's.

    Fields of a stage's sections are for the stage of index `only`, or for all stages.

    Raises:
        ConfigError: a wrong option, value or file, in one sentence.
    """
    parser.add_class_arguments(RunConfig, fail_untyped=True)  # last, since --help would bury the job's own below them
    _check_names(parser, argv)
    try:
        given = parser.parse_args(argv, defaults=False).as_dict()
    except ArgumentError as error:
        raise ConfigError(_reworded(error, argv)) from error
    own = {
        action.dest: given.pop(action.dest, action.default)
        for action in parser._actions
        if not _is_of_config(action.dest)
    }
    config = override(load_config(own["config"]), given, only)
    if own["print_config"]:
        sys.stdout.write(dump_config(config))
        raise SystemExit(0)
    return config, own


def _is_of_config(option: str) -> bool:
    return option.partition(".")[0] in RunConfig.model_fields


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
    """The config's own sentence on a wrong value of a field; otherwise the parser's."""
    found = re.search(r'key "([\w.]+)"', str(error))
    raw = values_of(argv).get(found[1]) if found and _is_of_config(found[1]) else None
    if found and raw is not None:
        value: Any = load_yaml(raw, f"--{found[1]}")
        for part in reversed(found[1].split(".")):
            value = {part: value}
        try:
            validate_config(value, where="command line")
        except ConfigError as sentence:
            return str(sentence)
    return _sentence(error)


def values_of(argv: list[str]) -> dict[str, str]:
    """The words behind the options of a command line, by dotted name; "" where none follows."""
    found = {}
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            found[name.removeprefix("--")] = value if equals else " ".join(argv[index + 1 : index + 2])
    return found


# Jobs of several processes that sample and score


def job_parser(docstring: str | None) -> Parser:
    """A parser without options; the first line of the job's docstring is its help."""
    parser = Parser(docstring)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher; ignored")
    return parser


def drawing_parser(docstring: str | None, model: str = "model/ folder of a run", required: bool = True) -> Parser:
    """A parser of the options that choose the weights and the sampler; `model` is the help of --model."""
    parser = job_parser(docstring)
    parser.add_argument("--model", type=Path, required=required, help=model)
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="which of the model's weights")
    add_text_model(parser)
    parser.add_argument("--sampling", type=dict, default={}, help="overrides of the model's sampling section")
    return parser


def add_text_model(parser: Parser) -> None:
    """Add --text_model, for a text encoder that has moved since training."""
    parser.add_argument(
        "--text_model", type=PathText, help="where the model's text encoder is now: a folder or hub name"
    )


def add_size(parser: Parser) -> None:
    """Add --size, which `size_of` reads."""
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels; by default the model's training resolution")


def sampling_of(config: RunConfig, overrides: dict[str, Any]) -> SamplingConfig:
    """The model's own sampling settings, with those of --sampling entered.

    Raises:
        ConfigError: an unknown setting or a wrong value.
    """
    return validate_section(SamplingConfig, {**config.sampling.model_dump(), **overrides}, "--sampling")


def check_memory(
    world: World, pipeline: Pipeline, size: tuple[int, int], sampling: SamplingConfig, option: str = "--size"
) -> None:
    """Check that a batch of images of this height and width fits into memory. A collective.

    Raises:
        UserError: it does not fit.
    """
    from t2i.size_limits import check_fits

    advice = "give a smaller size, or a lower --sampling.batch_size"
    name = f"{option} {size[0]}x{size[1]}"
    world.broadcast_from_rank0(lambda: check_fits(pipeline, size, sampling.batch_size, name, advice, world.local_size))


def size_of(config: RunConfig, text: str | None) -> tuple[int, int]:
    """Height and width in pixels that --size asks for; without it, the model's training resolution.

    Raises:
        ConfigError: not a size, or its sides are not multiples of the patch size.
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
