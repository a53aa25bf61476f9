"""The part of the config that says how training is scored by the pictures it draws, and what follows from a score."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from t2i.config_base import PathText, Section

_WEIGHTS = ("detector_weights", "clip")
_RULE = ("promote_gain", "promote_steps")


class ScoringConfig(Section):
    """A score of pictures that the EMA weights draw, as `sampling` says. Training's numbers do not depend on it."""

    every: int = Field(0, ge=0)
    """Steps between scores (also at the start and end of a stage); 0: none."""
    scorer: Literal["geneval", "shapes"] = "geneval"
    """geneval: GenEval's prompts, with Mask2Former and CLIP. shapes: its tasks and rules over drawn shapes, with a
    detector that needs no weights."""
    prompts: int = Field(120, gt=0)
    """How many of the scorer's prompts, spread evenly over its tasks."""
    images: int = Field(1, gt=0)
    """Pictures drawn of each prompt."""
    minutes: float = Field(10.0, gt=0)
    """Longest that the ranks are held by drawing and judging. No batch is begun that would go past it, going by the
    longest so far, but for the first. A score that is cut short is over what was done and says so; it neither promotes
    a stage nor counts as its best."""
    detector_weights: PathText | None = None
    """Of geneval: Mask2Former's, as of launch/geneval.py's option; none takes those in the usual caches."""
    clip: PathText | None = None
    """Of geneval: CLIP's weights, likewise."""
    keep_best: bool = True
    """Keep the model with the stage's highest score in best/: a model folder, with the score in best.json. Each time
    the score rises, all ranks wait while it is written, and until then the disk needs room for two."""
    promote_gain: float | None = Field(None, gt=0)
    """The stage ends, as if at its last step, at a score that leaves the best score so far less than this above what it
    was promote_steps before. None: it has all its steps. Learning rates follow the steps planned: where the stage ends
    sooner, a decay at its end does not come."""
    promote_steps: int | None = Field(None, gt=0)
    """Steps over which the score must rise by promote_gain; a multiple of every. Longer than scores stay at 0 when
    training begins, or the stage ends there."""

    @model_validator(mode="after")
    def _used(self) -> ScoringConfig:
        unused = {"scorer shapes": _WEIGHTS if self.scorer == "shapes" else (), "every 0": () if self.every else _RULE}
        for setting, fields in unused.items():
            for field in fields:
                if (value := getattr(self, field)) is not None:
                    raise ValueError(f"{field} {value} does nothing under {setting}: leave it at null")
        return self

    @model_validator(mode="after")
    def _rule(self) -> ScoringConfig:
        if (self.promote_gain is None) != (self.promote_steps is None):
            raise ValueError(
                f"promote_gain {self.promote_gain} and promote_steps {self.promote_steps} make a rule together: "
                "give both or neither"
            )
        if self.promote_steps is not None and self.promote_steps % self.every:
            raise ValueError(f"promote_steps {self.promote_steps} must be a multiple of every ({self.every})")
        return self
