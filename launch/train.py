"""What the training jobs share: command line, processes, curriculum, scorer, and how they end."""

from __future__ import annotations

import sys
import traceback
from contextlib import ExitStack
from typing import Any

import torch

from data.errors import EXIT_RESUMABLE, FAILED
from evaluation.geneval.detectors import GenEvalScorer, Name, build_detector, prompts_for
from launch.cli import config_parser, read_config, values_of
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

DEFAULT_CONFIG = "configs/pixelgen_xxl.yaml"


def build_scorer(config: ScoringConfig, device: torch.device) -> Scorer:
    """The scorer that a stage names, its networks on this device. `evaluation` has them; `t2i` knows the protocol only.

    Raises:
        UserError: weights of the scorer's networks are missing or wrong.
    """
    name: Name = "shapes" if config.scorer == "shapes" else "mask2former"
    return GenEvalScorer(prompts_for(name), build_detector(name, config.detector_weights, config.clip, device))


def train(description: str, only: int | None, default_config: str = DEFAULT_CONFIG) -> None:
    """Parse the command line, join the ranks, and train one stage (`only`, from 0) or all."""
    parser = config_parser(description, default_config)
    extension = "train a finished stage on, to the train.steps that the config has now"
    parser.add_argument("--extend", metavar="STAGE", nargs="?", const="", help=extension)
    named = values_of(sys.argv[1:]).get("extend")
    if named is not None and (not named or named.startswith("--")):  # before --print_config prints
        raise ConfigError("--extend: name the stage that is to be trained for longer")
    config, options = read_config(parser, sys.argv[1:], only)
    extend = options["extend"]
    preemption.limit(config.timeouts.wall_clock_minutes)

    def stop_reason() -> str | None:
        preemption.listen()  # only now is there something to save
        return preemption.reason

    with (
        ExitStack() as at_exit,
        joined_world(
            {**_resolved(config), "extend": extend}, collective_timeout(config.timeouts.start_minutes)
        ) as world,
        Failures(world) as failures,
    ):
        try:
            run(config, world, only, stop_reason, failures, at_exit, build_scorer, extend)
            world.barrier()  # otherwise the end of rank 0 would look like its death
        except Exception as error:
            failure = failures.report(error)
            if failure.rank == world.rank and (failure.code == FAILED or isinstance(error, OSError)):
                traceback.print_exc()
            if world.rank in (0, failure.rank):
                print(_describe(failure, error), file=sys.stderr)
            sys.exit(failure.code)
        finally:
            preemption.finish()


def _resolved(config: RunConfig) -> dict[str, Any]:
    """The settings of all stages: the sections that they share, and each stage's own in full."""
    shared = config.model_dump(exclude={*STAGE_SECTIONS, "stages"})
    stages = [
        {"name": stage["name"], **stage_config(config, index).model_dump(include=set(STAGE_SECTIONS))}
        for index, stage in enumerate(config.stages)
    ]
    return {**shared, "stages": stages}


def _describe(failure: Failure, error: Exception) -> str:
    """The last line on stderr; an error that all ranks share names no rank."""
    kind = "left" if isinstance(error, Preempted) else "error"
    said = f"{kind}: {failure.message}" if str(error) == failure.message else str(failure)
    return f"{said}; the same command goes on from what is saved" if failure.code == EXIT_RESUMABLE else said
