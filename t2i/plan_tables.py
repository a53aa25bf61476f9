"""A plan as aligned tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

GIB = 2**30
_CHECKPOINTING = {
    False: "no checkpointing",
    "pixel": "activation checkpointing of pixel blocks",
    True: "activation checkpointing",
}


def tables(plan: dict[str, Any]) -> str:
    """What `plan.plan` returns, for a person: run, parameters, FLOPs, time, memory, data, storage, advice, basis."""
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
    parts += [_data(plan), _storage(plan), _advice(stages), _basis(plan["basis"])]
    return "\n\n".join(parts)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines with the first column to the left and the others to the right, as wide as their widest cell."""
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
    """Stages whose memory is the same as one, with their names."""
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
    return _table("GMAC an image (1 = 2 GFLOP)", head, rows) + f"\nSamples over the gate: {seen}."


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
    """Static memory by engine, activations at the config's micro-batch, and what fits, of stages that are alike."""
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


def _data(plan: dict[str, Any]) -> str:
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


def _storage(plan: dict[str, Any]) -> str:
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


def _advice(stages: list[dict[str, Any]]) -> str:
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
