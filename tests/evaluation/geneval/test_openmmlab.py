"""OpenMMLab's checkpoints: every weight finds its place, and the network computes what mmdet's does."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet_mask2former import TINY, Sizes, mask2former, position_index, random_weights, shapes
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from data.errors import UserError
from evaluation.geneval.mask2former import load_network, swin_s
from evaluation.geneval.openmmlab import convert, read


def config(sizes: Sizes) -> Mask2FormerConfig:
    backbone = SwinConfig(
        embed_dim=sizes.embed, depths=list(sizes.depths), num_heads=list(sizes.swin_heads), window_size=sizes.window,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return Mask2FormerConfig(
        backbone_config=backbone, feature_size=sizes.width, mask_feature_size=sizes.width, hidden_dim=sizes.width,
        encoder_feedforward_dim=sizes.encoder_hidden, dim_feedforward=sizes.decoder_hidden,
        encoder_layers=sizes.encoder_layers, decoder_layers=sizes.decoder_layers + 1, num_attention_heads=sizes.heads,
        num_queries=sizes.queries, num_labels=sizes.classes,
    )  # fmt: skip


def save(path: Path, weights: dict[str, Tensor], **options: Any) -> Path:
    torch.save({"meta": {"epoch": 50, "CLASSES": ("person",)}, "state_dict": OrderedDict(weights)}, path, **options)
    return path


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(TINY)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Any:
    path = save(tmp_path_factory.mktemp("weights") / "tiny.pth", weights)
    return load_network(str(path), config(TINY))[0].eval()


# Sides whose levels do not divide by the window, by 2, or by both: every padding happens. In fp64, so that no mask's
# edge is decided by rounding.
@pytest.mark.parametrize(("height", "width"), [(64, 96), (128, 160)])
def test_the_network_computes_what_mmdet_computes(
    weights: dict[str, Tensor], network: Any, height: int, width: int
) -> None:
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    double = {name: weight.double() if weight.is_floating_point() else weight for name, weight in weights.items()}
    with torch.inference_mode():
        classes, masks = mask2former(double, TINY, image)
        out = copy.deepcopy(network).double()(pixel_values=image)
    assert classes.std() > 0.1 and masks.std() > 0.1
    torch.testing.assert_close(out.class_queries_logits, classes, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(out.masks_queries_logits, masks, atol=1e-9, rtol=1e-9)


def test_every_weight_is_used_once_and_fills_the_network(network: Any) -> None:
    # Each element is a number of its own, so that one that were lost, doubled or made up would show.
    sizes = {name: math.prod(shape) for name, shape in shapes(TINY).items() if not name.endswith("position_index")}
    numbers = torch.arange(sum(sizes.values()), dtype=torch.float64).split(list(sizes.values()))
    weights = {name: part.view(shapes(TINY)[name]) for name, part in zip(sizes, numbers, strict=True)}
    converted = convert(weights)
    placed = torch.cat([weight.flatten() for weight in converted.values()])
    assert torch.equal(placed.sort().values, torch.cat(numbers))
    unused = {name: p.numel() for name, p in network.named_parameters() if "swin.layernorm" in name}
    assert placed.numel() == sum(p.numel() for p in network.parameters()) - sum(unused.values())
    assert set(unused.values()) == {8 * TINY.embed} and len(unused) == 2


def test_swin_s_has_the_weights_of_the_published_checkpoint() -> None:
    """69 million, as mmdet's model zoo says, all of them in the network of transformers."""
    expected = sum(math.prod(shape) for name, shape in shapes(Sizes()).items() if not name.endswith("position_index"))
    with torch.device("meta"):
        network = Mask2FormerForUniversalSegmentation(swin_s())
    assert sum(p.numel() for name, p in network.named_parameters() if "swin.layernorm" not in name) == expected
    assert round(expected / 1e6) == 69
    assert network.config.to_diff_dict() == config(Sizes()).to_diff_dict()


def test_positions_are_those_of_a_window() -> None:
    name = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
    assert convert({name: position_index(7)}) == {}
    with pytest.raises(UserError, match=r"stages\.0\.blocks\.0.*not the order of position biases"):
        convert({name: position_index(7).T})


def explode(*arguments: Any) -> Any:
    raise AssertionError("code in the file was run")


class Bomb:
    def __reduce__(self) -> Any:
        return explode, (1,)


@pytest.mark.parametrize("zipped", [True, False], ids=["new", "old"])
def test_a_file_is_read_and_nothing_in_it_is_run(tmp_path: Path, weights: dict[str, Tensor], zipped: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    content = {"meta": {"config": Bomb(), "size": Sizes()}, "state_dict": OrderedDict(weights), "optimizer": [Bomb()]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read(path)
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_what_is_no_such_checkpoint_is_said_in_one_sentence(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "checkpoint.pth"
    whole = save(path, weights).read_bytes()
    for content in (b"", b"<html>404</html>", whole[: len(whole) // 2], pickle.dumps(Bomb())):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint\.pth is no(t a)? checkpoint .+"):
            read(path)
    torch.save({"meta": 1}, path)
    with pytest.raises(UserError, match="has no state_dict"):
        read(path)
    torch.save({"state_dict": {**weights, "note": "text"}}, path)
    with pytest.raises(UserError, match=r"its note is no tensor \(str\)"):
        read(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights | {"bbox_head.fc.weight": torch.zeros(1)}, "weights of 'bbox_head.fc'"),
        (
            lambda weights: {k: v for k, v in weights.items() if "cls_embed.bias" not in k},
            "class_predictor.bias is miss",
        ),
        (
            lambda weights: weights | {"panoptic_head.cls_embed.bias": torch.zeros(134)},
            "class_predictor.bias.* is missing",
        ),
        (lambda weights: weights | {"backbone.norm3.scale": torch.zeros(64)}, "norms.stage4.scale is missing, unk"),
    ],
    ids=["other network", "missing", "other classes", "unknown"],
)
def test_weights_of_another_network_are_refused(
    tmp_path: Path, weights: dict[str, Tensor], change: Any, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        load_network(str(save(tmp_path / "other.pth", change(weights))), config(TINY))
