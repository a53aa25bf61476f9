"""What the training jobs share: command line, processes, curriculum, and how they end.

Which scorer a training job gets: `evaluation` has it, and `t2i` knows only what it does.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from contextlib import ExitStack
from typing import Any

import torch

from data.errors import EXIT_RESUMABLE, FAILED
from evaluation.geneval.detectors import GenEvalScorer, Name, build_detector, prompts_for
from launch.cli import parse_config as parse
from launch.preemption import preemption
from launch.process import joined_world
from t2i.config.base import ConfigError
from t2i.config.loading import stage_config
from t2i.config.run import STAGE_SECTIONS, RunConfig
from t2i.config.train import ScoringConfig
from t2i.distributed import Preempted
from t2i.train.curriculum import run
from t2i.train.scoring import Scorer
from t2i.train.watchdog import Failure, Failures, collective_timeout


def build_scorer(config: ScoringConfig, device: torch.device) -> Scorer:
    """The scorer that a stage names, its networks on this device.

    Raises:
        UserError: weights that it needs are not there, or not what they should be.
    """
    name: Name = "shapes" if config.scorer == "shapes" else "mask2former"
    return GenEvalScorer(prompts_for(name), build_detector(name, config.detector_weights, config.clip, device))


DEFAULT_CONFIG = "configs/pixelgen_xxl.yaml"
_EXTEND = "With --extend STAGE, a stage that is done is trained on, to the train.steps that the config now says."


def train(description: str, only: int | None, default_config: str = DEFAULT_CONFIG) -> None:
    """Parse the command line, join the ranks, and train one stage (`only`, from 0) or all."""
    extend, words = _extension(sys.argv[1:])
    config = parse(f"{description.splitlines()[0]} {_EXTEND}", default_config, words, only)
    preemption.limit(config.timeouts.wall_clock_minutes)

    def leave() -> str | None:
        preemption.listen()  # once there is something to save
        return preemption.reason

    patience = collective_timeout(config.timeouts.start_minutes)
    settings = {**_resolved(config), "extend": extend}
    with (
        ExitStack() as at_exit,
        joined_world(settings, patience) as world,
        Failures(world) as failures,
    ):
        try:
            run(config, world, only, leave, failures, at_exit, build_scorer, extend)
            world.barrier()  # else rank 0's end would look like its death
        except Exception as error:
            failure = failures.report(error)
            if failure.rank == world.rank and (failure.code == FAILED or isinstance(error, OSError)):
                traceback.print_exc()
            if world.rank in (0, failure.rank):
                print(_words(failure, error), file=sys.stderr)
            sys.exit(failure.code)
        finally:
            preemption.settle()


def _extension(words: list[str]) -> tuple[str | None, list[str]]:
    """What --extend says, if it is given, and the rest of a command line, which is the config's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--extend")
    try:
        given, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError("--extend: name the stage that is to be trained for longer") from error
    return given.extend, rest


def _resolved(config: RunConfig) -> dict[str, Any]:
    """What a run trains with: what its stages share, and all of each stage's own sections."""
    shared = config.model_dump(exclude={*STAGE_SECTIONS, "stages"})
    stages = [
        {"name": stage["name"], **stage_config(config, index).model_dump(include=set(STAGE_SECTIONS))}
        for index, stage in enumerate(config.stages)
    ]
    return {**shared, "stages": stages}


def _words(failure: Failure, error: Exception) -> str:
    """What to say of the end; an error that all ranks met is no single rank's."""
    kind = "left" if isinstance(error, Preempted) else "error"
    said = f"{kind}: {failure.message}" if str(error) == failure.message else str(failure)
    return f"{said}; the same command goes on from what is saved" if failure.code == EXIT_RESUMABLE else said
