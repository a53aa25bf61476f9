"""Aspect-ratio buckets in a config: the tables, what they come to, and mistakes in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import parse

from data.filters import pixeldit_sizes, sdxl_sizes
from t2i.config.base import ConfigError
from t2i.config.loading import check_world_size, dump_config, load_config, stage_config, validate_config
from t2i.config.run import RunConfig
from t2i.plan.memory import StageMemory
from t2i.train.data import image_settings


def config(patch_size: int = 16, **data: Any) -> RunConfig:
    return validate_config({"model": {"patch_size": patch_size}, "data": data}, "here")


def test_without_buckets_nothing_is_grouped() -> None:
    data = config(resolution=(64, 32)).data
    assert (data.aspect_buckets, data.largest) == (None, (64, 32))
    assert (image_settings(data).buckets, image_settings(data).group_size) == (None, 1)


def test_the_tables_and_a_list() -> None:
    for name, table, side in (
        ("sdxl", sdxl_sizes, 512),
        ("sdxl", sdxl_sizes, 1024),
        ("pixeldit", pixeldit_sizes, 1024),
    ):
        buckets = config(resolution=side, buckets=name, group_size=4).data.aspect_buckets
        assert buckets is not None and (buckets.sizes, buckets.group_size) == (table(side), 4)
    data = config(resolution=64, buckets=[[32, 96], [64, 64]]).data
    images = image_settings(data)
    assert images.buckets is not None and images.buckets.sizes == ((32, 96), (64, 64)) and images.group_size == 8


def test_the_largest_bucket_counts_for_memory() -> None:
    assert config(resolution=1024, buckets="sdxl").data.largest in sdxl_sizes(1024)
    height, width = config(resolution=1024, buckets="sdxl").data.largest
    assert height * width == 1024**2
    assert config(resolution=1024, buckets="pixeldit").data.largest == (896, 1344)


def memory(**data: Any) -> StageMemory:
    networks = {"lpips_network": "efficientnet-lite0", "features_network": "efficientnet-lite0"}
    model = {"condition": "class", "width": 64, "depth": 2, "heads": 2, "repa_layer": 1, "context_start": 1}
    return StageMemory.of(validate_config({"model": model, "objective": networks, "data": data}, "here"), 1, 4)


def test_a_plan_is_of_the_largest_bucket() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")
    square, large = memory(resolution=64), memory(resolution=[96, 128])
    found = memory(resolution=64, buckets=[[64, 64], [96, 128], [32, 64]])
    assert found.activations(2, False) == large.activations(2, False) != square.activations(2, False)
    assert (found.distance, found.features, found.cost) == (large.distance, large.features, large.cost)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"buckets": "sdlx"}, ["data.buckets", "none, sdxl, pixeldit or a list of [height, width]", "got 'sdlx'"]),
        ({"buckets": 7}, ["data.buckets", "a list of [height, width]", "got 7"]),
        ({"buckets": [64, 64]}, ["data.buckets", "a list of [height, width]"]),
        ({"buckets": [[64, 64, 3]]}, ["data.buckets", "a list of [height, width]"]),
        ({"buckets": [[64, 64.5]]}, ["data.buckets", "whole numbers"]),
        ({"buckets": [[64, True]]}, ["data", "buckets must hold numbers, not true"]),
        ({"buckets": []}, ["data", "buckets []", "name at least one"]),
        ({"buckets": [[64, 0]]}, ["data", "buckets [[64, 0]]", "name at least one"]),
        ({"buckets": [[64, 64], [32, 32]]}, ["data", "[64, 64] and [32, 32] have the same ratio"]),
        ({"buckets": [[64, 72]]}, ["data.buckets", "64x72", "multiple of model.patch_size (16)"]),
        ({"buckets": "sdxl", "resolution": 128}, ["data.buckets", "must be a multiple of model.patch_size (16)"]),
        ({"buckets": "sdxl", "resolution": 1000}, ["resolution 1000", "multiple of 16", "sdxl"]),
        ({"buckets": "pixeldit", "resolution": 528}, ["resolution 528", "multiple of 64", "pixeldit"]),
        ({"buckets": "pixeldit", "resolution": 512}, ["data.buckets", "376x672", "model.patch_size (16)"]),
        ({"buckets": "sdxl", "resolution": [512, 256]}, ["data", "resolution 512x256 should be one side"]),
        ({"buckets": "sdxl", "resolution": 512, "crop": "adm"}, ["data", "crop adm makes squares", "buckets to none"]),
        ({"group_size": 4}, ["data", "group_size 4 does nothing under buckets none: leave it at 8"]),
        ({"buckets": "sdxl", "resolution": 512, "group_size": 0}, ["data.group_size", "greater than 0"]),
    ],
)
def test_mistakes(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**data)
    message = str(caught.value)
    assert message.startswith("here: ") and "\n" not in message
    assert [word for word in words if word not in message] == []


def sized(micro: int, batch: int = 64, group_size: int = 8) -> RunConfig:
    data = {"lanes": 8, "buckets": [[64, 64]], "resolution": 64, "group_size": group_size}
    return validate_config({"data": data, "train": {"batch_size": batch, "micro_batch_size": micro}}, "here")


def test_groups_divide_into_micro_batches_and_lanes_into_groups() -> None:
    for micro in (1, 2, 4, 8):
        check_world_size(sized(micro), 4, "stage x")
    with pytest.raises(ConfigError, match=r"stage x: train.micro_batch_size 16 .* data.group_size 8, .*; 8 would"):
        check_world_size(sized(16, batch=128), 2, "stage x")
    with pytest.raises(ConfigError, match=r"micro_batch_size 4 .* data.group_size 6, .*; 3 would"):
        check_world_size(sized(4, batch=96, group_size=6), 2, "stage x")
    with pytest.raises(
        ConfigError, match="train.batch_size 72 is no multiple of data.lanes 8 x data.group_size 8: .* 64 or 128"
    ):
        check_world_size(sized(8, batch=72), 2, "stage x")


def test_files_stages_and_the_command_line_have_them(tmp_path: Path) -> None:
    tree = {
        "data": {"resolution": 512},
        "stages": [
            {"name": "squares"},
            {"name": "shapes", "data": {"buckets": "sdxl", "group_size": 4}},
            {"name": "own", "data": {"buckets": [[64, 32], [48, 48]]}},
        ],
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    run = load_config(path)
    assert [stage_config(run, n).data.buckets for n in range(3)] == ["none", "sdxl", [(64, 32), (48, 48)]]
    path.write_text(dump_config(run))
    assert load_config(path) == run
    for words, expected in (("sdxl", "sdxl"), ("[[64,32],[48,48]]", [(64, 32), (48, 48)])):
        assert stage_config(parse("", str(path), ["--data.buckets", words]), 0).data.buckets == expected
