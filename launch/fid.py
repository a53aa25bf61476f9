"""FID, sFID, Inception score, precision and recall of images, as ADM's evaluation suite has them.

    python launch/fid.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz --out summary.json
    python launch/fid.py IMAGES --size 256 --make-reference reference.npz

Samples and reference are an `.npz` with `arr_0`, uint8 (N, H, W, 3), or a folder; a reference may hold the statistics
of its features. Under `deepspeed` or `torchrun` the processes share the images; the values are the same for any number
of them. `--features efficientnet-lite0` needs no weights from elsewhere, and compares with nothing published.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Any

import torch

from data.files import lock_beside
from data.listing import format_left_out
from evaluation.fid.images import kept_numbers, open_images, open_reference, write_reference
from evaluation.fid.measure import compare, groups_of, measure
from evaluation.fid.networks import Name, Network, load
from evaluation.npz import drawn_as
from evaluation.sampling_job import held, write_json
from launch.cli import job_parser, parsed
from launch.process import joined_world, main
from t2i.config.base import ConfigError
from t2i.distributed import World

ROWS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
}


def _options() -> Namespace:
    parser = job_parser(__doc__)
    parser.add_argument("images", type=Path, help="the samples, or what to make a reference of: an .npz or a folder")
    parser.add_argument("--reference", type=Path, help="what the samples are compared with: an .npz or a folder")
    parser.add_argument("--make-reference", type=Path, help="write statistics of the images to this .npz instead")
    parser.add_argument("--features", type=Name, default="inception", help="whose features")
    parser.add_argument("--weights", type=Path, help="Inception's file; by default in torch.hub's cache")
    parser.add_argument("--size", type=int, help="side in pixels that images of folders are cropped to as ADM's are")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time, of each process")
    parser.add_argument("--out", type=Path, help="write what was found to this .json")
    options = parsed(parser)
    if (options.reference is None) == (options.make_reference is None):
        raise ConfigError("give either --reference or --make-reference")
    for name in ("size", "batch_size"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {number}: must be at least 1")
    sets = [path for path in (options.images, options.reference) if path is not None]
    if options.size is not None and all(path.suffix == ".npz" for path in sets):
        raise ConfigError(f"--size {options.size} is of folders, and an .npz is taken as it is: leave it out")
    if options.make_reference is not None:
        if options.out is not None:
            raise ConfigError("--out does nothing with --make-reference: leave it out")
        if options.make_reference.suffix != ".npz":
            raise ConfigError(f"--make-reference {options.make_reference}: the name ends in .npz")
    return options


def fid() -> None:
    """Parse the command line and measure."""
    options = _options()
    with joined_world(vars(options)) as world:
        # Convolutions and distances in fp32 proper: TF32 moves FID.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        target = options.make_reference or options.out
        if target is not None and world.broadcast_from_rank0(lambda: not target.parent.is_dir()):
            raise ConfigError(f"{target}: there is no folder {target.parent}")
        with nullcontext() if target is None else held(world, target, lock_beside(target)):
            if target is not None and world.broadcast_from_rank0(target.exists):
                raise ConfigError(f"{target} is there already: remove it or give another name")
            network = load(options.features, options.weights, world.device)
            if options.make_reference is not None:
                make_reference(world, network, options)
            else:
                score(world, network, options)


def score(world: World, network: Network, options: Namespace) -> None:
    """Compare, print a table, and write the summary."""
    reference = open_reference(options.reference, options.size, network)
    samples = open_images(options.images, options.size)
    found = compare(world, network, samples, reference, options.batch_size)
    found["samples"]["path"], found["reference"]["path"] = str(options.images), str(options.reference)
    if (drawn := drawn_as(options.images, found["samples"]["sha256"])) is not None:
        found["samples"]["drawn"] = drawn
    found["settings"] |= {"crop": options.size, "device": world.device.type}
    if not world.is_rank0:
        return
    print(table(found, network))
    for warning in found["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if options.out is not None:
        write_json(options.out, found)


def table(found: dict[str, Any], network: Network) -> str:
    """What was found, a line a metric; of other features than Inception's each says so."""
    lines = [f"{found['samples']['images']} samples against {found['reference']['path']}, {network.name}"]
    of = "" if network.comparable else f" ({network.name}, not comparable)"
    for name, title in ROWS.items():
        value = found["metrics"].get(name + network.suffix)
        words = f"- ({found['left_out'][name + network.suffix]})" if value is None else f"{value:.4f}"
        if name == "inception_score":
            words += f" +- {found['metrics'][f'{name}_std{network.suffix}']:.4f} over splits"
        lines.append(f"{title + of:<{len(of) + 16}} {words}")
    return "\n".join(lines)


def make_reference(world: World, network: Network, options: Namespace) -> None:
    """Measure a reference set and write its statistics."""
    images = open_images(options.images, options.size)
    measured = measure(world, network, images, options.batch_size, "reference", ())

    def write() -> None:
        about = {
            "features": network.name,
            "weights_sha256": network.sha256,
            "images": len(images),
            "images_sha256": images.digest(),
            "crop": options.size,
        }
        groups = groups_of(kept_numbers(len(images)), options.batch_size)
        write_reference(options.make_reference, measured.gaussians(), about, images, groups)
        count = f"{len(images)} images{format_left_out(images.left_out)}"
        print(f"statistics of {count}, in {options.make_reference}", file=sys.stderr)

    world.broadcast_from_rank0(write)


if __name__ == "__main__":
    main(fid)
