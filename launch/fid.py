"""FID, sFID, Inception score, precision and recall of images, as ADM's evaluation suite has them.

    python launch/fid.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz --out summary.json
    python launch/fid.py IMAGES --size 256 --make_reference reference.npz

Samples and reference are an `.npz` with `arr_0`, uint8 (N, H, W, 3), or a folder; a reference may hold the statistics
of its features. Under `deepspeed` or `torchrun` the processes share the images; the values are the same for any number
of them. `--features efficientnet-lite0` needs no downloaded weights, and compares with nothing published.
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

from data.files import name_in_errors, refuse_existing, write_json
from data.listing import format_left_out
from data.tables import format_table
from evaluation.fid.images import kept_numbers, open_images, open_reference, write_reference
from evaluation.fid.measure import compare, measure
from evaluation.fid.networks import Name, Network, load
from evaluation.npz import generated_with
from evaluation.sampling_job import lock_output
from launch.cli import job_parser, parsed
from launch.process import joined_world, main
from t2i.config.base import ConfigError
from t2i.distributed import World
from t2i.pipeline import batches_of

_TITLES = {
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
    parser.add_argument("--make_reference", type=Path, help="write statistics of the images to this .npz instead")
    parser.add_argument("--features", type=Name, default="inception", help="network that makes the features")
    parser.add_argument("--weights", type=Path, help="Inception's file; by default in torch.hub's cache")
    parser.add_argument("--size", type=int, help="side in pixels that images of folders are cropped to, as ADM's are")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch of each process")
    parser.add_argument("--out", type=Path, help="write the values to this .json")
    options = parsed(parser)
    if (options.reference is None) == (options.make_reference is None):
        raise ConfigError("give either --reference or --make_reference")
    for name in ("size", "batch_size"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ConfigError(f"--{name} {number}: must be at least 1")
    sets = [path for path in (options.images, options.reference) if path is not None]
    if options.size is not None and all(path.suffix == ".npz" for path in sets):
        raise ConfigError(f"--size {options.size} does nothing with an .npz, which is taken as it is: leave it out")
    if options.make_reference is not None:
        if options.out is not None:
            raise ConfigError("--out does nothing with --make_reference: leave it out")
        if options.make_reference.suffix != ".npz":
            raise ConfigError(f"--make_reference {options.make_reference}: the name must end in .npz")
    return options


def fid() -> None:
    """Parse the command line and do the job."""
    options = _options()
    with joined_world(vars(options)) as world:
        # Convolutions and distances in full fp32: TF32 moves FID.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        target, option = options.out, "--out"
        if options.make_reference is not None:
            target, option = options.make_reference, "--make_reference"
        if target is not None and world.broadcast_from_rank0(lambda: not target.parent.is_dir()):
            raise ConfigError(f"{option} {target}: there is no folder {target.parent}")
        with nullcontext() if target is None else lock_output(world, target, is_file=True):
            if target is not None:
                world.broadcast_from_rank0(lambda: refuse_existing(target, option))
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
    if (made := generated_with(options.images, found["samples"]["sha256"])) is not None:
        found["samples"]["generated_with"] = made
    found["settings"] |= {"crop": options.size, "device": world.device.type}
    if not world.is_rank0:
        return
    print(table(found, network))
    for warning in found["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if options.out is not None:
        write_json(options.out, found)


def table(found: dict[str, Any], network: Network) -> str:
    """What was found, a line a metric; each says so if it is of other features than Inception's."""
    what = "" if network.comparable else f" ({network.name}, not comparable)"
    rows = []
    for name, title in _TITLES.items():
        value = found["metrics"].get(name + network.suffix)
        words = f"- ({found['left_out'][name + network.suffix]})" if value is None else f"{value:.4f}"
        if name == "inception_score":
            words += f" +- {found['metrics'][f'{name}_std{network.suffix}']:.4f} over splits"
        rows.append([title + what, words])
    head = f"{found['samples']['images']} samples against {found['reference']['path']}, {network.name}"
    return "\n".join([head, *format_table(rows, left=(0, 1))])


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
        groups = batches_of(kept_numbers(len(images)), options.batch_size)
        with name_in_errors(f"--make_reference {options.make_reference}"):
            write_reference(options.make_reference, measured.gaussians(), about, images, groups)
        count = f"{len(images)} images{format_left_out(images.left_out)}"
        print(f"statistics of {count}, in {options.make_reference}", file=sys.stderr)

    world.broadcast_from_rank0(write)


if __name__ == "__main__":
    main(fid)
