"""Which image sizes fit into memory: the memory that generating takes, against what is free.

- On a CPU the network's own code runs on the meta device. Its attention holds all scores, so memory grows with the
  square of the patches. It is counted in fp32 for bf16 too, whose CPU kernels take copies in fp32: measured were 79 to
  101 % of it in fp32, and 50 to 96 % in bf16.
- On a GPU the network runs at two sizes that fit, and the allocator reports the memory: fused attention grows linearly
  in patches, and the device chooses the kernel.
- Both are for one image with guidance, as the page generates and as editing does, or for a batch.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from data.errors import UserError
from t2i.build import build_denoiser
from t2i.config.run import RunConfig
from t2i.config.train import SamplingConfig
from t2i.diffusion.sampling import guided_velocity
from t2i.pipeline import Picture, Pipeline

USABLE = 0.8
"""Share of the free memory that an image may take; the rest is for fragments, captions and the unforeseen."""
STATE_COPIES = 8
"""Copies of an image in fp32 besides a call of the network: noise, state, slopes of four steps, sums."""
MOST_PIXELS = 2**24
"""Upper limit for any memory: 4096 x 4096."""
MOST_TRACED = 2**20
"""Patches; beyond them memory is assumed proportional, since products of sizes would not fit into 64 bits."""
META = torch.device("meta")


@dataclass(frozen=True)
class Limits:
    """Sizes that may be asked for."""

    patch: int
    """Sides are multiples of it, in pixels."""
    max_pixels: int
    """Largest height times width."""
    reason: str
    """What sets the limit, in words."""

    def check(self, height: int, width: int) -> None:
        """Raise a UserError, with the largest size that fits, for a size that does not."""
        p = self.patch
        for name, side in (("width", width), ("height", height)):
            if side <= 0 or side % p:
                near = max(1, round(side / p)) * p
                raise UserError(f"{name} {side}: must be a multiple of the model's patch, {p} pixels, such as {near}")
        if height * width > self.max_pixels:
            largest = self.largest_like(height, width)
            raise UserError(
                f"width x height {width} x {height}: {self.reason} allows at most {self.max_pixels:,} pixels in all, "
                f"such as {largest[1]} x {largest[0]}"
            )

    def largest_like(self, height: int, width: int) -> tuple[int, int]:
        """The largest allowed height and width of about this shape."""
        most = self.max_pixels // self.patch**2  # patches
        rows = min(most, max(1, math.floor(math.sqrt(most * height / width))))
        columns = max(1, min(most // rows, math.floor(rows * width / height)))
        return rows * self.patch, columns * self.patch


class _LiveBytes(TorchDispatchMode):
    """Tracks the bytes of all live tensors; `peak` is the most at once.

    Tensors that ask for the CPU, as tables of positions do, are made on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes = WeakIdKeyDictionary()  # by storage: views share one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if options.get("device") is not None:
            options["device"] = META
        result = func(*args, **options)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                self._sizes[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result


def traced_bytes(config: RunConfig, text_width: int, together: int = 1) -> Callable[[int], int]:
    """Bytes of one guided call of the network on a CPU besides its weights, as a function of the patches.

    Tables of positions that a process caches count in each size's first call. `text_width`: E of a caption's states, 0
    for classes; `together`: images in a batch.
    """
    with META:
        denoiser = build_denoiser(config.model, text_width, config.text.length).eval()
    patch = config.model.patch_size

    @torch.no_grad()
    def peak(patches: int) -> int:
        # Inputs are made before counting: they are among STATE_COPIES, or small.
        shape = () if config.model.condition == "class" else (config.text.length, text_width)
        kind = torch.long if config.model.condition == "class" else torch.float32
        condition = torch.zeros(together, *shape, dtype=kind, device=META)
        x = torch.zeros(together, 3, patch, patches * patch, device=META)
        velocity = guided_velocity(
            lambda x, t, condition: denoiser(x, t, condition).output,
            condition, condition, 2.0, config.model.prediction, config.objective.t_eps,
        )  # fmt: skip
        with _LiveBytes() as counted:
            velocity(x, 0.5, True)
        return counted.peak

    return peak


def measured_bytes(pipeline: Pipeline) -> Callable[[int], int]:
    """The same on a GPU, from the allocator, at the trained size and twice its area, or halves of it if need be."""
    patch = pipeline.denoiser.patch_size
    height, width = pipeline.config.data.size
    picture = Picture("0" if pipeline.config.model.condition == "class" else "a picture")
    (states,) = pipeline.states([[picture]])
    velocity = pipeline.velocity([picture], states, SamplingConfig(guidance_scale=2.0, batch_size=1))

    @torch.no_grad()
    def peak(columns: int) -> int:
        x = torch.zeros(1, 3, height, columns, device=pipeline.device)
        for _ in range(2):  # the first run allocates what stays: workspaces, tables of positions
            torch.cuda.reset_peak_memory_stats(pipeline.device)
            before = torch.cuda.memory_allocated(pipeline.device)
            velocity(x, 0.5, True)
        return torch.cuda.max_memory_allocated(pipeline.device) - before

    return line_of_peaks(lambda columns: peak(columns * patch), height // patch, width // patch)


def line_of_peaks(peak: Callable[[int], int], rows: int, columns: int) -> Callable[[int], int]:
    """A line, in bytes by patches, through the memory of two sizes: twice `columns` and half of that, or smaller
    halves; more than any memory if not even one column fits.

    `peak`: bytes of `rows` times a number of patches; raises torch.OutOfMemoryError where they do not fit.
    """
    found: list[tuple[int, int]] = []
    columns *= 2
    while columns and len(found) < 2:
        with suppress(torch.OutOfMemoryError):
            found.append((rows * columns, peak(columns)))
        columns //= 2
    if not found:
        return lambda patches: sys.maxsize
    (more, most), (fewer, least) = [*found, (0, 0)][:2]
    return lambda patches: math.ceil(least + (most - least) * (patches - fewer) / (more - fewer))


def free_bytes(device: torch.device) -> int:
    """Free memory: a GPU's, with what PyTorch's allocator caches; or the host's, within its control group."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            host = int(line.split()[1]) * 1024
    return min(host, _group_bytes(Path("/sys/fs/cgroup")))


def _group_bytes(group: Path) -> int:
    """What a control group leaves to its processes; cached files, which it counts as used, can be evicted."""
    limit = group / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return sys.maxsize
    counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cached = int(counts["active_file"]) + int(counts["inactive_file"])
    return int(limit.read_text()) - int((group / "memory.current").read_text()) + cached


def drawing_bytes(pipeline: Pipeline, together: int = 1) -> Callable[[int], int]:
    """Bytes of generating or editing `together` images besides the weights, as a function of an image's patches."""
    if pipeline.device.type == "cuda":
        peak, times = measured_bytes(pipeline), together
    else:
        peak, times = traced_bytes(pipeline.config, pipeline.conditioner.width, together), 1
    picture = STATE_COPIES * 3 * 4 * pipeline.denoiser.patch_size**2  # bytes a patch

    def total(patches: int) -> int:
        counted = min(patches, MOST_TRACED)
        return math.ceil(times * peak(counted) * patches / counted) + together * picture * patches

    return total


def check_fits(
    pipeline: Pipeline, size: tuple[int, int], together: int, name: str, advice: str, ranks: int = 1
) -> None:
    """Raise a UserError if the free memory does not hold images of a size, before any is generated or edited.

    Args:
        size: height and width in pixels, multiples of the patch.
        together: images in a batch.
        name: begins the message: what has this size.
        advice: ends the message: what would be right.
        ranks: processes that share the host's memory.
    """
    patch = pipeline.denoiser.patch_size
    free = free_bytes(pipeline.device)
    if pipeline.device.type == "cpu":
        free //= ranks
    takes = drawing_bytes(pipeline, together)
    patches = size[0] * size[1] // patch**2
    needed = takes(patches)
    if needed <= free:
        return
    patches = min(patches, MOST_TRACED)
    while patches and takes(patches) > free:
        patches //= 2
    height, width = Limits(patch, patches * patch**2, "").largest_like(*size) if patches else (0, 0)
    enough = f", enough for {height}x{width}" if patches else ""
    raise UserError(
        f"{name}: {'a picture takes' if together == 1 else f'{together} at once take'} about {needed / 2**30:,.1f} GiB "
        f"of memory, and {free / 2**30:,.1f} GiB are free{enough}: {advice}"
    )


def most_patches(takes: Callable[[int], int], available: int, at_most: int) -> int:
    """The most patches whose image fits, at most `at_most`; 0 if not even one does. `takes`, bytes by patches, never
    falls."""
    fits, too_many = 0, at_most + 1
    guess = 1
    while too_many - fits > 1:
        if takes(guess) <= available:
            fits = guess
        else:
            too_many = guess
        # Double while all fit, then bisect.
        guess = min(2 * guess, at_most) if too_many > at_most else (fits + too_many) // 2
    return fits


def find_limits(pipeline: Pipeline, available: int, max_pixels: int | None) -> Limits:
    """The sizes that a model may be asked for.

    `available`: bytes that an image may take; `max_pixels`: a limit of whoever serves the page, or None.
    """
    config, patch = pipeline.config, pipeline.denoiser.patch_size
    wanted = MOST_PIXELS if max_pixels is None else min(max_pixels, MOST_PIXELS)
    height, width = config.data.size
    trained = height * width
    if wanted < patch**2:
        raise UserError(f"--max_pixels {max_pixels}: must hold one patch at least, {patch**2} pixels")
    found = most_patches(drawing_bytes(pipeline), available, wanted // patch**2) * patch**2
    if found < min(trained, wanted):
        raise UserError(
            f"{available / 2**30:.2f} GiB of free memory are too little to draw at {width} x {height}, the size that "
            f"the model was trained at: free some, or give a lower --max_pixels"
        )
    memory = found < wanted // patch**2 * patch**2
    reason = "the memory here" if memory else "this server" if max_pixels is not None else "the page"
    return Limits(patch, found, reason)
