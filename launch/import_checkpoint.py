"""Turn a released PixelGen or PixelDiT checkpoint into a model folder, to generate with or to train on.

    python launch/import_checkpoint.py PixelGen_XXL_T2I.ckpt --config configs/pixelgen_xxl.yaml --out models/xxl
    python launch/sample.py --model models/xxl --prompts prompts.txt --out pictures
    deepspeed launch/stage3.py --init.source models/xxl

    python launch/import_checkpoint.py PixelGen_XL_160ep.ckpt --config configs/pixelgen_xl.yaml --out models/xl
    deepspeed launch/sample_classes.py --model models/xl --out samples.npz

    python launch/import_checkpoint.py PixelDiT_1024.pth --config configs/pixeldit_t2i.yaml --out models/pixeldit
    python launch/import_checkpoint.py XL.ckpt --config configs/pixeldit_xl.yaml --resolution 256 --out models/dit_xl

Nothing in the file is run. The folder's import.json says what became of every key. For text to image, the config's text
encoder computes the null caption, which is not in the file; if a PixelGen's guided images look washed out, try
--null_attention zero.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shutil
from dataclasses import asdict

import torch
from torch import Tensor

from data.files import FileLock, commit, lock_beside, name_in_errors, refuse_existing, write_json
from launch.cli import run
from launch.process import quiet
from t2i.build import build_conditioner, choose_dtype
from t2i.config.base import ConfigError, PathText
from t2i.config.loading import load_config, stage_config
from t2i.config.run import RunConfig
from t2i.model_folder import NULL_CAPTION, check_finite, write_model
from t2i.models.text import Conditioner, TextEncoder
from t2i.released.checkpoint import Checkpoint
from t2i.released.convert import Imported, NullAttention, Report, import_weights, null_caption, trained_resolution
from t2i.released.names import check_kind


def import_checkpoint(
    file: PathText,
    /,
    out: PathText,
    config: PathText,
    resolution: int | None = None,
    null_attention: NullAttention = "mean",
) -> None:
    """Turn a released PixelGen or PixelDiT checkpoint into a model folder.

    Args:
        file: The .ckpt or .pth file.
        out: The folder to make.
        config: YAML file of a run with the checkpoint's model and, for text to image, its text encoder; the folder gets
            the settings of its last stage at the checkpoint's resolution.
        resolution: Side in pixels of the images that the checkpoint was trained on, for PixelDiT's, which do not say;
            none takes the config's last stage.
        null_attention: For text to image, what attention returned for the empty caption when the checkpoint was
            trained.
    """
    folder = Path(out)
    refuse_existing(folder, "--out")
    run_config, checkpoint = load_config(Path(config)), Checkpoint(Path(file))
    check_kind(checkpoint, run_config.model)  # before a text encoder is loaded
    if run_config.model.text_padding != "attend":
        raise ConfigError(
            f"{config} has model.text_padding {run_config.model.text_padding}: it should be attend, as the released "
            "networks attend to pads"
        )
    trained = trained_resolution(checkpoint, run_config.model.patch_size)
    if trained is not None and resolution not in (None, trained):
        raise ConfigError(f"--resolution {resolution}: the checkpoint was trained at {trained}: leave it out")
    settings = _settings(run_config, trained or resolution, config)
    device = torch.device("cpu")
    conditioner = build_conditioner(settings, device, choose_dtype(settings.engine.dtype, device))
    imported = import_weights(checkpoint, settings, conditioner.width)
    null = _null_caption(conditioner, null_attention, settings, imported.report)
    check_finite([(NULL_CAPTION, null)], f"text.model {settings.text.model}")
    aside = folder.with_name(f".{folder.name}.importing")
    with name_in_errors(f"--out {out}"), FileLock(lock_beside(folder), f"--out {out}"):
        refuse_existing(folder, "--out")
        shutil.rmtree(aside, ignore_errors=True)
        write_model(aside, settings, imported.raw, imported.ema, null)
        write_json(aside / "import.json", asdict(imported.report))
        commit(aside, folder)
    print(_summary(folder, imported))


def _null_caption(conditioner: Conditioner, attention: NullAttention, settings: RunConfig, report: Report) -> Tensor:
    """States of the empty caption, or the null class."""
    if isinstance(conditioner, TextEncoder):
        report.notes.append(f"null_caption: computed by {settings.text.model}, null_attention {attention}")
        if settings.model.family == "pixeldit":
            report.notes.append(
                "text.instruction: the config's; the public model's pictures come under its own alone, to the letter"
            )
        return null_caption(conditioner, attention)
    if attention != "mean":
        raise ConfigError(f"--null_attention {attention} does nothing for class to image: leave it at mean")
    return conditioner.null_caption()


def _settings(config: RunConfig, resolution: int | None, path: str) -> RunConfig:
    """Settings of the config's last stage, or of the last at a resolution."""
    stages = [stage_config(config, number) for number in range(len(config.stages))] or [config]
    fitting = [stage for stage in stages if resolution is None or stage.data.size == (resolution, resolution)]
    if not fitting:
        raise ConfigError(f"{path}: data.resolution should be {resolution} in one of its stages")
    return fitting[-1]


def _summary(folder: Path, imported: Imported) -> str:
    report = imported.report
    count = sum(tensor.numel() for name, tensor in imported.ema.items() if name.startswith("denoiser."))
    keys = f"{len(report.used)} keys used, {len(report.recomputed)} recomputed, {len(report.left)} left"
    return "\n".join([f"{folder}: {count:,} parameters; {keys}: see import.json", *report.notes])


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    quiet(rank=0)
    return run((import_checkpoint,), args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
