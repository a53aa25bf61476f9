"""Small networks in both forms, ours and the released one, and their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from released_class_pixelgen import ClassSizes, class_denoiser_shapes, class_forward
from released_pixelgen import Sizes, denoiser_shapes, forward, lightning
from torch import Tensor

from t2i.config.loading import validate_config
from t2i.config.run import RunConfig
from t2i.released.checkpoint import Checkpoint

XXL = Sizes(1536, 16, 24, 2048, 128, 4, 256, 16, 32, 768)
XL = ClassSizes(1152, 28, 16, 1000, 32, 8, 0, 16, 16, 768)
L = ClassSizes(1024, 24, 16, 1000, 32, 8, 128, 16, 16, 768)
TINY = Sizes(hidden=48, blocks=3, heads=3, text_width=20, text_length=7, text_blocks=2, bottleneck=10, patch=4, grid=5,
             features=11)  # fmt: skip
TINY_L = ClassSizes(hidden=48, blocks=4, heads=3, classes=5, context_tokens=3, context_start=2, bottleneck=10, patch=4,
                    grid=5, features=11)  # fmt: skip
TINY_XL = replace(TINY_L, heads=4, bottleneck=0)


def config(**model: Any) -> RunConfig:
    sizes = {"patch_size": 4, "width": 48, "depth": 3, "heads": 3, "text_depth": 2, "bottleneck": 10, "repa_layer": 2}
    return validate_config(
        {"model": {**sizes, **model}, "text": {"length": 7}, "data": {"resolution": 20}}, where="the test"
    )


def class_config(s: ClassSizes, repa_layer: int) -> RunConfig:
    model = {"condition": "class", "patch_size": s.patch, "width": s.hidden, "depth": s.blocks, "heads": s.heads}
    model |= {"classes": s.classes, "context_tokens": s.context_tokens, "context_start": s.context_start}
    model |= {"bottleneck": s.bottleneck, "repa_layer": repa_layer}
    return validate_config({"model": model, "data": {"resolution": s.patch * s.grid}}, where="the test")


@dataclass(frozen=True)
class Case:
    """A network of 20 px in both forms. `forward` takes weights, images, times, condition and the layer to tap."""

    run: RunConfig
    text_width: int
    shapes: dict[str, tuple[int, ...]]
    forward: Callable[..., tuple[Tensor, Tensor]]

    def condition(self) -> Tensor:
        return torch.randn(2, 7, 20) if self.text_width else torch.tensor([1, 5])


def case_of_class(s: ClassSizes, repa_layer: int) -> Case:
    def run(w: dict[str, Tensor], *given: Tensor, align_layer: int) -> tuple[Tensor, Tensor]:
        return class_forward(w, s, *given, align_layer=align_layer)

    return Case(class_config(s, repa_layer), 0, class_denoiser_shapes(s), run)


def case_of_text() -> Case:
    def run(w: dict[str, Tensor], *given: Tensor, align_layer: int) -> tuple[Tensor, Tensor]:
        return forward(w, TINY, *given, align_layer=align_layer)

    return Case(config(), TINY.text_width, denoiser_shapes(TINY), run)


# L is tapped where the class's tokens join, as it is, and XL behind.
CASES = {"XXL": case_of_text(), "L": case_of_class(TINY_L, 2), "XL": case_of_class(TINY_XL, 3)}


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def compare(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Equal to 1e-5 of a tensor's largest value."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other, atol=1e-5 * other.abs().max().item(), rtol=0)


def stored(path: Path, weights: dict[str, Tensor], **more: Any) -> Checkpoint:
    torch.save(lightning(weights, **more), path)
    return Checkpoint(path)
