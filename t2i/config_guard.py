"""The part of the config that says which updates are not applied, and what follows when there are too many."""

from __future__ import annotations

from pydantic import Field, model_validator

from t2i.config_base import Section


class GuardConfig(Section):
    """Which updates are vetoed: those that are not finite, always, and spikes of the loss or of the gradient norm."""

    threshold: float = Field(8.0, ge=0)
    """Robust z-score (1 is 1.4826 median absolute deviations over the median) of the loss or of the logarithm of the
    gradient norm, above which an update is vetoed; 0 vetoes no finite one."""
    window: int = Field(256, gt=0)
    """Latest applied updates over which median and deviation are taken."""
    min_history: int = Field(128, gt=0)
    """Applied updates in the window before which no spike is looked for: the first steps of a stage are no measure."""
    max_skips: int = Field(10, ge=0)
    """Vetoed updates within skip_window steps; one more, and the stage goes back to an earlier checkpoint."""
    skip_window: int = Field(100, gt=0)
    """Steps over which max_skips counts. Should too many be vetoed again this soon after the batches that a rollback
    left out, the run stops, saved."""
    rollback_margin: int = Field(100, ge=0)
    """Steps before the first vetoed one whose batches a rollback leaves out too. Their updates led there; vetoed ones
    changed nothing, so that without a margin the same weights would come again."""
    max_rollbacks: int = Field(5, ge=0)
    """Rollbacks in a stage; where one more would be needed the run stops, saved."""

    @model_validator(mode="after")
    def _counts(self) -> GuardConfig:
        if self.min_history > self.window:
            raise ValueError(f"min_history {self.min_history} must be at most window ({self.window})")
        if self.max_skips >= self.skip_window:
            raise ValueError(f"max_skips {self.max_skips} must be below skip_window ({self.skip_window})")
        return self
