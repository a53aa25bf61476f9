"""The null caption's states: computed once in a run, and kept with the run and its models."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from data.files import atomic_write
from t2i.build import condition_identity
from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.model_folder import NULL_CAPTION, check_finite, read_model
from t2i.models.conditions import Conditioner
from t2i.models.text import check_same_text
from t2i.train.places import StagePlace


def find_null_caption(config: RunConfig, place: StagePlace, conditioner: Conditioner) -> Tensor:
    """The states (L, E) or class () of the run, else of the model that the stage starts from, else computed.

    Raises:
        ConfigError: the run's or the model's were made with another text encoder or other classes, or are not finite.
    """
    path, source = place.null_caption, config.init.source
    fresh, made_by = conditioner.null_caption(), condition_identity(config)
    check_finite([(NULL_CAPTION, fresh)], f"text.model {config.text.model}")
    if path.exists():
        with safe_open(path, framework="pt") as file:
            about, states = file.metadata() or {}, file.get_tensor(NULL_CAPTION)
        stored_by = about.get("text")
        if stored_by != made_by:
            raise ConfigError(
                f"{path} was computed with {stored_by}, this run has {made_by}: a run keeps its text "
                "section and its classes; give this one another name"
            )
        if about.get("text_model", "") != config.text.model and config.model.condition == "text":  # it may have moved
            check_same_text(states, fresh, f"text.model {config.text.model}", str(path))
        return states.to(fresh)
    if source not in ("previous", "scratch"):
        saved = read_model(Path(source), config.init.weights)
        if saved.config.model.text_padding != config.model.text_padding or saved.null_caption.shape != fresh.shape:
            raise ConfigError(
                f"init.source {source} has another text encoder, text.length, model.text_padding or model.condition "
                "than this run"
            )
        return saved.null_caption.to(fresh)
    return fresh


def store_null_caption(config: RunConfig, place: StagePlace, states: Tensor) -> None:
    """Keep it with the run, unless it is there. On rank 0."""
    if place.null_caption.exists():
        return
    about = {"text": condition_identity(config), "text_model": config.text.model}
    atomic_write(place.null_caption, save({NULL_CAPTION: states.contiguous().cpu()}, metadata=about))
