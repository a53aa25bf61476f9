"""The part of the config that says how long things may take."""

from __future__ import annotations

from pydantic import Field

from t2i.config_base import Section


class LimitsConfig(Section):
    """How long a run may stand still before it ends with every rank's stacks, and how long it may go on."""

    start_minutes: float = Field(30.0, gt=0)
    """Longest that anything may take until a stage's first step is done: to open data, build, compile, meet."""
    step_minutes: float = Field(10.0, gt=0)
    """Longest that training may stand still after that: in a step, a validation batch, a round of scoring, a save."""
    wall_clock_minutes: float = Field(0.0, ge=0)
    """Minutes after which a run saves and leaves, to be started again, as where a scheduler ends jobs; 0: no limit. A
    start and a score (scoring.minutes) must fit into them: a score that is cut short by leaving is taken anew."""
