"""The data of a stage, opened and checked before it is needed.

Batches as the ranks agree on them: a global batch reaches every rank or none.

A rank that cannot get its share must not leave the others waiting in the next step's collectives. So each step
begins with one small sum over the ranks' hosts: who failed, who is asked to leave, who has no batch yet, how many
samples were read, how many set aside. While one has none, the sum is taken again and again: a lane that finds nothing
good is judged, too, and no patience with a store outlasts that of the process group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from data.errors import DataError, StoreError, UserError
from data.lane import Quarantined, Source
from data.loader import Batch, Loader
from data.preview import TooFewSamples, ValidationSet, read_validation_set
from data.sample import Crop, ImageSettings
from data.shards.index import SourceIndex, check_listing, open_index
from data.store import StoreOptions, open_store
from data.store.virtual import ClassFolderStore
from t2i.config.base import ConfigError
from t2i.config.data import DataConfig, SourceConfig
from t2i.config.run import RunConfig
from t2i.distributed import Preempted, World
from t2i.train.metrics import EventLog, JsonLines

_ROUND_S = 5.0
"""A rank whose batch is not there says so this often, so that no rank waits for long in the sum."""
_JUDGED_AFTER = 1000
_WORST_NAMED = 3


class Intake:
    """One stage's batches on this rank, and what was passed over on the way to them.

    Args:
        loader: this rank's batches.
        world: this process.
        config: the stage's settings.
        stage: its name.
        step: batches consumed; lines of quarantine.jsonl past it are taken back.
        damage: what is known to be wrong with its shards.
    """

    def __init__(
        self, loader: Loader, world: World, config: RunConfig, stage: str, step: int, damage: Sequence[Quarantined]
    ) -> None:
        self._loader, self._world, self._stage = loader, world, stage
        self._max_set_aside = config.data.max_bad_fraction
        self._quarantine = JsonLines(config.directory / "quarantine.jsonl")
        self._events = EventLog(config.directory, stage, world.is_rank0)
        if world.is_rank0:
            with self._events.beside("quarantine.jsonl"):
                self._quarantine.rewind(stage, step)
            self._write([{"stage": stage, "step": 0, **asdict(shard)} for shard in (damage if step == 0 else ())])
        self._damaged = len(damage)
        self._pending: list[dict[str, Any]] = []
        self.state = loader.state_dict()
        """This rank's data state after the last batch that every rank has."""

    def close(self) -> None:
        """End the loader's threads."""
        self._loader.close()

    def next(self, step: int, leave: Callable[[], str | None] = lambda: None) -> Batch:
        """Return this rank's share of the batch of `step`.

        Args:
            leave: why this rank is asked to leave; None: it is not.

        Raises:
            Preempted: on every rank: one was asked to leave.
            Exception: on every rank alike: what any rank met, or DataError past the share of bad samples.
        """
        batch: Batch | None = None
        fault: Exception | None = None
        while True:
            try:
                batch = batch or self._loader.take(_ROUND_S)
            except Exception as error:  # also what nobody thought of: the other ranks must hear of it
                fault = error
            reason = leave()
            failed, leaving, missing, read, set_aside = self._world.sum(
                [fault is not None, reason is not None, batch is None, *self._counts(batch)]
            )
            too_bad = read >= _JUDGED_AFTER and set_aside > self._max_set_aside * read
            if leaving and not failed:
                raise Preempted(next(told for told in self._world.gather(reason) if told is not None))
            if not (failed or too_bad or missing):
                assert batch is not None
                self._note(step, batch.bad)
                self.state = batch.state
                return batch
            if failed or too_bad:
                break
        self._note(step, [*(batch.bad if batch is not None else ()), *self._loader.take_bad()])
        self.flush()
        if failed:
            self._raise_one(fault)
        raise DataError(self._world.broadcast_from_rank0(lambda: self._too_bad(set_aside, read)))

    def _counts(self, batch: Batch | None) -> tuple[int, int]:
        """Samples read and set aside: up to this batch or, while it is looked for, so far."""
        counters = self._loader.counters() if batch is not None else self._loader.read_so_far()
        set_aside = counters.get("bad", 0)
        return sum(counters.values()) - set_aside, set_aside  # set_aside counts again what is there by reasons

    def _note(self, step: int, found: Sequence[Quarantined]) -> None:
        self._pending += [{"stage": self._stage, "step": step, **asdict(it)} for it in found]

    def _raise_one(self, fault: Exception | None) -> NoReturn:
        """Raise this rank's fault, else the first other rank's."""
        told: Exception | None = fault
        if fault is not None and not isinstance(fault, UserError | StoreError):  # it may not pickle
            told = RuntimeError(f"rank {self._world.rank}: {type(fault).__name__}: {fault}")
        faults = self._world.gather(told)
        raise fault or next(it for it in faults if it is not None)

    def flush(self) -> tuple[dict[str, int], dict[str, int]]:
        """Write out what was set aside on all ranks; the counters and the retried requests over all ranks."""
        counters: Counter[str] = Counter()
        retries: Counter[str] = Counter()
        for counted, retried, pending in self._world.gather(
            (self._loader.counters(), self._loader.retries(), self._pending)
        ):
            counters.update(counted)
            retries.update(retried)
            if self._world.is_rank0:
                self._write(pending)
        self._pending = []
        if self._damaged:
            counters["damaged_shards"] = self._damaged
        return dict(counters), dict(retries)

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        with self._events.beside("quarantine.jsonl"):
            for line in lines:
                self._quarantine.write(line)

    def _too_bad(self, set_aside: int, read: int) -> str:
        shards = Counter(
            f"{line['source']}/{line['shard']}"
            for line in self._quarantine.lines()
            if line["stage"] == self._stage and line["reason"] != "damaged_tar"
        )
        worst = ", ".join(f"{name} ({count})" for name, count in shards.most_common(_WORST_NAMED))
        return (
            f"{set_aside} of {read} samples have bad content, over data.max_bad_fraction {self._max_set_aside:g}; "
            f"the worst shards: {worst}; {self._quarantine.path} lists them: mend them, or raise data.max_bad_fraction"
        )


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
    damage: list[Quarantined]
    """Where and why each damaged shard of them ends early."""

    def heldout_samples(self, config: RunConfig) -> ValidationSet | None:
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
            return read_validation_set(self.heldout, asked, images)
        except TooFewSamples as error:
            where = ", ".join(f"source {it.index.name!r} in {it.index.store.url}" for it in self.heldout)
            raise ConfigError(
                f"validation.samples {asked} are more than the {error.found} usable samples held out of {where}: lower "
                f"it to {error.found}, or hold out more"
            ) from error

    def loader(self, config: RunConfig, stage: str, world: World, state: dict[str, Any] | None) -> Loader:
        """This rank's batches, from a checkpoint's data state or the stage's first batch."""
        loader = Loader(
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
        )
        if state is not None:
            loader.load_state_dict(state)
        return loader


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
    return Source(opened[key], source.weight, source.filters)


def _damage(sources: list[Source]) -> list[Quarantined]:
    return [
        Quarantined(index.name, index.names[shard], None, int(index.offsets(shard)[-1]), "damaged_tar", detail)
        for index in (source.index for source in sources)
        for shard, detail in sorted(index.corruption.items())
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
        read_validation_set([source], 1, image_settings(config.data))
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
