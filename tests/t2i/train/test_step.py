"""A step's random choices belong to slots: the same for any micro-batch and any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from host_reads import HostReads
from torch import Tensor

from data.loader import Batch
from data.randomness import key, uniform
from t2i.config.loading import validate_config
from t2i.config.run import RunConfig
from t2i.diffusion.objective import LossWeights, Objective
from t2i.distributed import World
from t2i.engine.engine import StepResult
from t2i.models.layers import keep_mask
from t2i.models.pixelgen import PixelGen
from t2i.models.text import ClassLabels
from t2i.train.step import GlobalMeans, TrainingStep

CPU, SIZE, CLASSES, FIRST = torch.device("cpu"), 64, 10, 128
SEEN = tuple[Tensor, ...]


class Recorder:
    """In the engine's place: keeps what its network was given, and predicts nothing."""

    def __init__(self) -> None:
        self.given: list[SEEN] = []

    def network(self, *given: Tensor) -> tuple[Tensor, None]:
        self.given.append(given)
        return torch.zeros_like(given[0]), None

    def backward(self, loss: Tensor) -> None:
        assert loss.isfinite()

    def step(self, *_: Any) -> StepResult:
        return StepResult(1.0, None)


class Eyes:
    """In the frozen networks' place."""

    width, depth, seen = 4, 1, 0

    def distance(self, predicted: Tensor, image: Tensor) -> Tensor:
        self.seen += len(predicted)
        return (predicted - image).square().mean((1, 2, 3))

    def tokens(self, image: Tensor, grid: tuple[int, int], layers: Any) -> list[Tensor]:
        return [image.flatten(2).mT for _ in layers]


def config(micro: int, dropout: float, caption_dropout: float) -> RunConfig:
    model = {"condition": "class", "classes": CLASSES, "width": 16, "heads": 2, "depth": 4, "repa_layer": 1}
    tree = {
        "model": {**model, "patch_size": 4, "context_start": 1, "dropout": dropout},
        "data": {"resolution": 8},
        "objective": {"caption_dropout": caption_dropout},
        "train": {"batch_size": SIZE, "micro_batch_size": micro},
    }
    return validate_config(tree, "here")


def seen(slots: np.ndarray, micro: int, dropout: float = 0.1, caption_dropout: float = 0.5) -> SEEN:
    """What the network is given for these slots, over all micro-batches."""
    engine, labels = Recorder(), ClassLabels(CLASSES, CPU)
    objective = Objective(LossWeights(0, 0, 0, 0.3, 0.05), None, None)
    stage = config(micro, dropout, caption_dropout)
    world = World(0, 1, CPU)
    step = TrainingStep(stage, "s", world, labels, labels.null_caption(), objective, engine)
    pixels = torch.from_numpy(np.stack([np.full((3, 8, 8), slot % 256, np.uint8) for slot in slots]))
    captions = [str(slot % CLASSES) for slot in slots]
    batch = Batch([pixels], captions, captions, slots, {}, [], 0.0)
    step(batch, 0, lambda loss, norm: None)
    return tuple(map(torch.cat, zip(*engine.given, strict=True)))


def test_micro_batches_and_ranks_see_the_same() -> None:
    slots = np.arange(FIRST, FIRST + SIZE)
    whole = seen(slots, SIZE)
    assert len(whole) == 4
    for micro in (1, 16):
        assert all(torch.equal(a, b) for a, b in zip(seen(slots, micro), whole, strict=True))
    for rank in range(4):
        mine = slice(rank, None, 4)
        assert all(torch.equal(a, b[mine]) for a, b in zip(seen(slots[mine], 8), whole, strict=True))


def test_a_share_of_several_sizes_is_trained_on_group_by_group() -> None:
    slots = np.random.default_rng(0).permutation(np.arange(FIRST, FIRST + SIZE))
    sizes = [(8, 8), (4, 16), (16, 4), (8, 8)] * (SIZE // 16)
    groups = [torch.full((4, 3, *size), n, dtype=torch.uint8) for n, size in enumerate(sizes)]
    for micro in (1, 2, 4):
        engine, labels = Recorder(), ClassLabels(CLASSES, CPU)
        objective = Objective(LossWeights(0, 0, 0, 0.3, 0.05), None, None)
        step = TrainingStep(
            config(micro, 0.1, 0.5), "s", World(0, 1, CPU), labels, labels.null_caption(), objective, engine
        )
        captions = [str(slot % CLASSES) for slot in slots]
        trained = step(Batch(groups, captions, captions, slots, {}, [], 0.0), 0, lambda loss, norm: None)
        shapes = [tuple(image.shape) for image, *_ in engine.given]
        assert shapes == [(micro, 3, *size) for size in sizes for _ in range(4 // micro)]
        # Times, labels and masks are the slots', as in a batch of squares.
        of_squares = seen(slots, SIZE)
        for n in range(1, 4):
            assert torch.equal(torch.cat([given[n] for given in engine.given]), of_squares[n])
        if micro == 1:
            means = trained.means
        assert trained.means == pytest.approx(means, rel=1e-5)


def test_labels_are_dropped_to_the_null_class() -> None:
    slots = np.arange(FIRST, FIRST + SIZE)
    dropped = uniform(key(0, "s", "caption"), slots) < 0.5
    labels = seen(slots, 16)[2]
    assert 20 < dropped.sum() < 44
    assert labels.tolist() == [CLASSES if gone else slot % CLASSES for slot, gone in zip(slots, dropped, strict=True)]
    assert seen(slots, 16, caption_dropout=0.0)[2].tolist() == [slot % CLASSES for slot in slots]


def test_every_slot_has_a_mask_of_its_own_in_every_batch() -> None:
    keys = torch.cat([seen(np.arange(n * SIZE, (n + 1) * SIZE), 16)[3] for n in range(4)])
    assert keys.unique().numel() == 4 * SIZE and keys.min() >= 0 and keys.max() < 2**62
    masks = keep_mask(keys, 4, 64, 0.5).flatten(1).double()
    agree = torch.corrcoef(masks) - torch.eye(len(masks))
    assert agree.abs().max() < 0.5 and agree.mean().abs() < 0.01


def test_a_network_without_dropout_is_given_no_keys() -> None:
    assert len(seen(np.arange(SIZE), 16, dropout=0.0)) == 3


# Captions


class Words:
    """In place of a text encoder: a caption "7 3" has 3 tokens, padded to a multiple of 4, or to 12."""

    width, dtype = 5, torch.float32

    def __init__(self, uncut: bool) -> None:
        self.uncut = uncut
        self.calls: list[list[str]] = []

    def __call__(self, captions: list[str]) -> list[Tensor]:
        self.calls.append(captions)
        return [self.states(*map(int, caption.split())) for caption in captions]

    def states(self, kind: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(kind)
        states = torch.zeros(12 if self.uncut else -(-tokens // 4) * 4, self.width)
        states[:tokens] = torch.randn(tokens, self.width, generator=generator)
        return states


class Gradients(Recorder):
    """In the engine's place: a network with its gradients, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.denoiser = PixelGen(
            width=16, depth=2, heads=2, text_width=5, text_length=12, text_depth=1, patch_size=4, bottleneck=4,
            repa_layer=1, text_padding="mask",
        )  # fmt: skip
        for parameter in self.denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def network(self, *given: Tensor) -> tuple[Tensor, None]:
        self.given.append(given)
        return self.denoiser(*given).output, None

    def backward(self, loss: Tensor) -> None:
        (loss / (SIZE // len(self.given[-1][0]))).backward()


def taught(micro: int, uncut: bool = False, caption_dropout: float = 0.5) -> tuple[float, Gradients, Words]:
    """The loss of a step on captions of 1 to 11 tokens, its engine and what read its captions."""
    engine, words = Gradients(), Words(uncut)
    model = {"width": 16, "heads": 2, "depth": 2, "repa_layer": 1, "patch_size": 4, "text_padding": "mask"}
    tree = {
        "model": model,
        "data": {"resolution": 8},
        "objective": {"caption_dropout": caption_dropout},
        "train": {"batch_size": SIZE, "micro_batch_size": micro},
    }
    objective = Objective(LossWeights(0, 0, 0, 0.3, 0.05), None, None)
    world, null = World(0, 1, CPU), words.states(99, 1)
    step = TrainingStep(validate_config(tree, "here"), "s", world, words, null, objective, engine)
    pixels = torch.randint(256, (SIZE, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = [f"{n % 7} {1 + n * 11 // SIZE}" for n in range(SIZE)]
    trained = step(Batch([pixels], captions, captions, np.arange(SIZE), {}, [], 0.0), 0, lambda loss, norm: None)
    return trained.means["loss"], engine, words


@pytest.mark.parametrize("caption_dropout", [0.0, 0.5, 1.0])
def test_captions_are_read_in_one_call_and_dropped_ones_never(caption_dropout: float) -> None:
    _, engine, words = taught(8, caption_dropout=caption_dropout)
    dropped = uniform(key(0, "s", "caption"), range(SIZE)) < caption_dropout
    captions = [f"{n % 7} {1 + n * 11 // SIZE}" for n in range(SIZE)]
    assert words.calls == [[caption for caption, gone in zip(captions, dropped, strict=True) if not gone]]
    given = [states for micro_batch in engine.given for states in micro_batch[2]]
    for caption, gone, found in zip(captions, dropped, given, strict=True):
        expected = words.states(99, 1) if gone else words.states(*map(int, caption.split()))
        assert torch.equal(found[: len(expected)], expected) and not found[len(expected) :].any()


def test_a_micro_batch_has_the_length_of_its_longest_caption() -> None:
    _, engine, _ = taught(8, caption_dropout=0.0)
    assert [len(given[2][0]) for given in engine.given] == [4, 4, 4, 8, 8, 12, 12, 12]


def test_neither_the_micro_batch_nor_the_cut_changes_loss_and_gradients() -> None:
    loss, engine, _ = taught(SIZE, uncut=True)
    gradients = {name: p.grad for name, p in engine.denoiser.named_parameters()}
    for micro in (1, 8):
        other, cut, _ = taught(micro)
        assert other == pytest.approx(loss, rel=1e-5)
        for name, parameter in cut.denoiser.named_parameters():
            assert gradients[name] is not None and gradients[name].abs().max() > 0
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("fraction", [0.25, 0.75])
def test_the_share_of_dropped_labels_is_the_configs(fraction: float) -> None:
    batches = [np.arange(n * SIZE, (n + 1) * SIZE) for n in range(16)]
    labels = torch.cat([seen(slots, SIZE, caption_dropout=fraction)[2] for slots in batches])
    n = 16 * SIZE
    spread = (fraction * (1 - fraction) / n) ** 0.5
    assert (labels == CLASSES).double().mean().item() == pytest.approx(fraction, abs=4 * spread)


def test_the_loss_is_read_after_the_norm_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is the one point of a step where the host waits."""
    order: list[str] = []
    read = GlobalMeans.read
    monkeypatch.setattr(GlobalMeans, "read", lambda self: [order.append("loss"), read(self)][1])

    class Engine(Recorder):
        def backward(self, loss: Tensor) -> None:
            pass

        def step(self, lr: Any, skip_update: Any) -> StepResult:
            order.append("norm")
            return StepResult(1.0, skip_update(1.0))

    labels, reads = ClassLabels(CLASSES, CPU), HostReads()
    net = Eyes()
    objective = Objective(LossWeights(0.1, 0.01, 0, 0.3, 0.05), net, net)
    stage = config(16, 0.1, 0.5)
    step = TrainingStep(stage, "s", World(0, 1, CPU), labels, labels.null_caption(), objective, Engine())
    slots = np.arange(SIZE)
    captions = [str(slot % CLASSES) for slot in slots]
    batch = Batch([torch.zeros(SIZE, 3, 8, 8, dtype=torch.uint8)], captions, captions, slots, {}, [], 0.0)
    with reads:
        step(batch, 0, lambda loss, norm: None)
    assert order[:2] == ["norm", "loss"] and net.seen > 0
    assert reads.found == []
    with reads:
        float(torch.ones(()) + 1)
        torch.zeros(2)[torch.ones(2).bool()]
    assert len(reads.found) == 2
