"""The data of a stage, opened and checked before it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.index import SourceIndex, all_damage, index_source
from data.loader import FixedSamples, Loader, fixed_samples
from data.store import open_store
from t2i.config import ConfigError, RunConfig, SourceConfig
from t2i.train.processes import World


@dataclass
class StageData:
    """A stage's sources, indexed; `heldout` those that validation reads (none: no validation)."""

    indices: list[SourceIndex]
    heldout: list[SourceIndex]
    heldout_weights: list[float]

    @property
    def damage(self) -> list[str]:
        """One sentence for each damaged shard."""
        return all_damage([*self.indices, *self.heldout])

    def heldout_samples(self, config: RunConfig) -> FixedSamples | None:
        """The validation samples, the same on every rank and for every number of ranks."""
        if not self.heldout:
            return None
        return fixed_samples(
            self.heldout,
            self.heldout_weights,
            config.validation.samples,
            resolution=config.data.resolution,
            small_images=config.data.small_images,
        )

    def loader(self, config: RunConfig, stage: str, world: World, state: dict[str, Any] | None) -> Loader:
        """This rank's batches, from a checkpoint's data state or the stage's first batch."""
        return Loader(
            self.indices,
            [source.weight for source in config.data.sources],
            batch_size=config.train.batch_size,
            lanes=config.data.lanes,
            resolution=config.data.resolution,
            seed=config.seed,
            stage=stage,
            rank=world.rank,
            world_size=world.size,
            workers=config.data.workers,
            shuffle_block=config.data.shuffle_block,
            small_images=config.data.small_images,
            state=state,
        )


def _open(source: SourceConfig, url: str) -> SourceIndex:
    store = open_store(
        url, endpoint=source.endpoint, region=source.region, profile=source.profile, anonymous=source.anonymous
    )
    return index_source(store, source.name)


def open_data(config: RunConfig, stage: str) -> StageData:
    """Index a stage's sources and see that each yields a sample.

    Raises:
        ConfigError: the stage has no sources.
        DataError: a source is missing, empty, malformed, or nothing of it is large enough.
    """
    sources = config.data.sources
    if not sources:
        raise ConfigError(f"stage {stage}: data.sources is empty: name at least one source")
    indices = [_open(source, source.url) for source in sources]
    for index in indices:
        fixed_samples([index], [1.0], 1, resolution=config.data.resolution, small_images=config.data.small_images)
    validates = config.validation.every > 0 and config.validation.samples > 0
    validated = [(source, source.heldout) for source in sources if source.heldout is not None and validates]
    data = StageData(
        indices, [_open(source, url) for source, url in validated], [source.weight for source, _ in validated]
    )
    data.heldout_samples(config)  # too few are better said now than after the stages before
    return data
