"""The plan of a run, as JSON and as tables: parameters, memory, FLOPs, days, bandwidth, disk.

Arithmetic from the config and from networks counted on the meta device (`meta.py`): no weights, no data, no GPU, a few
seconds. `BASIS` says of each figure whether it is counted, derived or assumed. FLOPs are those of our training step,
whose perceptual networks see ungated samples only; with `reference`, those of the public code, whose perceptual
networks see every sample, and its memory is listed too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from data.loader import PREFETCH
from t2i.config.base import ConfigError
from t2i.config.run import RunConfig
from t2i.plan.choice import USABLE, Assumptions, Option, PlannedStage, recommend
from t2i.plan.counts import Checkpointing, ungated_fraction
from t2i.plan.memory import (
    CONTEXT_BYTES,
    ENGINES,
    FP32,
    Bytes,
    buffers,
    checkpoint_bytes,
    reference_static_memory,
    total,
)

GIB = 2**30
_CHECKPOINTING = {
    False: "no checkpointing",
    "pixel": "activation checkpointing of pixel blocks",
    True: "activation checkpointing",
}


def tables(plan: dict[str, Any]) -> str:
    """A plan as text: run, parameters, FLOPs, time, memory, data, storage, advice, basis."""
    stages = plan["stages"]
    gpu = plan["gpu"]
    head = (
        f"{plan['name']} on {plan['gpus']} x {gpu['name']} ({gpu['peak_bf16'] / 1e12:g} bf16 TFLOP/s, "
        f"{gpu['memory_gib']:g} GiB each) at {plan['utilisation']:.0%} of the peak"
    )
    if plan["reference"]:
        head += ", FLOPs as the public code runs them"
    parts = [head, _parameters(stages[0]), _flops(plan), _time(plan)]
    parts += [table for names, stage in _alike(stages) for table in _memory(names, stage)]
    parts += [_data_table(plan), _storage_table(plan), _advice_table(stages), _basis(plan["basis"])]
    return "\n\n".join(parts)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [[title, *head], *([*row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _gib(value: float) -> str:
    if not value:
        return "-"
    return f"{value / GIB:.1f}" if value >= GIB / 10 else f"{value / GIB:.3f}"


def _alike(stages: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Stages grouped by equal memory, with their names."""
    groups: list[tuple[list[str], dict[str, Any]]] = []
    for stage in stages:
        for names, first in groups:
            if all(stage[key] == first[key] for key in ("static_bytes", "activation_bytes", "options")):
                names.append(stage["name"])
                break
        else:
            groups.append(([stage["name"]], stage))
    return [(", ".join(names), stage) for names, stage in groups]


def _parameters(stage: dict[str, Any]) -> str:
    counted = dict(stage["parameters"])
    frozen = counted.pop("frozen")
    rows = [[name if "of which" not in name else f"  {name}", f"{n:,}"] for name, n in counted.items() if n]
    rows += [[f"frozen: {name}", f"{n:,}"] for name, n in frozen.items()]
    return _table("Parameters", [""], rows)


def _flops(plan: dict[str, Any]) -> str:
    stages = plan["stages"]
    names = list(stages[0]["flops_per_image"])
    rows = []
    for name in names:
        row = [name]
        for stage in stages:
            flops, whole = stage["flops_per_image"].get(name, 0.0), stage["flops_per_image"]["total"]
            row += [_gmac(flops), f"{flops / whole:.1%}"]
        rows.append(row)
        if name == "denoiser":
            for field, prefix in (("forward_flops", "forward, "), ("recomputed_flops", "recomputed, ")):
                for part in (part for part, n in stages[0][field].items() if n):
                    cells = [cell for stage in stages for cell in (_gmac(stage[field][part]), "")]
                    rows.append([f"  ({prefix}{part})", *cells])
    head = [cell for stage in stages for cell in (stage["name"], "share")]
    seen = ", ".join(f"{stage['over_gate']:.1%}" for stage in stages)
    return _table("GMAC an image (1 = 2 GFLOP)", head, rows) + f"\nUngated (t >= perceptual_t_min): {seen}."


def _gmac(flops: float) -> str:
    return f"{flops / 2e9:,.4g}" if flops < 2e12 else f"{flops / 2e9:,.0f}"


def _time(plan: dict[str, Any]) -> str:
    rows = []
    for stage in plan["stages"]:
        time = stage["time"]
        rows.append(
            [
                stage["name"],
                f"{stage['steps']:,} x {stage['batch_size']:,}",
                f"{time['flops']:.2e}",
                f"{time['images_per_s']:,.0f}",
                f"{time['images_per_s'] / plan['gpus']:,.0f}",
                f"{time['step_s']:.3g}",
                f"{time['metrics_mfu']:.1%}",
                _days(time["days"]),
                _hours(time["gpu_hours"]),
            ]
        )
    whole = plan["total"]
    sums = [_days(whole["days"]), _hours(whole["gpu_hours"])]
    rows.append(["total", "", f"{whole['flops']:.2e}", "", "", "", "", *sums])
    head = ["steps x batch", "FLOPs", "images/s", "a GPU", "s/step", "mfu in metrics", "days", "GPU-hours"]
    return _table("Time", head, rows) + "\nThe metrics' mfu counts the denoiser alone."


def _days(days: float) -> str:
    return f"{days:.2f}" if days >= 0.1 else f"{days:.2g}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _memory(names: str, stage: dict[str, Any]) -> list[str]:
    """Static memory by engine, activations at the config's micro-batch, and the largest micro-batches, of stages that
    are alike."""
    engines = stage["static_bytes"]
    held = list(dict.fromkeys(name for parts in engines.values() for name in parts if name != "total"))
    rows = [[name, *(_gib(parts.get(name, 0)) for parts in engines.values())] for name in [*held, "total"]]
    moving = stage["engine_buffer_bytes"]
    rows.append(["while computing", *(_gib(moving[name]) if name in moving else "" for name in engines)])
    static = _table(f"{names}: static GiB a GPU", list(engines), rows)
    kept = stage["activation_bytes"]
    rows = [[name, *(_gib(parts[name]) for parts in kept.values())] for name, n in kept["plain"].items() if n]
    title = f"{names}: activations, GiB at micro-batch {stage['micro_batch_size']}"
    activations = _table(title, list(kept), rows)
    fits: dict[str, list[str]] = {}
    for option in stage["options"]:
        size = str(option["micro_batch_size"]) if option["micro_batch_size"] else "none"
        fits.setdefault(option["engine"], []).extend([size, _gib(option["bytes"])])
    title = f"{names}: largest micro-batch"
    head = [cell for name in kept for cell in (name, "GiB")]
    return [static, activations, _table(title, head, [[name, *row] for name, row in fits.items()])]


def _data_table(plan: dict[str, Any]) -> str:
    rows = []
    for stage in plan["stages"]:
        data = stage["data"]
        rows.append(
            [
                stage["name"],
                f"{data['bytes_per_s'] / 1e6:,.0f}",
                f"{data['bytes_per_s_a_rank'] / 1e6:,.1f}",
                f"{data['bytes_read'] / 1e12:,.3f}",
                _gib(data["read_ahead_bytes_a_rank"]),
                _gib(data["read_ahead_limit_bytes_a_rank"]),
                _gib(data["decoded_bytes_a_rank"]),
            ]
        )
    head = ["MB/s", "MB/s a rank", "TB in all", "ahead, GiB a rank", "limit", "decoded, GiB a rank"]
    return _table(f"Data, {plan['sample_bytes'] / 1000:g} KB a sample", head, rows)


def _storage_table(plan: dict[str, Any]) -> str:
    rows = []
    for stage in plan["stages"]:
        storage = stage["storage"]
        rows.append(
            [
                stage["name"],
                f"{storage['checkpoint_bytes'] / 1e9:,.2f}",
                f"{storage['checkpoints']}",
                f"{storage['kept_bytes'] / 1e9:,.2f}",
                f"{storage['model_bytes'] / 1e9:,.2f}",
                _gib(storage["snapshot_bytes_a_rank"]),
            ]
        )
    head = ["GB a checkpoint", "kept", "GB", "model folder, GB", "snapshot, GiB a rank"]
    whole = f"\nDisk in all: {plan['total']['disk_bytes'] / 1e9:,.2f} GB, one checkpoint being written among them."
    return _table("Storage", head, rows) + whole


def _advice_table(stages: list[dict[str, Any]]) -> str:
    lines = ["Recommended"]
    for stage in stages:
        chosen = stage["recommended"]
        if chosen is not None:
            with_checkpointing = _CHECKPOINTING[chosen["checkpointing"]]
            lines.append(
                f"  {stage['name']}: {chosen['engine']}, {with_checkpointing}, micro-batch up to "
                f"{chosen['micro_batch_size']} ({_gib(chosen['bytes'])} GiB)"
            )
        else:
            lines.append(f"  {stage['name']}: nothing")
        lines += [f"    - {sentence}" for sentence in stage["advice"]]
    return "\n".join(lines)


def _basis(basis: dict[str, str]) -> str:
    width = max(map(len, basis))
    return "\n".join(["What is counted, derived, assumed", *(f"  {n.ljust(width)}  {s}" for n, s in basis.items())])


BASIS = {
    "parameters": "counted: the networks, built on the meta device",
    "flops": "counted: matrix products and convolutions; a backward as two forwards, one through frozen networks; "
    "captions of text.length tokens, the most under text_padding mask, without text.instruction's; squares for buckets",
    "static": "derived: bytes a parameter of each engine, measured on 1 and 2 ranks",
    "activations": "counted: what autograd keeps in eager mode, checked on small networks; an upper bound for "
    "torch.compile; a backward's working memory assumed",
    "device": f"assumed: {CONTEXT_BYTES / 2**30:g} GiB for CUDA's context and workspaces, and that {USABLE:.0%} of "
    "the memory may be filled",
    "time": "derived from the assumed utilisation: FLOPs that are computed, recomputed ones too, over the data sheet's "
    "peak; the paper's 6 days on 8 H800 are 22 %; validation, checkpoints and communication are in it alone",
    "data": "derived from the assumed bytes a sample; samples that filters skip are not included",
    "storage": "derived: exact but for the trainer's state, some KB a lane",
}


def _advice(stage: PlannedStage, options: list[Option], chosen: Option | None) -> list[str]:
    """Sentences: whether the config's settings fit, and what would be cheaper."""
    micro, gib = stage.config.train.micro_batch_size, 2**30
    advice = []
    if stage.together % micro:
        of = "data.group_size" if stage.config.data.aspect_buckets else "a rank's share of the batch"
        advice.append(f"train.micro_batch_size {micro} does not divide {of}, {stage.together}")
    else:
        need = stage.memory.device_bytes("zero1", micro, False)
        verdict = "fits" if need <= stage.budget else "does not fit"
        advice.append(
            f"train.micro_batch_size {micro} with zero1 and no checkpointing takes {need / gib:.1f} GiB: it {verdict} "
            f"into {USABLE:.0%} of {stage.given.gpu.memory_gib:g} GiB"
        )
    if (folder := stage.config.engine.offload_dir) is not None:
        mapped = total(stage.memory.mapped("zero1"))
        advice.append(f"moments and EMA, {mapped / gib:.1f} GiB a rank at zero1, are files in {folder}, not memory")
    flops = stage.flops()
    whole = sum(flops.values())
    if chosen is None:
        least = min(options, key=lambda option: option.bytes)
        advice.append(
            f"nothing fits: one sample takes {least.bytes / gib:.1f} GiB or more ({least.engine}, checkpointing): "
            "take more or larger GPUs, or a smaller model"
        )
    else:
        alike = [option for option in options if option.checkpointing == chosen.checkpointing]
        largest = max(alike, key=lambda option: option.micro_batch_size)
        if largest.micro_batch_size > chosen.micro_batch_size:
            advice.append(f"{largest.engine} would hold {largest.micro_batch_size}, for more communication")
        if chosen.checkpointing:
            again = stage.square.cost.recomputed_flops(chosen.checkpointing)
            advice.append(f"checkpointing computes {again / whole:.0%} more: GPUs with more memory save it")
    encoding = flops.get("text encoder", 0.0) / whole
    if stage.memory.text is None:
        advice.append("classes cost nothing to encode")
    elif stage.config.text.cache:
        advice.append(f"text.cache saves up to {encoding:.1%} of these FLOPs where captions come again soon")
    else:
        advice.append(f"caption states computed once and kept would save {encoding:.1%} of FLOPs")
    clean = sum(flops.get(name, 0.0) for name in ("lpips, clean", "dino, clean"))
    if clean:
        advice.append(f"the clean images' perceptual features are {clean / whole:.1%} of FLOPs")
    return advice


def _stage_plan(stage: PlannedStage) -> dict[str, Any]:
    """One stage's plan in plain values: bytes, seconds, FLOPs."""
    config, given = stage.config, stage.given
    memory = stage.memory
    options = stage.options()
    chosen = recommend(stage, options)
    checkpointing: Checkpointing = chosen.checkpointing if chosen is not None and not given.reference else False
    micro = config.train.micro_batch_size
    flops = stage.flops()
    rate = stage.images_per_s(checkpointing)
    images = config.train.steps * config.train.batch_size
    seconds = images / rate
    static: dict[str, Bytes] = {engine: _summed(memory.static(engine)) for engine in ENGINES}
    if given.reference:
        static["ddp"] = _summed(reference_static_memory(memory.network, memory.frozen(perceptual_bytes=FP32)))
    return {
        "name": stage.name,
        "resolution": config.data.resolution,
        "steps": config.train.steps,
        "batch_size": config.train.batch_size,
        "micro_batch_size": micro,
        "dtype": "fp32" if memory.dtype_bytes == FP32 else "bf16",
        "parameters": {
            "denoiser": memory.network.denoiser,
            "of which image blocks": memory.network.image_blocks,
            "of which text refiner": memory.network.text_blocks,
            "of which pixel blocks": memory.network.pixel_blocks,
            "of which embeddings and head": memory.network.rest,
            "projector": memory.network.projector,
            "trained": memory.network.total,
            "frozen": {net.name: net.parameters for net in (memory.text, memory.distance, memory.features) if net},
        },
        "over_gate": ungated_fraction(config.objective),
        "flops_per_image": {**flops, "total": sum(flops.values())},
        # Of the denoiser alone: a training image takes its forward pass three times, and what is recomputed.
        "forward_flops": {**stage.square.cost.flops, "total": stage.square.cost.denoiser_flops},
        "recomputed_flops": {
            name: stage.square.cost.recomputed_flops(it) for name, it in stage.checkpointings.items() if it
        },
        "static_bytes": static,
        "engine_buffer_bytes": {engine: buffers(engine, memory.network, memory.dtype_bytes) for engine in ENGINES},
        "activation_bytes": {name: _summed(memory.activations(micro, it)) for name, it in stage.checkpointings.items()},
        "options": [asdict(option) for option in options],
        "recommended": asdict(chosen) if chosen is not None else None,
        "advice": _advice(stage, options, chosen),
        "time": {
            "images": images,
            "flops": images * stage.executed_flops(checkpointing),
            "images_per_s": rate,
            "step_s": config.train.batch_size / rate,
            "days": seconds / 86400,
            "gpu_hours": seconds * given.gpus / 3600,
            "metrics_mfu": given.utilisation * flops["denoiser"] / stage.executed_flops(checkpointing),
        },
        "data": _data(stage, rate),
        "storage": _storage(stage),
    }


def _summed(parts: Bytes) -> Bytes:
    return {**parts, "total": total(parts)}


def _data(stage: PlannedStage, rate: float) -> dict[str, float]:
    """Bandwidth of all ranks, and host memory of one rank's loader."""
    data, given, (height, width) = stage.config.data, stage.given, stage.memory.size
    remote = sum(source.url.startswith("s3://") for source in data.sources)
    # A request to S3 also brings samples that a block needs later; from a disk each sample is read when it is due.
    ahead = data.lanes // given.gpus * remote * data.shuffle_block * given.sample_bytes
    pixels = stage.share * 3 * height * width
    return {
        "bytes_per_s": rate * given.sample_bytes,
        "bytes_per_s_a_rank": rate * given.sample_bytes / given.gpus,
        "bytes_read": stage.config.train.steps * stage.config.train.batch_size * given.sample_bytes,
        "read_ahead_bytes_a_rank": ahead,
        "read_ahead_limit_bytes_a_rank": data.buffer_gib * 2**30,
        "decoded_bytes_a_rank": (PREFETCH + 1) * pixels,
    }


def _storage(stage: PlannedStage) -> dict[str, float]:
    """Bytes on disk, and of the snapshot in a rank's host memory."""
    network, checkpoint = stage.memory.network, stage.config.checkpoint
    one = checkpoint_bytes(network)
    saves = -(-stage.config.train.steps // checkpoint.every)
    return {
        "checkpoint_bytes": one,
        "checkpoints": min(checkpoint.keep, saves),
        "kept_bytes": one * min(checkpoint.keep, saves),
        "model_bytes": 2 * FP32 * network.total,
        "snapshot_bytes_a_rank": one / stage.given.gpus,
    }


def plan(config: RunConfig, given: Assumptions) -> dict[str, Any]:
    """The plan of a run's stages in plain values, as `--json` prints it.

    Raises:
        ConfigError: the config has no stage, or names a network that is not known here.
        DataError: the GPUs cannot share a stage's batch or lanes evenly.
    """
    if not config.stages:
        raise ConfigError("stages: the config names no stage")
    stages = [_stage_plan(PlannedStage.of(config, index, given)) for index in range(len(config.stages))]
    kept = sum(stage["storage"]["kept_bytes"] + stage["storage"]["model_bytes"] for stage in stages)
    return {
        "name": config.name,
        "gpus": given.gpus,
        "gpu": asdict(given.gpu),
        "utilisation": given.utilisation,
        "sample_bytes": given.sample_bytes,
        "reference": given.reference,
        "stages": stages,
        "total": {
            "days": sum(stage["time"]["days"] for stage in stages),
            "gpu_hours": sum(stage["time"]["gpu_hours"] for stage in stages),
            "flops": sum(stage["time"]["flops"] for stage in stages),
            "images": sum(stage["time"]["images"] for stage in stages),
            # Besides what is kept, one checkpoint is being written.
            "disk_bytes": kept + max(stage["storage"]["checkpoint_bytes"] for stage in stages),
        },
        "basis": BASIS,
    }
