"""The data of a stage, opened and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

from data.index import SourceIndex, all_damage, index_source
from data.loader import FixedSamples, Loader, fixed_samples
from data.store import open_store
from t2i.config import ConfigError, RunConfig, SourceConfig
from t2i.train.processes import World


@dataclass
class StageData:
    """A stage's sources, indexed, and its held-out samples (None: no validation)."""

    indices: list[SourceIndex]
    heldout: FixedSamples | None

    @property
    def notices(self) -> list[str]:
        """One sentence for each damaged shard."""
        return all_damage(self.indices)

    def loader(self, config: RunConfig, stage: str, world: World, state: dict | None) -> Loader:
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
        url,
        endpoint=source.endpoint,
        region=source.region,
        profile=source.profile,
        anonymous=source.anonymous,
    )
    return index_source(store, source.name)


def open_data(config: RunConfig, world: World, stage: str) -> StageData:
    """Index a stage's sources on rank 0, see that each yields a sample, and read the held-out ones.

    Raises:
        ConfigError: the stage has no sources.
        DataError: a source is missing, empty, malformed, or nothing of it is large enough.
    """
    sources = config.data.sources
    if not sources:
        raise ConfigError(f"stage {stage}: data.sources is empty: name at least one source")

    def prepare() -> StageData:
        size = config.data.resolution
        policy = config.data.small_images
        indices = [_open(source, source.url) for source in sources]
        for index in indices:
            fixed_samples([index], [1.0], 1, resolution=size, small_images=policy)
        validated = [source for source in sources if source.heldout is not None]
        if not (config.validation.every and config.validation.samples and validated):
            return StageData(indices, None)
        heldout = fixed_samples(
            [_open(source, source.heldout) for source in validated if source.heldout is not None],
            [source.weight for source in validated],
            config.validation.samples,
            resolution=size,
            small_images=policy,
        )
        return StageData(indices, heldout)

    return world.from_main(prepare)
