"""The first minute finds what would end a run later, and refuses nothing that would run."""

from __future__ import annotations

import errno
import json
import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from tiny import tiny_config

from data.errors import DataError, StoreError, UserError
from data.loader import Batch
from data.randomness import key, uniform
from t2i.config.base import ConfigError
from t2i.config.loading import load_config, stage_config, validate_config
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.engine.checkpoint.format import MANIFEST, folder_name
from t2i.plan.counts import ungated_fraction
from t2i.plan.memory import CONTEXT_BYTES, StageMemory, total, ungated_samples
from t2i.train import preflight
from t2i.train.data import open_data
from t2i.train.preflight import (
    Estimate,
    check_memory,
    check_mirror,
    check_reach,
    check_room,
    check_start,
    check_writable,
    device_bytes,
    dry_run,
    estimate,
    free_bytes,
    leftover_bytes,
    made_up_batch,
    remedy,
)
from t2i.train.run_dir import stage_places
from t2i.train.step import training_times

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
GIB = 2**30


def tiny(scenes: Path, root: Path, **changes) -> RunConfig:
    return validate_config(tiny_config(scenes, root, **changes), "test")


def plain(**changes) -> RunConfig:
    return RunConfig.model_validate(changes)


# Data


def test_more_validation_samples_than_are_held_out_are_refused_by_field_and_source(scenes: Path, tmp_path) -> None:
    config = tiny(scenes, tmp_path, validation={"every": 4, "samples": 17})
    with pytest.raises(
        ConfigError,
        match=r"^validation.samples 17 are more than the 16 .* held out of source 'shapes' in .*: lower it to",
    ):
        open_data(config, "low", {})
    open_data(tiny(scenes, tmp_path, validation={"every": 4, "samples": 16}), "low", {})


# Disk


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path) -> None:
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=f"root {tmp_path}: .*absent cannot be written to: No such file"):
        check_writable(tmp_path / "absent")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="cannot be written to: No space left"):
            check_writable(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: bytes(16))
        with pytest.raises(UserError, match="does not come back"):
            check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "present", "needed"),
    [(100, [], 3), (20, [], 2), (10, [], 1), (100, [10], 2), (100, [80, 90], 1), (100, [90, 95, 96], 0)]
    + [(90, [80, 90], 0)],
)  # fmt: skip
def test_room_is_needed_for_the_checkpoints_that_come(tmp_path, steps: int, present: list[int], needed: int) -> None:
    config = plain(
        root=tmp_path,
        train={"steps": steps},
        checkpoint={"every": 10, "keep": 2},
        stages=[{"name": "only"}],
    )
    place = stage_places(config)[0]
    for step in present:
        (place.checkpoints / folder_name(step)).mkdir(parents=True)
        (place.checkpoints / folder_name(step) / MANIFEST).touch()
    check_room(config, place, GIB, needed * GIB)
    if needed:
        with pytest.raises(UserError, match=rf"root {tmp_path}: .* need {needed} GiB \(checkpoint.keep 2"):
            check_room(config, place, GIB, needed * GIB - 1)


def test_what_a_killed_save_left_counts_as_room(tmp_path) -> None:
    place = stage_places(plain(root=tmp_path, stages=[{"name": "only"}]))[0]
    assert leftover_bytes(place) == 0
    for name in (".step_00000030.0123abcd-0.3", ".step_00000020.dropped", "step_00000010"):
        (place.checkpoints / name).mkdir(parents=True)
        (place.checkpoints / name / "rank_00000.safetensors").write_bytes(bytes(1000))
    assert leftover_bytes(place) == 2000  # the first save of the next start removes them


def test_a_file_system_that_does_not_say_how_large_it_is_has_room(tmp_path, monkeypatch) -> None:
    assert 0 < free_bytes(tmp_path) < 2**60
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(0, 0, 0))
    assert free_bytes(tmp_path) == float("inf")


# Mirror


def test_a_directory_as_mirror(tmp_path) -> None:
    assert check_mirror(plain()) is None
    assert check_mirror(plain(checkpoint={"mirror": str(tmp_path)})) is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=f"checkpoint.mirror {tmp_path}/absent is not a directory"):
        check_mirror(plain(checkpoint={"mirror": f"{tmp_path}/absent"}))


def test_a_bucket_as_mirror(endpoint, monkeypatch) -> None:
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="copies")
    settings = {"mirror": "s3://copies/here", "mirror_endpoint": endpoint}
    assert check_mirror(plain(checkpoint=settings)) is None
    assert client.list_objects_v2(Bucket="copies")["KeyCount"] == 0
    with pytest.raises(ConfigError, match=r"checkpoint.mirror s3://absent/here: writing .*\(NoSuchBucket\).*endpoint$"):
        check_mirror(plain(checkpoint=settings | {"mirror": "s3://absent/here"}))
    with pytest.raises(ConfigError, match=r"checkpoint.mirror s3://copies/here: .*profile"):
        check_mirror(plain(checkpoint=settings | {"mirror_profile": "nobody"}))
    monkeypatch.setattr(preflight, "MIRROR_MINUTES", 0.0)
    notice = check_mirror(plain(checkpoint=settings | {"mirror_endpoint": "http://127.0.0.1:9"}))
    assert notice is not None and notice.startswith("checkpoint.mirror s3://copies/here does not answer")


def test_a_mirror_that_may_not_be_written_or_loses_content_is_refused(tmp_path, monkeypatch) -> None:
    config = plain(checkpoint={"mirror": str(tmp_path)})
    store = type(preflight.open_store(str(tmp_path)))
    with monkeypatch.context() as patch:
        patch.setattr(store, "read", lambda *_: b"")
        with pytest.raises(ConfigError, match="does not come back"):
            check_mirror(config)

    def refuse(*_: object) -> None:
        raise DataError("deleting it was refused (AccessDenied)")

    monkeypatch.setattr(store, "delete", refuse)
    with pytest.raises(ConfigError, match=rf"checkpoint.mirror {tmp_path}: deleting it was refused"):
        check_mirror(config)


# Data


def test_every_source_is_read(scenes, tmp_path) -> None:
    config = stage_config(tiny(scenes, tmp_path), 0)
    index = open_data(config, "low", {}).sources[0].index
    read = []

    class Spy:
        url = index.store.url

        def read(self, *arguments, **options):
            read.append(arguments)
            return index.store.read(*arguments, **options)

    check_reach([replace(index, store=Spy())], ALONE)
    offsets = index.offsets(0)
    assert read == [(index.names[0], offsets[0], offsets[1])]


def test_a_rank_that_does_not_reach_a_source_is_named(scenes, tmp_path) -> None:
    config = stage_config(tiny(scenes, tmp_path), 0)
    index = open_data(config, "low", {}).sources[0].index
    with pytest.raises(UserError, match=r"^rank 0 on .*changed since it was indexed"):
        check_reach([replace(index, versions=("other", *index.versions[1:]))], ALONE)

    class Two(World):
        def gather(self, item):
            return [item, StoreError("rank 1 on there: no")]

    with pytest.raises(StoreError, match="rank 1 on there"):
        check_reach([index], Two(0, 2, CPU))


# Memory


def test_what_cannot_fit_is_refused_and_what_may_not_is_noted() -> None:
    found = Estimate(least=4 * GIB, expected=9 * GIB, checkpoint=0)
    assert check_memory(plain(), "low", found, 11 * GIB) is None
    notice = check_memory(plain(), "low", found, 9 * GIB)
    assert notice is not None and "up to 9 GiB are expected, and a rank has 9 GiB" in notice
    assert check_memory(plain(), "low", found, 4 * GIB) is not None
    with pytest.raises(UserError, match=r"stage low needs 4 GiB .* a rank has 3.5 GiB: raise engine.zero_stage \(1\)"):
        check_memory(plain(), "low", found, 7 * GIB // 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, {"engine.zero_stage (1)", "engine.name", "train.micro_batch_size (64)", "engine.activation_checkpointing"}),
        ({"engine": {"zero_stage": 3, "activation_checkpointing": True}}, {"train.micro_batch_size (64)"}),
        ({"engine": {"name": "fsdp", "dp_replicate": 2}, "train": {"micro_batch_size": 1}},
         {"engine.dp_replicate (2)", "engine.activation_checkpointing"}),
    ],
)  # fmt: skip
def test_what_would_help_names_fields_that_are_not_used_up(changes, named: set[str]) -> None:
    words = remedy(plain(**changes))
    every = {"engine.zero_stage (1)", "engine.name", "engine.dp_replicate (2)"}
    every |= {"train.micro_batch_size (64)", "engine.activation_checkpointing"}
    assert {field for field in every if field in words} == named
    assert words.endswith("take more ranks or larger devices")


def test_sharing_and_checkpointing_take_less() -> None:
    config = load_config(Path("configs/demo.yaml"))

    def least(ranks: int = 8, **engine) -> Estimate:
        changed = config.model_copy(update={"engine": config.engine.model_copy(update=engine)})
        return estimate(stage_config(changed, 0), ranks, torch.bfloat16)

    usual = least()
    for other in (least(ranks=16), least(name="fsdp"), least(activation_checkpointing=True)):
        assert other.least <= usual.least and other.expected < usual.expected
        assert other.checkpoint == usual.checkpoint == 16 * 6_400_344 - 4 * 4_571_136  # Muon has one moment
    assert least(ranks=16).least < usual.least and least(activation_checkpointing=True).least < usual.least
    assert least(name="fsdp", dp_replicate=2) == least(ranks=4, name="fsdp")
    assert least(compile=True).least < usual.least  # what a compiler keeps is not known


def test_a_released_text_encoder_is_not_there_beside_the_activations() -> None:
    config = load_config(Path("configs/demo.yaml"))
    released = config.model_copy(update={"text": config.text.model_copy(update={"reload_every_step": True})})
    kept, let_go = (estimate(stage_config(it, 0), 1, torch.bfloat16) for it in (config, released))
    weights = 2 * 22_713_216  # all-MiniLM-L6-v2's
    assert kept.least - let_go.least == kept.expected - let_go.expected == weights
    tree = stage_config(released, 0).model_dump()
    tree["data"] |= {"resolution": 8}
    small = StageMemory.of(validate_config(tree, "test"), 1, 2)  # its activations take less than the text encoder
    assert small.device_bytes("zero1", 1, True) == CONTEXT_BYTES + total(small.static("zero1")) + weights


def test_a_hosts_memory_is_shared_by_its_ranks() -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert device_bytes(ALONE) == whole

    class Three(World):
        def gather(self, item):
            return [item, item, ("another", whole)]

    assert device_bytes(Three(0, 3, CPU)) == whole // 2


# All of it


def start(config: RunConfig) -> list[str]:
    places = stage_places(config)
    config.directory.mkdir(parents=True)
    stages = [stage_config(config, index) for index in range(len(config.stages))]
    opened = {}
    return check_start(
        [(it, place, open_data(it, place.name, opened)) for it, place in zip(stages, places, strict=True)], ALONE
    )


def test_a_good_start_leaves_nothing_and_says_nothing(scenes, tmp_path) -> None:
    config = tiny(scenes, tmp_path)
    assert start(config) == []
    assert not list(config.directory.iterdir())


def test_a_start_that_cannot_go_well_is_refused(scenes, tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="checkpoint.mirror"):
        start(tiny(scenes, tmp_path / "a", checkpoint={"mirror": "/nowhere"}))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="free some"):
        patch.setattr(preflight, "free_bytes", lambda _: 1000)
        start(tiny(scenes, tmp_path / "b"))
    monkeypatch.setattr(preflight, "device_bytes", lambda _: 2**20)
    with pytest.raises(UserError, match="stage low needs"):
        start(tiny(scenes, tmp_path / "c"))


def test_networks_that_the_planner_does_not_know_do_not_stop_a_start(scenes, tmp_path) -> None:
    text = {"model": "nobody/nothing", "length": 12}
    notices = start(tiny(scenes, tmp_path, text=text))
    assert len(notices) == 2 and notices[0].startswith("the memory of stage low is not estimated: text.model")


# The dry run


@pytest.mark.parametrize(("size", "micro", "ranks"), [(256, 64, 1), (256, 32, 4), (8, 2, 2), (8, 1, 1)])
def test_a_made_up_batch_is_full_and_as_often_over_the_gate_as_ever(size: int, micro: int, ranks: int) -> None:
    config = plain(seed=3, train={"batch_size": size, "micro_batch_size": micro}, data={"resolution": 32, "lanes": 8})
    before = torch.get_rng_state(), np.random.get_state()
    batch = made_up_batch(config, "low", 5, World(ranks - 1, ranks, CPU))
    again = made_up_batch(config, "low", 5, World(ranks - 1, ranks, CPU))
    (pixels,), (same,) = batch.pixels, again.pixels
    assert torch.equal(pixels, same) and pixels.float().std() > 70
    assert pixels.shape == (size // ranks, 3, 32, 32) and pixels.dtype == torch.uint8
    assert len(batch.captions) == len(batch.ids) == len(batch.slots) == size // ranks
    assert set(batch.slots) <= set(range(5 * size, 6 * size))
    t = training_times(config.objective, uniform(key(3, "low", "time"), batch.slots))
    over = (t >= config.objective.perceptual_t_min).reshape(-1, micro).sum(1)
    assert set(over) == {ungated_samples(micro, ungated_fraction(config.objective))}
    assert torch.equal(before[0], torch.get_rng_state()) and str(before[1]) == str(np.random.get_state())


def test_a_made_up_batch_is_of_the_largest_bucket() -> None:
    data = {"resolution": 32, "buckets": [[16, 48], [48, 32], [32, 32]], "group_size": 2}
    batch = made_up_batch(plain(train={"batch_size": 8, "micro_batch_size": 2}, data=data), "low", 0, ALONE)
    assert [tuple(pixels.shape) for _, pixels in batch.micro_batches(2)] == [(2, 3, 48, 32)] * 4


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_gate_that_is_never_or_always_open_has_its_batch_too(gate: float) -> None:
    train = {"batch_size": 8, "micro_batch_size": 4}
    batch = made_up_batch(
        plain(train=train, objective={"perceptual_t_min": gate}, data={"resolution": 32}), "low", 0, ALONE
    )
    assert len(batch.slots) == 8 and set(batch.slots) <= set(range(8))


def test_too_little_memory_in_a_dry_run_says_what_would_help() -> None:
    def full(batch: Batch, step: int, veto: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")

    def faulty(batch: Batch, step: int, veto: Any) -> Any:
        raise RuntimeError("a fault of the code")

    with pytest.raises(UserError, match=r"does not fit into the device's memory \(CUDA out of memory\): .*micro_batch"):
        dry_run(full, plain(), "low", World(0, 1, CPU))
    with pytest.raises(RuntimeError, match="a fault of the code"):
        dry_run(faulty, plain(), "low", World(0, 1, CPU))


@pytest.fixture(scope="module")
def outcomes(launch, tmp_path_factory) -> dict[str, list[dict]]:
    tree = stage_config(load_config(Path("configs/demo.yaml")), 0).model_dump(mode="json")
    tree["train"] |= {"batch_size": 8, "micro_batch_size": 2}
    tree["data"] |= {"lanes": 2, "sources": []}
    tree["text"]["cache"] = 0
    path = tmp_path_factory.mktemp("dry") / "stage.json"
    path.write_text(json.dumps(tree))
    return launch(Path(__file__).parent / "dry_run_worker.py", 2, str(path))


def test_a_dry_run_leaves_no_trace(outcomes) -> None:
    for name, ranks in outcomes.items():
        for found in ranks:
            assert found["changed"] == found["changed later"] == [], name
            assert found["steps change"] == ["masters", "moments", "ema", "weights", "optimizer_steps"], name


def test_a_dry_run_computes_all_terms(outcomes) -> None:
    for ranks in outcomes.values():
        for found in ranks:
            assert {"loss_fm", "loss_lpips", "loss_pdino", "loss_repa"} <= found["terms"].keys()
            assert found["sentence"].startswith("a dry step took ")


def test_the_peak_of_a_step_lies_between_what_is_refused_for_and_what_is_expected(outcomes) -> None:
    for name, ranks in outcomes.items():
        for found in ranks:
            assert found["least"] < found["peak"] < found["expected"], name
