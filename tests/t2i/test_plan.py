"""The planner says what the paper's table, real tensors and real engines say."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from t2i.config.base import ConfigError
from t2i.config.loading import load_config, override, stage_config, validate_config
from t2i.config.run import ObjectiveConfig, RunConfig
from t2i.plan.choice import USABLE, Assumptions
from t2i.plan.command import plan, tables
from t2i.plan.counts import Trained, text_encoder, ungated_fraction
from t2i.plan.memory import (
    BUCKET,
    ENGINES,
    FP32,
    Engine,
    StageMemory,
    find_gpu,
    reference_static_memory,
    static_memory,
    total,
)
from t2i.plan.meta import META, FusedKernels, saved_bytes
from t2i.train.build import denoiser_training_flops
from t2i.train.step import training_times

XXL = Path("configs/pixelgen_xxl.yaml")
NETWORK = Trained(
    image_blocks=800, text_blocks=160, pixel_blocks=0, rest=40, projector=24, by_muon=640, block=100, small=0
)


def xxl() -> RunConfig:
    return load_config(XXL)


def given(gpus: int = 8, gpu: str = "h800", reference: bool = False) -> Assumptions:
    return Assumptions.from_config(gpus, gpu, 0.22, 100_000, reference)


@pytest.fixture(scope="module")
def ours() -> dict:
    return plan(xxl(), given())


@pytest.fixture(scope="module")
def reference() -> dict:
    return plan(xxl(), given(reference=True))


# Parameters and FLOPs


def test_parameters_are_the_public_models(ours) -> None:
    counted = ours["stages"][0]["parameters"]
    assert counted["denoiser"] == 1_121_739_520
    assert counted["of which image blocks"] == 16 * 56_637_056
    assert counted["of which text refiner"] == 4 * 51_918_464
    assert sum(n for name, n in counted.items() if name.startswith("of which")) == counted["denoiser"]
    assert counted["trained"] == counted["denoiser"] + counted["projector"]
    assert counted["projector"] == 2 * (1536 * 1536 + 1536) + 1536 * 768 + 768
    # Of the published weights: Qwen3-1.7B, LPIPS with VGG16's convolutions, DINOv2-B/14.
    assert counted["frozen"] == {"Qwen/Qwen3-1.7B": 1_720_574_976, "LPIPS, VGG16": 14_716_160, "DINOv2": 86_580_480}


@pytest.mark.parametrize(
    ("stage", "gmac"),
    [
        (0, {"denoiser": 569, "text encoder": 182.3, "dino, predicted": 46.3, "lpips, predicted": 40.1}
         | {"dino, clean": 23.15, "lpips, clean": 20.05, "projector": 4.53, "total": 886}),
        (1, {"denoiser": 2124, "text encoder": 182.3, "dino, predicted": 213.8, "lpips, predicted": 160.4}
         | {"dino, clean": 106.9, "lpips, clean": 80.2, "projector": 18.1, "total": 2886}),
    ],
)  # fmt: skip
def test_reference_flops_are_those_counted_of_the_public_code(reference, stage: int, gmac: dict[str, float]) -> None:
    counted = {name: flops / 2e9 for name, flops in reference["stages"][stage]["flops_per_image"].items()}
    assert counted == pytest.approx(gmac, rel=0.01)
    assert counted["total"] == pytest.approx(sum(counted.values()) - counted["total"])
    assert reference["stages"][stage]["forward_flops"]["text blocks"] / 2e9 == pytest.approx(19.6, rel=0.01)


def test_a_rectangle_costs_what_a_square_of_as_many_pixels_does() -> None:
    config = xxl().model_copy(update={"stages": xxl().stages[:1]})
    expected, found = (
        plan(override(config, {"data": {"resolution": resolution}}), given())["stages"][0]
        for resolution in (256, [128, 512])
    )
    assert (expected["resolution"], found["resolution"]) == (256, (128, 512))
    assert found["flops_per_image"]["denoiser"] == expected["flops_per_image"]["denoiser"]
    assert found["flops_per_image"]["total"] == pytest.approx(expected["flops_per_image"]["total"], rel=1e-3)
    for name in ("activation_bytes", "data", "static_bytes"):
        assert found[name] == expected[name]


def test_the_gate_saves_what_it_saves(ours, reference) -> None:
    for stage, saving in ((0, 0.057), (1, 0.075)):
        gated, whole = (item["stages"][stage]["flops_per_image"]["total"] for item in (ours, reference))
        assert 1 - gated / whole == pytest.approx(saving, abs=5e-4)
        # REPA aligns every sample with the clean image's features.
        clean = [item["stages"][stage]["flops_per_image"]["dino, clean"] for item in (ours, reference)]
        assert clean[0] == clean[1]


def test_the_blocks_are_the_denoisers_forward_but_for_its_ends(ours) -> None:
    config = stage_config(xxl(), 0)
    forward = denoiser_training_flops(config, 2048) / 3
    tokens = 256
    ends = 2 * (tokens * (768 * 256 + 256 * 1536 + 1536 * 768) + 128 * 2048 * 1536 + 256 * 1536 + 1536 * 1536)
    assert ours["stages"][0]["recomputed_flops"]["checkpointed"] + ends == pytest.approx(forward, rel=1e-6)


@pytest.mark.parametrize("gate", [0.0, 0.1, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_share_over_the_gate_is_that_of_the_training_times(gate: float, shift: float) -> None:
    objective = ObjectiveConfig(perceptual_t_min=gate, shift=shift)
    times = training_times(objective, (np.arange(200_000) + 0.5) / 200_000)
    assert ungated_fraction(objective) == pytest.approx((times >= gate).mean(), abs=1e-5)


def test_share_over_the_gate_of_the_public_recipe() -> None:
    assert 1 - ungated_fraction(ObjectiveConfig()) == pytest.approx(0.476, abs=5e-4)


def test_without_its_gate_pdino_compares_all_samples(ours) -> None:
    ungated = plan(override(xxl(), {"objective": {"pdino_gate": "none"}}), given())["stages"][0]
    masked, none = (stage["flops_per_image"] for stage in (ours["stages"][0], ungated))
    assert {name for name in none if none[name] != masked[name]} == {"dino, predicted", "total"}
    assert masked["dino, predicted"] == pytest.approx(ungated["over_gate"] * none["dino, predicted"])


# Time


def test_six_days_on_8_h800(reference) -> None:
    assert reference["total"]["days"] == pytest.approx(6.0, rel=0.01)
    assert reference["total"]["flops"] == pytest.approx(9.0e20, rel=0.01)
    assert reference["total"]["images"] == 200_000 * 1536 + 120_000 * 512
    a_gpu = [stage["time"]["images_per_s"] / 8 for stage in reference["stages"]]
    assert a_gpu == pytest.approx([122, 38, 38], rel=0.015)


def test_totals_are_sums_and_days_are_images_over_rate(ours) -> None:
    times = [stage["time"] for stage in ours["stages"]]
    for name in ("days", "gpu_hours", "flops", "images"):
        assert ours["total"][name] == pytest.approx(sum(time[name] for time in times))
    for time in times:
        assert time["days"] * 86400 * time["images_per_s"] == pytest.approx(time["images"])
        assert time["gpu_hours"] == pytest.approx(time["days"] * 24 * 8)
        assert time["flops"] == pytest.approx(0.22 * 989e12 * time["gpu_hours"] * 3600)


def test_bandwidth_and_read_ahead(ours) -> None:
    first = ours["stages"][0]
    assert first["data"]["bytes_per_s"] == pytest.approx(100_000 * first["time"]["images_per_s"])
    # The config's own comment: 16 lanes x 3 sources x 4096 samples of 100 KB are 19 GB.
    assert first["data"]["read_ahead_bytes_a_rank"] == 16 * 3 * 4096 * 100_000
    assert first["data"]["decoded_bytes_a_rank"] == 3 * 192 * 3 * 256**2


def test_storage(ours) -> None:
    for stage in ours["stages"]:
        assert stage["storage"]["checkpoint_bytes"] == 16 * stage["parameters"]["trained"]
    one = ours["stages"][0]["storage"]
    assert (
        ours["total"]["disk_bytes"] == 3 * (2 * one["checkpoint_bytes"] + one["model_bytes"]) + one["checkpoint_bytes"]
    )


# Static memory


@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_static_memory_identities(dtype_bytes: int) -> None:
    frozen = {"text encoder": 1000}
    one, four = (
        {engine: static_memory(engine, ranks, NETWORK, frozen, dtype_bytes) for engine in ENGINES} for ranks in (1, 4)
    )
    whole = total(frozen) + dtype_bytes * NETWORK.denoiser
    for engine in ("zero3", "fsdp2"):
        assert total(four[engine]) - whole == (total(one[engine]) - whole) // 4
    assert one["zero0"] == four["zero0"]
    sharded: dict[Engine, set[str]] = {
        "zero1": {"masters", "moments", "ema"},
        "zero2": {"masters", "moments", "ema", "gradients"},
    }
    for engine, names in sharded.items():
        for name, size in one[engine].items():
            assert four[engine][name] == (size // 4 if name in names else size)
    sizes = [total(four[engine]) for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp2")]
    assert sizes == sorted(sizes, reverse=True)
    # AdamW's two moments, and Muon's one.
    assert one["zero1"]["moments"] == 8 * (NETWORK.total - 640) + 4 * 640


def test_the_public_code_holds_24_bytes_a_parameter(reference) -> None:
    assert total(reference_static_memory(NETWORK, {})) == 24 * NETWORK.total
    ddp = reference["stages"][0]["static_bytes"]["ddp"]
    assert (ddp["total"] - ddp["text encoder"] - ddp["perceptual networks"]) / 2**30 == pytest.approx(25, rel=0.01)
    assert ddp["text encoder"] / 1e9 == pytest.approx(3.4, rel=0.02)
    assert ddp["perceptual networks"] / 1e9 == pytest.approx(0.4, rel=0.02)


@pytest.mark.parametrize("ranks", [1, 2])
def test_static_memory_is_what_the_engines_hold_of_the_demos_model(launch, tmp_path, ranks: int) -> None:
    tree = stage_config(load_config(Path("configs/demo.yaml")), 0).model_dump(mode="json")
    tree["text"]["cache"] = 40
    # Two micro-steps of small pictures: what is held does not depend on it.
    tree["train"] |= {"batch_size": 2 * ranks, "micro_batch_size": 1}
    tree["data"] |= {"resolution": 8, "lanes": ranks, "sources": []}
    (tmp_path / "stage.json").write_text(json.dumps(tree))
    measured = launch(Path(__file__).parent / "plan_worker.py", ranks, str(tmp_path / "stage.json"))
    assert len(measured) == 2 * len(ENGINES)
    for name, found in measured.items():
        engine, dtype = name.split()
        memory = StageMemory.of(validate_config(tree, "test"), ranks, 2 if dtype == "bf16" else 4)
        predicted = memory.static(engine)
        assert found.pop("bucket") in (0, FP32 * BUCKET), name  # it comes and goes
        assert found.keys() == predicted.keys()
        assert total(found) == pytest.approx(total(predicted), rel=0.05), name
        for part, size in predicted.items():
            # In fp32, ZeRO-2's gradients are of whole tensors, also of one that two ranks share.
            rel = 0.1 if part == "gradients" else 0.01
            assert found[part] == pytest.approx(size, rel=rel), (name, part)


# Activations


def test_a_frozen_transformer_keeps_on_the_meta_device_what_it_keeps_for_real() -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14)
    kept = []
    for device in (torch.device("cpu"), META):
        with device:
            net = Dinov2Model(config).eval().requires_grad_(False)
            image = torch.zeros(2, 3, 56, 56, requires_grad=True)
        with FusedKernels() if device == META else mock.MagicMock():
            kept.append(saved_bytes(lambda net=net, image=image: net(image), net))
    assert kept[1] == pytest.approx(kept[0], rel=0.02)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block(ours) -> None:
    kept = ours["stages"][0]["activation_bytes"]
    assert kept["checkpointed"]["image blocks"] == 64 * 16 * 256 * 1536 * 2
    assert kept["checkpointed"]["text blocks"] == 64 * 4 * 128 * 1536 * 2
    assert kept["checkpointed"]["ends and projector"] == kept["plain"]["ends and projector"]
    assert kept["checkpointed"]["total"] < kept["plain"]["total"] / 2
    # 512 px at a quarter of the micro-batch has as many image tokens, but fewer text tokens.
    other = ours["stages"][1]["activation_bytes"]["plain"]
    assert other["image blocks"] < kept["plain"]["image blocks"] < 1.1 * other["image blocks"]


# Recommendation


def test_the_recommendation_fits_and_the_next_size_does_not(ours) -> None:
    budget = USABLE * 79 * 2**30
    for stage in ours["stages"]:
        chosen = stage["recommended"]
        assert chosen in stage["options"] and 0 < chosen["bytes"] <= budget
        assert (stage["batch_size"] // 8) % chosen["micro_batch_size"] == 0
        assert (
            f"{'fits' if chosen['micro_batch_size'] >= stage['micro_batch_size'] else 'does not fit'} into"
            in " ".join(stage["advice"])
        )
        for option in stage["options"]:
            assert option["bytes"] <= budget


def sizes_by_option(found: dict) -> list[int]:
    return [option["micro_batch_size"] for stage in found["stages"] for option in stage["options"]]


def test_more_memory_or_more_ranks_hold_more() -> None:
    config = validate_config({**xxl().model_dump(), "stages": xxl().stages[1:2]}, "test")
    small, large, many = (plan(config, given(*item)) for item in ((8, "l40s"), (8, "h200"), (16, "l40s")))
    pairs = list(zip(sizes_by_option(small), sizes_by_option(large), strict=True))
    assert all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
    for engine in ("zero1", "zero2", "zero3", "fsdp2"):
        few, more = (item["stages"][0]["static_bytes"][engine]["total"] for item in (small, many))
        assert more < few
    # On 23.5 GiB it takes checkpointing, which costs the blocks' forward again.
    stage = plan(config, given(gpu="4090"))["stages"][0]
    assert stage["recommended"]["checkpointing"]
    flops = stage["flops_per_image"]["total"] + stage["recomputed_flops"]["checkpointed"]
    assert stage["time"]["images_per_s"] == pytest.approx(8 * 165e12 * 0.22 / flops)


def test_what_fits_nowhere_is_said() -> None:
    tree = xxl().model_dump()
    tree["model"] |= {"width": 6144, "heads": 96, "depth": 40, "repa_layer": 20}
    stage = plan(validate_config({**tree, "stages": tree["stages"][:1]}, "test"), given(gpu="4090"))["stages"][0]
    assert stage["recommended"] is None
    assert any("nothing fits" in sentence for sentence in stage["advice"])


# Words


def test_a_plan_is_json_and_tables(ours) -> None:
    assert json.loads(json.dumps(ours)) == ours
    text = tables(ours)
    assert "1,121,739,520" in text and "pretrain512, sft512: static" in text
    assert all(len(line) < 260 for line in text.splitlines())
    for kind in ("counted", "derived", "assumed"):
        assert kind in text


@pytest.mark.parametrize(
    ("device", "model"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40", None),
    ],
)
def test_devices_are_found_by_whole_words(device: str, model: str | None) -> None:
    gpu = find_gpu(device)
    assert (gpu.name if gpu else None) == model


@pytest.mark.parametrize("name", ["google/gemma-2-2b-it", "Efficient-Large-Model/gemma-2-2b-it"])
def test_gemma_is_known(name: str) -> None:
    counted = text_encoder(RunConfig.model_validate({"text": {"model": name, "length": 300}}))
    assert counted is not None and (counted.parameters, counted.width) == (2_614_341_888, 2304)
    # A token: queries and output 2304 x 2048, keys and values 2304 x 1024, three products of 2304 x 9216, in 26 layers;
    # and the attention of all 300 to all, in 8 heads of 256.
    products = 26 * (2 * 2304 * 2048 + 2 * 2304 * 1024 + 3 * 2304 * 9216)
    assert counted.forward_flops == 2 * 300 * (products + 26 * 2 * 300 * 8 * 256)


def test_an_unknown_text_model_is_named() -> None:
    config = RunConfig.model_validate({"text": {"model": "nobody/nothing"}})
    with pytest.raises(ConfigError, match=r"text.model 'nobody/nothing': its configuration is not on this machine"):
        text_encoder(config)


def test_fp32_is_four_bytes() -> None:
    assert torch.float32.itemsize == FP32
