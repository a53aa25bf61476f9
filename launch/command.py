"""Commands that need no launcher: from functions to a command line, from an exception to one sentence and an exit code.

A job is a function. What it takes before "/" are words without a name (one, one that may be left out, or a list), each
dataclass among its parameters is taken apart into options, all others are options, and docstrings are the help.
For jobs that train, launch/process.py and launch/arguments.py do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from typing import Any, get_args, get_origin, get_type_hints

from docstring_parser import parse

from launch.ending import run_to_end
from launch.parser import Parser

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
