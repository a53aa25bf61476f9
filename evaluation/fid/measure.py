"""From sets of images to FID and the other metrics.

The processes share the images batch by batch, and rank 0 takes the features in the order of the images, so the values
are the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from data.listing import format_left_out
from data.progress import progress_bar
from evaluation.fid.estimators import (
    NEIGHBOUR,
    SPLIT,
    Gaussian,
    InceptionScore,
    Moments,
    frechet_distance,
    precision_recall,
)
from evaluation.fid.images import KEPT, Images, Reference, kept_numbers
from evaluation.fid.networks import Features, Network
from t2i.distributed import World
from t2i.pipeline import batches_of

USUAL_SAMPLES = 50_000
"""Samples of published FIDs."""

Take = Callable[[Sequence[int], Features], object]


def for_features(world: World, network: Network, images: Images, batch_size: int, what: str, take: Take) -> None:
    """Give rank 0 the features of all images, batch by batch and in order. A collective.

    Args:
        what: the images' name where progress is shown.
        take: called on rank 0 alone, with the numbers of a batch and its features, on the CPU.

    Raises:
        UserError: an image cannot be read; on every rank.
    """
    groups = batches_of(range(len(images)), batch_size)
    mine = images.batches(groups[world.rank :: world.size])
    with progress_bar(len(images), "image", what, shown=world.is_rank0) as bar:
        for first in range(0, len(groups), world.size):
            found = world.gather(_next(network, mine))
            for error in found:
                if isinstance(error, UserError):
                    raise error
            # In the last round there may be fewer than ranks.
            features = [part for part in found if isinstance(part, Features)]
            for group, of_group in zip(groups[first : first + world.size], features, strict=True):
                if world.is_rank0:
                    take(group, of_group)
                bar.update(len(group))


def _next(network: Network, batches: Iterator[Tensor]) -> Features | UserError | None:
    """Features of this rank's next batch, None after its last, or its error, which all ranks are to raise."""
    try:
        batch = next(batches, None)
    except UserError as error:
        return error
    return None if batch is None else Features(*(part.float().cpu() for part in network.features(batch)))


class Measured:
    """What rank 0 knows of a set of images once it has taken all their features; elsewhere it is empty.

    Args:
        device: where covariances are summed.
        kept: numbers of the images whose features are kept, for precision and recall.
    """

    def __init__(self, network: Network, device: torch.device, kept: Collection[int]) -> None:
        self._moments = {kind: Moments(dim, device) for kind, dim in network.dims.items()}
        self._kept = set(kept)
        self._pooled: list[Tensor] = []
        self.score = InceptionScore()

    def take(self, numbers: Sequence[int], features: Features) -> None:
        """The next images' features."""
        self._moments["pooled"].add(features.pooled)
        self._moments["spatial"].add(features.spatial)
        self.score.add(features.logits)
        self._pooled.append(features.pooled[[number in self._kept for number in numbers]])

    def gaussians(self) -> dict[str, Gaussian]:
        """`pooled` and `spatial`."""
        return {kind: moments.gaussian() for kind, moments in self._moments.items()}

    def pooled(self) -> Tensor:
        """The kept images' pooled features, (n, d)."""
        return torch.cat(self._pooled)


def measure(
    world: World, network: Network, images: Images, batch_size: int, what: str, kept: Collection[int]
) -> Measured:
    """Measure a set of images; the arguments are those of `for_features` and `Measured`. A collective.

    Raises:
        UserError: there is only one image, or one cannot be read.
    """
    if len(images) < 2:
        raise UserError(f"the {what} are one image: at least 2 are needed, and thousands to say much")
    measured = Measured(network, world.device, kept)
    for_features(world, network, images, batch_size, what, measured.take)
    return measured


def compare(world: World, network: Network, samples: Images, reference: Reference, batch_size: int) -> dict[str, Any]:
    """FID, sFID, Inception score, precision and recall of samples, on every rank.

    Returns:
        In JSON's types: `metrics`, by name; `left_out`, why others are missing; `warnings`; `samples`, `reference`,
        `features` and `settings`, which say what was measured. Names of metrics end in the network's name unless it is
        Inception.

    Raises:
        UserError: an image cannot be read, or the sets cannot be compared.
    """
    known, expected = reference.gaussians, None
    if reference.images is not None:
        count = len(reference.images)
        kept = range(count) if known else kept_numbers(count)  # those in an .npz with statistics were kept already
        expected = measure(world, network, reference.images, batch_size, "reference", kept)
    found = measure(world, network, samples, batch_size, "samples", range(len(samples)))

    def finish() -> dict[str, Any]:
        theirs = known or (expected.gaussians() if expected else {})
        values, left_out = metrics(found, theirs, expected, world.device)
        return {
            "metrics": {name + network.suffix: value for name, value in values.items()},
            "left_out": {name + network.suffix: why for name, why in left_out.items()},
            "warnings": warnings(network, samples, reference),
            **describe(network, samples, reference),
            "settings": {"batch_size": batch_size, "split": SPLIT, "neighbour": NEIGHBOUR, "torch": torch.__version__},
        }

    return world.broadcast_from_rank0(finish)


def metrics(
    found: Measured, theirs: dict[str, Gaussian], expected: Measured | None, device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Values by name, and why others are left out.

    Args:
        found: the samples.
        theirs: the reference's Gaussians.
        expected: the reference's images, if it has any.
    """
    values, left_out, ours = dict[str, float](), dict[str, str](), found.gaussians()
    for name, kind in (("fid", "pooled"), ("sfid", "spatial")):
        if kind in theirs:
            values[name] = frechet_distance(ours[kind], theirs[kind])
        else:
            left_out[name] = f"the reference has no statistics of {kind} features"
    values["inception_score"], values["inception_score_std"] = found.score.result()
    pooled = [images.pooled().to(device) for images in (expected, found) if images is not None]
    if len(pooled) == 2 and min(map(len, pooled)) > NEIGHBOUR:
        values["precision"], values["recall"] = precision_recall(*pooled)
    else:
        why = (
            f"samples and reference must have more than {NEIGHBOUR} images each"
            if expected
            else "the reference has no images"
        )
        left_out |= {"precision": why, "recall": why}
    return values, left_out


def describe(network: Network, samples: Images, reference: Reference) -> dict[str, Any]:
    """What was measured, with its hashes."""
    count = len(reference.images or ())
    return {
        "features": {
            "network": network.name,
            "weights_sha256": network.sha256,
            "comparable_with_published": network.comparable,
        },
        "samples": {"sha256": samples.digest(), "images": len(samples), "size": list(samples.size)},
        "reference": {
            "sha256": reference.digest(),
            "statistics": "read" if reference.gaussians else "measured",
            "images": count,
            "images_of_recall": count if reference.gaussians else len(kept_numbers(count)),
            "about": reference.about,
        },
    }


def warnings(network: Network, samples: Images, reference: Reference) -> list[str]:
    """What to know before trusting the values, a sentence each."""
    said, n = [], len(samples)
    for what, images in (("samples", samples), ("reference", reference.images)):
        if images is not None and images.left_out:
            said.append(f"the {what} are {len(images)} images{format_left_out(images.left_out)}")
    if not network.comparable:
        said.append(f"these are features of {network.name}: not comparable with any published FID, sFID or the rest")
    if n != USUAL_SAMPLES:
        more = "fewer give a higher FID" if n < USUAL_SAMPLES else "more give a lower FID"
        said.append(f"the samples are {n}, where published values are of {USUAL_SAMPLES}: {more}")
    dims = network.dims.values()
    if n <= max(dims):
        said.append(f"the samples are {n}, of {' and '.join(map(str, dims))} features: a covariance is singular")
    of = reference.about.get("images") if reference.gaussians else len(reference.images or ())
    if of is not None and of <= max(dims):
        said.append(f"the reference's statistics are of {of} images: a covariance is singular")
    if reference.images is not None:
        if len(reference.images) < min(KEPT, n):
            said.append(f"precision and recall are of {len(reference.images)} images, where the usual number is {KEPT}")
        if reference.images.size != samples.size:
            sizes = [f"{width} x {height}" for height, width in (samples.size, reference.images.size)]
            said.append(f"the samples are {sizes[0]} pixels and the reference {sizes[1]}: the resize is measured, too")
    return said
