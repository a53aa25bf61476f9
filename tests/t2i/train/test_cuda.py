"""What only a GPU shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from data.loader import Batch
from t2i.config.loading import validate_config
from t2i.diffusion.objective import LossTerms, LossWeights, Objective
from t2i.distributed import World, to_device
from t2i.engine.engine import StepResult
from t2i.models.layers import attention
from t2i.models.pixelgen import PixelGen
from t2i.train.step import GlobalMeans, TrainingStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CPU, TEXT_LENGTH, TEXT_WIDTH = torch.device("cpu"), 6, 8


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_means_and_uploads(gpu: torch.device) -> None:
    array = np.arange(5.0)
    assert to_device(array, gpu).tolist() == array.tolist()
    found = []
    for device in (CPU, gpu):
        terms = LossTerms()
        terms.add("a", torch.tensor([1.0, 4.0], device=device).sum(), 2)
        found.append(GlobalMeans(terms, ["a", "b"], device).read())
    assert found[0] == found[1] == {"a": 2.5}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_cpus(gpu: torch.device, dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 64) for n in (7, 9, 9))
    mask = torch.rand(2, 9) < 0.6 if masked else None
    if mask is not None:
        mask[:, 0] = True
    expected = attention(q, k, v, mask)
    found = attention(*(x.to(gpu, dtype) for x in (q, k, v)), None if mask is None else mask.to(gpu))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float().cpu(), expected, atol=tolerance, rtol=tolerance)


class Captions:
    """In the text encoder's place."""

    width, dtype = TEXT_WIDTH, torch.float32

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, captions: list[str]) -> list[Tensor]:
        return [torch.full((TEXT_LENGTH, TEXT_WIDTH), float(len(it)), device=self._device) for it in captions]

    def null_caption(self) -> Tensor:
        return self([""])[0]


class Engine:
    """Backward, and a norm that is read: the one point where the host may wait."""

    def __init__(self, network: PixelGen) -> None:
        self.model = network
        self.waited = 0

    def network(self, *given: Tensor) -> tuple[Tensor, None]:
        return self.model(*given).output, None

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: object, skip_update: object) -> StepResult:
        torch.cuda.set_sync_debug_mode("default")
        self.waited += 1
        return StepResult(float(self.model.head.weight.grad.norm()), None)


def test_micro_batches_do_not_wait_for_the_device(gpu: torch.device) -> None:
    torch.manual_seed(0)
    denoiser = PixelGen(
        width=24, depth=2, heads=2, text_width=TEXT_WIDTH, text_length=TEXT_LENGTH, text_depth=1, patch_size=4,
        bottleneck=7, repa_layer=1,
    ).to(gpu)  # fmt: skip
    tree = {
        "model": {"width": 24, "depth": 2, "heads": 2, "text_depth": 1, "patch_size": 4, "repa_layer": 1},
        "data": {"resolution": 8},
        "objective": {"caption_dropout": 0.5},
        "train": {"batch_size": 8, "micro_batch_size": 2},
    }
    captions, engine = Captions(gpu), Engine(denoiser)
    objective = Objective(LossWeights(0, 0, 0, 0.3, 0.05), None, None)
    step = TrainingStep(
        validate_config(tree, "here"),
        "s",
        World(0, 1, gpu),
        captions,
        captions.null_caption(),
        objective,
        engine,
    )
    pixels = torch.zeros(8, 3, 8, 8, dtype=torch.uint8).pin_memory()
    words = [str(n) for n in range(8)]
    batch = Batch([pixels], words, words, np.arange(8), {}, [], 0.0)
    step(batch, 0, lambda loss, norm: None)  # fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        means = step(batch, 0, lambda loss, norm: None).means
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.waited == 2 and means["loss"] > 0
