"""The trainer's data iterator, and a stage's sources, opened and checked before training.

A global batch reaches every rank or none: a rank that cannot get its share must not leave the others waiting in the
step's collectives. So each step begins with one small sum over the ranks, on their hosts: who failed, who is asked to
stop, who has no batch yet, how many samples were read, how many are bad. While a rank has no batch, the sum is
repeated: so a lane that finds only bad samples ends the run too, and a slow store does not run into the process group's
time-out.
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
"""How often a rank without a batch joins the sum, so that no rank waits in it for long."""
_JUDGED_AFTER = 1000
"""Samples read before data.max_bad_fraction applies."""
_WORST_NAMED = 3


class DataIterator:
    """One stage's batches on this rank; bad samples are listed in quarantine.jsonl.

    `step` is the number of batches consumed: lines of quarantine.jsonl after it are removed. `corruption` lists
    the shards that end early.
    """

    def __init__(
        self, loader: Loader, world: World, config: RunConfig, stage: str, step: int, corruption: Sequence[Quarantined]
    ) -> None:
        self._loader, self._world, self._stage = loader, world, stage
        self._max_bad_fraction = config.data.max_bad_fraction
        self._quarantine = JsonLines(config.directory / "quarantine.jsonl")
        self._events = EventLog(config.directory, stage, world.is_rank0)
        if world.is_rank0:
            with self._events.tolerate_disk_errors("quarantine.jsonl"):
                self._quarantine.rewind(stage, step)
            self._write([{"stage": stage, "step": 0, **asdict(shard)} for shard in (corruption if step == 0 else ())])
        self._corrupt_shards = len(corruption)
        self._pending: list[dict[str, Any]] = []
        self._state = loader.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """This rank's data state after the last batch that every rank has."""
        return self._state

    def close(self) -> None:
        self._loader.close()

    def next(self, step: int, should_stop: Callable[[], str | None] = lambda: None) -> Batch:
        """Return this rank's share of the batch of `step`. A collective.

        `should_stop` says why this rank is asked to stop, or None.

        Raises, on every rank:
            Preempted: a rank was asked to stop.
            Exception: the error of any rank, or DataError if more samples are bad than data.max_bad_fraction.
        """
        batch: Batch | None = None
        fault: Exception | None = None
        while True:
            try:
                batch = batch or self._loader.take(_ROUND_S)
            except Exception as error:  # of any kind: the other ranks must know
                fault = error
            reason = should_stop()
            failed, stopping, missing, read, bad = self._world.sum(
                [fault is not None, reason is not None, batch is None, *self._counts(batch)]
            )
            too_bad = read >= _JUDGED_AFTER and bad > self._max_bad_fraction * read
            if stopping and not failed:
                raise Preempted(next(other for other in self._world.gather(reason) if other is not None))
            if not (failed or too_bad or missing):
                assert batch is not None
                self._note(step, batch.bad)
                self._state = batch.state
                return batch
            if failed or too_bad:
                break
        self._note(step, [*(batch.bad if batch is not None else ()), *self._loader.take_bad()])
        self.flush()
        if failed:
            self._raise_one(fault)
        raise DataError(self._world.broadcast_from_rank0(lambda: self._too_bad(bad, read)))

    def _counts(self, batch: Batch | None) -> tuple[int, int]:
        """Samples read, and bad ones among them: up to this batch, or so far while the batch is incomplete."""
        counters = self._loader.counters() if batch is not None else self._loader.read_so_far()
        bad = counters.get("bad", 0)
        return sum(counters.values()) - bad, bad  # the reasons' counters count the bad ones already

    def _note(self, step: int, found: Sequence[Quarantined]) -> None:
        self._pending += [{"stage": self._stage, "step": step, **asdict(sample)} for sample in found]

    def _raise_one(self, fault: Exception | None) -> NoReturn:
        """Raise this rank's fault, or the first other rank's."""
        shared: Exception | None = fault
        if fault is not None and not isinstance(fault, UserError | StoreError):  # it may not pickle
            shared = RuntimeError(f"rank {self._world.rank}: {type(fault).__name__}: {fault}")
        faults = self._world.gather(shared)
        raise fault or next(other for other in faults if other is not None)

    def flush(self) -> tuple[dict[str, int], dict[str, int]]:
        """Write the bad samples of all ranks to quarantine.jsonl; counters and retries over all ranks. A collective."""
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
        if self._corrupt_shards:
            counters["corrupt_shards"] = self._corrupt_shards
        return dict(counters), dict(retries)

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        with self._events.tolerate_disk_errors("quarantine.jsonl"):
            for line in lines:
                self._quarantine.write(line)

    def _too_bad(self, bad: int, read: int) -> str:
        shards = Counter(
            f"{line['source']}/{line['shard']}"
            for line in self._quarantine.lines()
            if line["stage"] == self._stage and line["reason"] != "corrupt_tar"
        )
        worst = ", ".join(f"{name} ({count})" for name, count in shards.most_common(_WORST_NAMED))
        return (
            f"{bad} of {read} samples have bad content, over data.max_bad_fraction {self._max_bad_fraction:g}; "
            f"the worst shards: {worst}; {self._quarantine.path} lists them: repair them, or raise "
            "data.max_bad_fraction"
        )


def image_settings(config: DataConfig) -> ImageSettings:
    return ImageSettings(
        config.resolution, config.small_images, config.crop, config.horizontal_flip, config.aspect_buckets
    )


@dataclass
class StageData:
    """A stage's sources, indexed."""

    sources: list[Source]
    val_sources: list[Source]
    """Read by validation; empty: no validation."""
    corruption: list[Quarantined]
    """Where and why each shard that ends early does so."""

    def val_samples(self, config: RunConfig) -> ValidationSet | None:
        """The validation set, the same on every rank and for every number of ranks; of one size, even with buckets.

        Raises:
            ConfigError: it has fewer samples than `validation.samples`.
        """
        if not self.val_sources:
            return None
        crop: Crop = "adm" if config.data.crop == "adm" else "center"
        images = ImageSettings(config.data.resolution, config.data.small_images, crop)
        asked = config.validation.samples
        try:
            return read_validation_set(self.val_sources, asked, images)
        except TooFewSamples as error:
            where = ", ".join(
                f"source {source.index.name!r} in {source.index.store.url}" for source in self.val_sources
            )
            raise ConfigError(
                f"validation.samples {asked} are more than the {error.found} usable samples held out of {where}: lower "
                f"it to {error.found}, or hold out more"
            ) from error

    def loader(self, config: RunConfig, stage: str, world: World, state: dict[str, Any] | None) -> Loader:
        """This rank's batches from a checkpoint's data state, or from the stage's first batch."""
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
"""Indices by name, address, manifest, class_folders and options: stages that share a source open it once."""


def open_source(config: DataConfig, source: SourceConfig, url: str, manifest: str | None, opened: Opened) -> Source:
    """Open one source at an address, with its index.

    Raises:
        DataError: it is missing, empty, malformed, or too large to be indexed at the start.
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


def _corruption(sources: list[Source]) -> list[Quarantined]:
    return [
        Quarantined(index.name, index.names[shard], None, int(index.offsets(shard)[-1]), "corrupt_tar", detail)
        for index in (source.index for source in sources)
        for shard, detail in sorted(index.corruption.items())
    ]


def _check_classes(source: Source, trained: list[Source], config: RunConfig) -> None:
    """Check that a folder of classes has as many as the model, and the same ones as the other sources."""
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
    """Open a stage's sources and check that each yields a sample.

    `opened` holds the indices that other stages opened; new ones are added.

    Raises:
        ConfigError: the stage has no sources, or too small a validation set.
        DataError: a source is missing, empty, malformed, or has no image that is large enough.
    """
    if not config.data.sources:
        raise ConfigError(f"stage {stage}: data.sources is empty: name at least one source")
    sources = [open_source(config.data, source, source.url, source.index, opened) for source in config.data.sources]
    for source in sources:
        read_validation_set([source], 1, image_settings(config.data))
    validates = config.validation.every > 0 and config.validation.samples > 0
    val_sources = [
        open_source(config.data, source, source.heldout, None, opened)
        for source in config.data.sources
        if source.heldout is not None and validates
    ]
    for source in (*sources, *val_sources):
        _check_classes(source, sources, config)
    data = StageData(sources, val_sources, _corruption([*sources, *val_sources]))
    data.val_samples(config)  # if it is too small, fail before the stages that come first
    return data
