"""The part of the config that says when the state is saved, what is kept of it, and where else it is copied to."""

from __future__ import annotations

from pydantic import Field, model_validator

from data.store import StoreOptions
from t2i.config_base import PathText, Section


class CheckpointConfig(Section):
    """When the state is saved, what is kept, and a copy elsewhere. The disk needs room for one more than is kept."""

    every: int = Field(2000, gt=0)
    """Steps between checkpoints; one is also written at the end of the stage. One that comes while the one before is
    still being written is skipped, but for the last."""
    keep: int = Field(2, gt=0)
    """Newest checkpoints of a stage that are kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of so many steps are kept for ever; a multiple of every. 0: none."""
    ephemeral_every: int = Field(0, ge=0)
    """Steps between checkpoints of which only the newest is kept, and only until a regular one is newer: what a
    preempted run loses. Below every; 0: none."""
    mirror: PathText | None = None
    """Directory or s3://bucket/prefix to which regular checkpoints are copied in the background, under the run's and
    the stage's name. A run goes on from there if it finds a newer one there than in its own folder. none: no copies."""
    mirror_endpoint: str | None = None
    """S3 endpoint URL of the mirror; none takes AWS's."""
    mirror_region: str | None = None
    """S3 region of the mirror; none takes the profile's."""
    mirror_profile: str | None = None
    """Profile of the AWS credentials file for the mirror."""

    @property
    def mirror_options(self) -> StoreOptions:
        """How to reach the mirror."""
        return StoreOptions(endpoint=self.mirror_endpoint, region=self.mirror_region, profile=self.mirror_profile)

    @model_validator(mode="after")
    def _cadences(self) -> CheckpointConfig:
        if self.keep_every % self.every:
            raise ValueError(f"keep_every {self.keep_every} must be a multiple of every ({self.every}), or 0")
        if self.ephemeral_every >= self.every:
            raise ValueError(f"ephemeral_every {self.ephemeral_every} must be below every ({self.every}), or 0")
        return self
