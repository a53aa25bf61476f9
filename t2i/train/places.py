"""Where a stage keeps what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from t2i.config import RunConfig
from t2i.engine.checkpoint import checkpoints


@dataclass(frozen=True)
class StagePlace:
    """A stage's name, its folder, and the stage before it."""

    name: str
    folder: Path
    previous: StagePlace | None

    @property
    def model(self) -> Path:
        """The finished model; it exists once the stage is done."""
        return self.folder / "model"

    @property
    def best(self) -> Path:
        """The model with the stage's best score."""
        return self.folder / "best"

    @property
    def checkpoints(self) -> Path:
        """The stage's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def null_caption(self) -> Path:
        """The null caption's states, one file for all stages of the run."""
        return self.folder.parent / "null_caption.safetensors"

    @property
    def samples(self) -> Path:
        """The stage's sample grids."""
        return self.folder / "samples"

    @property
    def done(self) -> bool:
        """Whether the stage's model is there."""
        return self.model.exists()

    @property
    def begun(self) -> bool:
        """Whether there is anything of the stage to go on from, or its model."""
        return self.done or bool(checkpoints(self.checkpoints))


def stage_places(config: RunConfig) -> list[StagePlace]:
    """The places of every stage of a run, in order."""
    places: list[StagePlace] = []
    for stage in config.stages:
        name = str(stage["name"])
        places.append(StagePlace(name, config.directory / name, places[-1] if places else None))
    return places
