"""The data of a stage, opened and checked before it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.example import Crop, ImageSettings
from data.fixed import FixedSamples, TooFewSamples, fixed_samples
from data.loader import Loader
from data.shards.index import SourceIndex, check_listing, open_index
from data.store import StoreOptions, open_store
from data.store.class_folder import ClassFolderStore
from data.stream import SetAside, Source
from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.config_data import DataConfig, SourceConfig
from t2i.train.processes import World


def image_settings(config: DataConfig) -> ImageSettings:
    """What becomes of a stage's training images."""
    return ImageSettings(
        config.resolution, config.small_images, config.crop, config.horizontal_flip, config.aspect_buckets
    )


@dataclass
class StageData:
    """A stage's sources, indexed; `heldout` those that validation reads (none: no validation)."""

    sources: list[Source]
    heldout: list[Source]
    damage: list[SetAside]
    """Where and why each damaged shard of them ends early."""

    def heldout_samples(self, config: RunConfig) -> FixedSamples | None:
        """The validation samples, the same on every rank and for every number of ranks: of one size, buckets or not.

        Raises:
            ConfigError: fewer are held out than validation asks for.
        """
        if not self.heldout:
            return None
        crop: Crop = "adm" if config.data.crop == "adm" else "center"
        images = ImageSettings(config.data.resolution, config.data.small_images, crop)
        asked = config.validation.samples
        try:
            return fixed_samples(self.heldout, asked, images)
        except TooFewSamples as error:
            where = ", ".join(f"source {it.index.name!r} in {it.index.store.url}" for it in self.heldout)
            raise ConfigError(
                f"validation.samples {asked} are more than the {error.found} usable samples held out of {where}: lower "
                f"it to {error.found}, or hold out more"
            ) from error

    def loader(self, config: RunConfig, stage: str, world: World, state: dict[str, Any] | None) -> Loader:
        """This rank's batches, from a checkpoint's data state or the stage's first batch."""
        return Loader(
            self.sources,
            image_settings(config.data),
            batch_size=config.train.batch_size,
            lanes=config.data.lanes,
            seed=config.seed,
            stage=stage,
            rank=world.rank,
            world_size=world.size,
            workers=config.data.workers,
            shuffle_block=config.data.shuffle_block,
            buffer_bytes=int(config.data.buffer_gib * 2**30),
            pin_memory=world.device.type == "cuda",
            state=state,
        )


Opened = dict[tuple[str, str, str | None, bool, StoreOptions], SourceIndex]
"""Indices by name, address, manifest, whether folders are classes, and options: stages that share a source open it
once."""


def open_source(config: DataConfig, source: SourceConfig, url: str, manifest: str | None, opened: Opened) -> Source:
    """Open one source at an address, with its index.

    Raises:
        DataError: it is missing, empty or malformed, or too large to be indexed at the start.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    options = config.store_options(source)
    key = (source.name, url, manifest, source.class_folders, options)
    if key not in opened:
        store = open_store(url, options)
        index = opened[key] = open_index(store, source.name, manifest, options=options, classes=source.class_folders)
        if notice := check_listing(index):
            print(notice)
    return Source(opened[key], source.weight, source.rules)


def _damage(sources: list[Source]) -> list[SetAside]:
    return [
        SetAside(index.name, index.names[shard], None, int(index.offsets(shard)[-1]), "damaged_tar", detail)
        for index in (source.index for source in sources)
        for shard, detail in sorted(index.damage.items())
    ]


def _check_classes(source: Source, trained: list[Source], config: RunConfig) -> None:
    """See that a folder of classes has as many as the model, and the same as the other sources.

    Raises:
        ConfigError: its numbers would mean other classes.
    """
    if not isinstance(source.index.store, ClassFolderStore):
        return
    classes, url = source.index.store.classes, source.index.store.url
    if len(classes) != config.model.classes:
        raise ConfigError(f"model.classes {config.model.classes}: {url} has folders for {len(classes)} classes")
    for other in trained:
        if isinstance(other.index.store, ClassFolderStore) and other.index.store.classes != classes:
            raise ConfigError(
                f"data.sources: the folders of {url} and {other.index.store.url} differ, and classes are numbered by "
                "their folders' names: give both the same folders"
            )


def open_data(config: RunConfig, stage: str, opened: Opened) -> StageData:
    """Open a stage's sources and see that each yields a sample.

    `opened` is what other stages have opened already; it is added to.

    Raises:
        ConfigError: the stage has no sources.
        DataError: a source is missing, empty, malformed, or nothing of it is large enough.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    if not config.data.sources:
        raise ConfigError(f"stage {stage}: data.sources is empty: name at least one source")
    sources = [open_source(config.data, source, source.url, source.index, opened) for source in config.data.sources]
    for source in sources:
        fixed_samples([source], 1, image_settings(config.data))
    validates = config.validation.every > 0 and config.validation.samples > 0
    heldout = [
        open_source(config.data, source, source.heldout, None, opened)
        for source in config.data.sources
        if source.heldout is not None and validates
    ]
    for source in (*sources, *heldout):
        _check_classes(source, sources, config)
    data = StageData(sources, heldout, _damage([*sources, *heldout]))
    data.heldout_samples(config)  # too few are better said now than after the stages before
    return data
