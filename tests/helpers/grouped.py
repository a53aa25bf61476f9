"""Sources whose samples train in buckets, and batches of them as a loader gives them, for the tests of groups."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tar_samples import jpeg, write_source

from data.filters import Buckets, Filters, Size
from data.lane import Quarantined, Source
from data.loader import Loader, merge_states
from data.order import SourceOrder
from data.sample import ImageSettings
from data.shards.index import SourceIndex

SIZES: tuple[Size, ...] = ((8, 16), (8, 8), (16, 8))
SHAPES: tuple[Size, ...] = ((16, 16), (16, 30), (40, 20), (18, 16), (17, 33), (29, 17))
"""Of the images, (height, width), by their numbers."""
LANES = 4
FILTERS = Filters(min_caption_words=2)


def bucket(number: int) -> Size:
    """Worked out by hand."""
    return ((8, 8), (8, 16), (16, 8), (8, 8), (8, 16), (16, 8))[number % len(SHAPES)]


@dataclass(frozen=True)
class Case:
    """Sources with a number of samples in each shard, the groups of a lane in a batch, and what is wrong with some."""

    counts: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] = (1.0,)
    lanes: int = LANES
    group_size: int = 2
    groups: int = 1
    block: int = 5
    broken: frozenset[int] = frozenset()
    """Behind a good header."""
    no_image: frozenset[int] = frozenset()
    short: frozenset[int] = frozenset()
    """Samples with captions that the filters leave out."""

    def write(self, folder: Path) -> list[SourceIndex]:
        replaced = {n: {"jpg": jpeg(n, SHAPES[n % len(SHAPES)])} for n in range(max(map(sum, self.counts)))}
        for n in replaced.keys() & self.broken:
            replaced[n] = {"jpg": replaced[n]["jpg"][:-8]}
        for n in replaced.keys() & self.no_image:
            replaced[n] = {"jpg": b"no image"}
        for n in replaced.keys() & self.short:
            replaced[n]["txt"] = b"short"
        return [
            write_source(folder / f"s{n}", counts, f"s{n}", {k: v for k, v in replaced.items() if k < sum(counts)})
            for n, counts in enumerate(self.counts)
        ]

    def loader(self, indices: list[SourceIndex], rank: int = 0, world: int = 1, **changes: Any) -> Loader:
        options: dict[str, Any] = {
            "images": ImageSettings(8, crop="random", horizontal_flip=True, buckets=Buckets(SIZES, self.group_size)),
            "batch_size": self.lanes * self.group_size * self.groups,
            "lanes": self.lanes,
            "seed": 1,
            "stage": "s",
            "workers": 0,
            "shuffle_block": self.block,
            "buffer_bytes": 4 << 30,
            "filters": FILTERS,
        } | changes
        filters, state = options.pop("filters"), options.pop("state", None)
        sources = [Source(index, weight, filters) for index, weight in zip(indices, self.weights, strict=True)]
        loader = Loader(sources, rank=rank, world_size=world, **options)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    def read(
        self, indices: list[SourceIndex], batches: int, world: int = 1, **changes: Any
    ) -> tuple[list[Any], list[Quarantined], dict[str, Any]]:
        """The global batches by slot, what was set aside, and the state after them."""
        per_rank, states, aside = [], [], []
        for rank in range(world):
            with self.loader(indices, rank, world, **changes) as loader:
                read = [next(loader) for _ in range(batches)]
            per_rank.append(read)
            states.append(read[-1].state)
            aside += [it for batch in read for it in batch.bad]
        merged = []
        for shares in zip(*per_rank, strict=True):
            rows = []
            for share in shares:
                pixels = [image for group in share.pixels for image in group]
                rows += [
                    (int(slot), id_, caption, tuple(image.shape[1:]), image.numpy().tobytes())
                    for slot, id_, caption, image in zip(share.slots, share.ids, share.captions, pixels, strict=True)
                ]
            merged.append(sorted(rows))
        return merged, sorted(aside, key=str), json.loads(json.dumps(merge_states(states)))


def number_of(id_: str) -> int:
    return int(id_.rsplit("/", 1)[1])


def came_and_waits(
    case: Case, indices: list[SourceIndex], state: dict[str, Any]
) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]:
    """How often each sample, by source and number, was come by until a state, and how often it waits there."""
    came: Counter[tuple[str, int]] = Counter()
    waits: Counter[tuple[str, int]] = Counter()
    for index in indices:
        order = SourceOrder(index.name, index.counts, case.lanes, case.block, 1, "s")

        def number(lane: int, epoch: int, position: int, index: SourceIndex = index, order: SourceOrder = order) -> int:
            shard, sample = order.block(lane, epoch, position // case.block)[position % case.block]
            return int(index.counts[:shard].sum() + sample)

        for lane, it in ((int(lane), it) for lane, it in state["lanes"].items()):
            epoch, position = it["sources"][index.name]
            places = [(before, n) for before in range(epoch) for n in range(order.lane_size(lane, before))]
            places += [(epoch, n) for n in range(position)]
            came.update((index.name, number(lane, *place)) for place in places)
            waits.update((index.name, number(lane, *place)) for name, *place in it["waiting"] if name == index.name)
    return came, waits
