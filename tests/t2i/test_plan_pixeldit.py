"""The plan of PixelDiT: the paper's sizes, what its pixel blocks keep, and what recomputing them alone saves."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from t2i.config.loading import stage_config, validate_config
from t2i.config.run import RunConfig
from t2i.plan.choice import Assumptions, PlannedStage, recommend
from t2i.plan.command import plan, tables
from t2i.plan.memory import StageMemory
from t2i.train.preflight import estimate, remedy

MIB = 2**20
GIVEN = Assumptions.from_config(8, "h100", 0.22, 100_000, False)
XL: dict[str, Any] = {"family": "pixeldit", "condition": "class", "prediction": "velocity", "repa_layer": 8}
XL |= {"patch_size": 16, "width": 1152, "depth": 26, "heads": 16, "pixel": {"depth": 4}}
TEXT: dict[str, Any] = {"family": "pixeldit", "prediction": "velocity", "repa_layer": 6, "repa_width": 2048}
TEXT |= {"width": 1536, "depth": 14, "heads": 24}
TEXT |= {"pixel": {"depth": 2, "attention_width": 1152, "attention_heads": 16}}
SHALLOW = {**XL, "depth": 1, "repa_layer": 1, "pixel": {"depth": 1}}


def config(model: dict[str, Any], resolution: int = 256, **sections: Any) -> RunConfig:
    tree = {
        "model": model,
        "data": {"resolution": resolution},
        "text": {"length": 300},
        "objective": {"lpips_weight": 0, "pdino_weight": 0, **sections.pop("objective", {})},
        "train": {"batch_size": 768, "micro_batch_size": 3},
        "stages": [{"name": "only"}],
    }
    return validate_config({**tree, **sections}, "test")


def only(found: dict[str, Any]) -> dict[str, Any]:
    (stage,) = found["stages"]
    return stage


@pytest.fixture(scope="module")
def megapixel() -> dict[str, Any]:
    return plan(config(TEXT, 1024, objective={"repa_grid": 16}), GIVEN)


def test_the_papers_xl() -> None:
    found = plan(config(XL), GIVEN)
    stage = only(found)
    counted = stage["parameters"]
    assert counted["denoiser"] == 797_383_203
    assert counted["of which image blocks"] == 26 * 23_898_384
    assert counted["of which pixel blocks"] == 4 * 43_090_432
    assert counted["of which embeddings and head"] == 3_663_424 + 67
    assert counted["of which text refiner"] == 0 and counted["projector"] == 2 * (1152**2 + 1152) + 1152 * 768 + 768
    forward = stage["forward_flops"]
    assert all(isinstance(flops, int) for flops in forward.values())
    assert forward["total"] == 311_194_255_360  # 311.19 GFLOPs in Table 16
    assert forward["total"] == sum(forward.values()) - forward["total"]
    assert stage["flops_per_image"]["denoiser"] == 3 * forward["total"]
    assert stage["recomputed_flops"]["pixel checkpointed"] == forward["pixel blocks"]
    assert round(forward["image blocks"] / 1e9) == 220 and round(forward["pixel blocks"] / 1e9, 1) == 90.5
    assert json.loads(json.dumps(found)) == found
    text = tables(found)
    assert "pixel checkpointed" in text and "text refiner" not in text and "text blocks" not in text


@pytest.mark.parametrize(("side", "theta"), [(256, 12), (512, 48), (1024, 192)])
def test_the_largest_tensor_of_a_pixel_block_is_its_modulation(side: int, theta: int) -> None:
    cost = StageMemory.of(stage_config(config(SHALLOW, side, objective={"repa_weight": 0}), 0), 8, 2).cost
    pixels = cost.blocks[-1]
    assert pixels.part == "pixel blocks"
    assert cost.largest == pixels.largest == theta * MIB
    assert pixels.kept > theta * MIB + 3 * side**2 * 64 * 2  # and of the MLP what enters GELU and what leaves it
    patchwise = {**SHALLOW, "pixel": {"depth": 1, "modulation": "patch"}}
    without = StageMemory.of(stage_config(config(patchwise, side, objective={"repa_weight": 0}), 0), 8, 2).cost
    assert pixels.kept - without.blocks[-1].kept > theta * MIB


def test_a_megapixel_from_text(megapixel: dict[str, Any]) -> None:
    stage = only(megapixel)
    counted = stage["parameters"]
    # The public core less what its last block has of the text's queries, result and MLP, at our encoder's width.
    tail = 2 * 1536**2 + 64 + 1536 + 3 * 1536 * 4096 + 1536 + 4 * (1536**2 + 1536)
    assert counted["denoiser"] == 1_302_470_787 - tail - (2304 - 2048) * 1536
    assert counted["projector"] == 8_917_760
    assert counted["of which pixel blocks"] == 2 * 52_527_616
    assert stage["micro_batch_size"] == 3
    plain = stage["activation_bytes"]["plain"]
    assert plain["pixel blocks"] > 3 * 2 * 192 * MIB
    assert stage["activation_bytes"]["pixel checkpointed"]["pixel blocks"] == 3 * 2 * 32 * MIB


def test_each_way_of_checkpointing_keeps_less_and_computes_more(megapixel: dict[str, Any]) -> None:
    stage = only(megapixel)
    totals = [kept["total"] for kept in stage["activation_bytes"].values()]
    assert list(stage["activation_bytes"]) == ["plain", "pixel checkpointed", "checkpointed"]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 3
    sizes = {(item["engine"], item["checkpointing"]): item["micro_batch_size"] for item in stage["options"]}
    for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp2"):
        plain, pixel, whole = (sizes[engine, item] for item in (False, "pixel", True))
        assert plain <= pixel <= whole and plain < whole
    recomputed = stage["recomputed_flops"]
    assert 0 < recomputed["pixel checkpointed"] < recomputed["checkpointed"] < stage["forward_flops"]["total"]


def test_pixel_blocks_alone_are_recomputed_before_all_are() -> None:
    stage = PlannedStage.of(config(SHALLOW), 0, GIVEN)
    options = stage.options()[::-1]

    def chosen(*full: object) -> object:
        found = recommend(
            stage, [replace(item, micro_batch_size=0) if item.checkpointing in full else item for item in options]
        )
        return found.checkpointing if found is not None else None

    assert chosen() is False
    assert chosen(False) == "pixel"
    assert chosen(False, "pixel") is True
    assert chosen(False, "pixel", True) is None
    paces = [stage.images_per_s(item) for item in (False, "pixel", True)]
    assert paces == sorted(paces, reverse=True) and len(set(paces)) == 3


def test_alignment_on_a_grid_of_its_own_costs_the_same_at_any_size(megapixel: dict[str, Any]) -> None:
    def dino(side: int, **objective: Any) -> dict[str, float]:
        found = only(plan(config({**SHALLOW, "prediction": "image"}, side, objective=objective), GIVEN))
        return {name: flops for name, flops in found["flops_per_image"].items() if "dino" in name}

    of_256 = dino(256)["dino, clean"]
    assert dino(512, repa_grid=16)["dino, clean"] == of_256 == dino(256, repa_grid=16)["dino, clean"]
    assert only(megapixel)["flops_per_image"]["dino, clean"] == of_256 < dino(512)["dino, clean"] / 4
    # P-DINO compares on the model's grid, and the clean features there serve alignment no more.
    own, shared = dino(512, repa_grid=16, pdino_weight=0.01), dino(512, pdino_weight=0.01)
    assert own["dino, predicted"] == shared["dino, predicted"] > 0
    assert own["dino, clean"] == pytest.approx(own["dino, predicted"] / 2 + of_256)


def test_a_stage_is_told_of_pixel_blocks() -> None:
    def of(activation_checkpointing: bool | str) -> RunConfig:
        model = {**SHALLOW, "depth": 3, "pixel": {"depth": 3}}
        train = {"batch_size": 768, "micro_batch_size": 32}
        return stage_config(
            config(model, train=train, engine={"activation_checkpointing": activation_checkpointing}), 0
        )

    plain, pixel, whole = (estimate(of(item), 8, torch.bfloat16) for item in (False, "pixel", True))
    assert whole.expected < pixel.expected < plain.expected and whole.least < pixel.least < plain.least
    said = [remedy(of(item)) for item in (False, "pixel", True)]
    assert (
        "engine.activation_checkpointing to pixel" in said[0] and "engine.activation_checkpointing to true" in said[1]
    )
    assert "activation_checkpointing" not in said[2]
