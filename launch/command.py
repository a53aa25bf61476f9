"""Commands that need no launcher: from functions to a command line, from an exception to one sentence and an exit code.

A job is a function. What it takes before "/" are words without a name (one, one that may be left out, or a list), each
dataclass among its parameters is taken apart into options, all others are options, and docstrings are the help.
For jobs that train, launch/process.py and launch/arguments.py do the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from typing import Any, get_type_hints

from docstring_parser import parse
from jsonargparse import ArgumentError, ArgumentParser

from data.errors import StoreError, UserError
from t2i.exit_codes import BAD_INPUT

Job = Callable[..., None]


def run(jobs: Sequence[Job], args: list[str] | None, description: str | None, advice: str = "") -> int:
    """Run the job that a command line asks for, by its name if there are several, and return the exit code.

    0 when it is done; 2 for a user's mistake, in one sentence; 1 for a fault that outlasted its retries; 130 when it
    is interrupted, 141 when its output is.

    Args:
        jobs: what there is to choose from.
        args: the command line; None takes the process's.
        description: the command's docstring, whose first line is the help.
        advice: what to do after a fault or an interruption.
    """
    try:
        _run(jobs, args, description)
        sys.stdout.flush()
    except (UserError, ArgumentError) as error:
        return _said(BAD_INPUT, f"error: {' '.join(str(error).split())}")
    except (StoreError, BrokenProcessPool) as error:
        words = str(error) if isinstance(error, StoreError) else "a process was killed, perhaps for its memory"
        return _said(1, f"error: {words}{advice}")
    except KeyboardInterrupt:
        return _said(130, f"interrupted{advice}")
    except BrokenPipeError:  # a pager or `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tells of it at its end
        return 141
    return 0


def _said(code: int, words: str) -> int:
    print(words, file=sys.stderr)
    return code


def _run(jobs: Sequence[Job], args: list[str] | None, description: str | None) -> None:
    parser = ArgumentParser(exit_on_error=False, description=_first_line(description))
    if len(jobs) == 1:
        _add(parser, jobs[0])
        _call(jobs[0], parser.parse_args(args).as_dict())
        return
    commands = parser.add_subcommands(dest="job")
    for job in jobs:
        command = ArgumentParser(exit_on_error=False, description=_first_line(job.__doc__))
        _add(command, job)
        commands.add_subcommand(job.__name__, command, help=_first_line(job.__doc__))
    given = parser.parse_args(args)
    _call(next(job for job in jobs if job.__name__ == given.job), given[given.job].as_dict())


def _first_line(docstring: str | None) -> str:
    return (docstring or "").partition("\n")[0]


def _add(parser: ArgumentParser, job: Job) -> None:
    help_of = {it.arg_name: it.description for it in parse(job.__doc__ or "").params}
    kinds, elsewhere = get_type_hints(job), set[str | int]()
    for name, parameter in signature(job).parameters.items():
        if parameter.kind is Parameter.POSITIONAL_ONLY:
            number = "+" if kinds[name] == list[str] else None if parameter.default is Parameter.empty else "?"
            # In capitals, so that an option may have the name, too.
            parser.add_argument(name.upper(), type=str, nargs=number, help=help_of.get(name))
        elif is_dataclass(kinds[name]):
            parser.add_class_arguments(kinds[name])
        else:
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
