"""What the command lines of the jobs that draw and score share; of those that draw, --model, --weights, --size and
--sampling.FIELD."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError

from launch.parser import Parser
from t2i.config import RunConfig
from t2i.config_base import ConfigError, PathText
from t2i.config_loading import validate_section
from t2i.config_sampling import SamplingConfig
from t2i.pipeline import Pipeline
from t2i.size_limits import check_fits
from t2i.train.processes import World


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
    world.from_main(lambda: check_fits(pipeline, size, sampling.batch_size, name, advice))


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
