"""How the released checkpoints call what our networks hold.

Every network has a table from our modules and parameters to theirs, where `*` is a block's number. Both sides fuse
alike: queries, keys and values of a block in one matrix, in this order; keys and values of the text; gate and up of
SwiGLU, the gate first; adaLN's shift, scale and gate of attention, then of the MLP. Both rotate neighbouring channels
as pairs. What is shaped or ordered in another way is in layout.py.

Names and shapes are those that the public code gives; they were not checked against a released file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from t2i.config import ModelConfig

RELEASED_DENOISER = {"raw": "denoiser.", "ema": "ema_denoiser."}
RELEASED_PROJECTOR = "diffusion_trainer.proj.0."
POSITIONS = "pos_embed"
"""The position table, which our networks compute."""

_ENDS = {
    "patch_down": "x_embedder.proj1",
    "patch_up": "x_embedder.proj2",
    "time.mlp.0": "t_embedder.mlp.0",
    "time.mlp.2": "t_embedder.mlp.2",
    "head": "final_layer.linear",
}
_BLOCK = {
    "norm1": "norm1",
    "attn.q_norm": "attn.q_norm",
    "attn.k_norm": "attn.k_norm",
    "attn.out": "attn.proj",
    "norm2": "norm2",
    "mlp.gate_up": "mlp.w12",
    "mlp.down": "mlp.w3",
}
_REFINER = _BLOCK | {"adaln": "adaLN_modulation.0", "attn.qkv": "attn.qkv"}
_TEXT_BLOCK = _BLOCK | {"adaln": "adaLN_modulation.0", "attn.qkv": "attn.qkv_x", "attn.context_kv": "attn.kv_y"}
_CLASS_BLOCK = _BLOCK | {"adaln": "adaLN_modulation.1", "attn.qkv": "attn.qkv"}

TEXT_TO_IMAGE = {
    **_ENDS,
    "text_in": "y_embedder.proj",
    "text_norm": "y_embedder.norm",
    "text_position": "y_pos_embedding",
    **{f"text_blocks.*.{ours}": f"text_refine_blocks.*.{theirs}" for ours, theirs in _REFINER.items()},
    **{f"blocks.*.{ours}": f"blocks.*.{theirs}" for ours, theirs in _TEXT_BLOCK.items()},
}
"""PixelGen for text to image (XXL), without its position table."""

CLASS_TO_IMAGE = {
    **_ENDS,
    "label": "y_embedder.embedding_table",
    "context_position": "in_context_posemb",
    "head_norm": "final_layer.norm_final",
    "head_adaln": "final_layer.adaLN_modulation.1",
    **{f"blocks.*.{ours}": f"blocks.*.{theirs}" for ours, theirs in _CLASS_BLOCK.items()},
}
"""PixelGen for class to image with a bottleneck (L), without its position table; rotary tables are not stored."""

CLASS_TO_IMAGE_DIRECT = {**CLASS_TO_IMAGE, "patch_up": "x_embedder.proj1"}
"""The same without a bottleneck (XL)."""

PROJECTOR_TABLE = {"layers.0": "0", "layers.2": "2", "layers.4": "4"}
"""The projector of representation alignment."""

_NUMBER = re.compile(r"(?<=blocks\.)\d+")


def denoiser_table(model: ModelConfig) -> Mapping[str, str]:
    """The table of a config's network."""
    if model.condition == "text":
        return TEXT_TO_IMAGE
    return CLASS_TO_IMAGE if model.bottleneck else CLASS_TO_IMAGE_DIRECT


def released_names(table: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """From the released names of parameters to ours.

    Args:
        table: one of this module's.
        names: ours.

    Raises:
        KeyError: the table does not have one of them.
    """
    return {_released(table, name): name for name in names}


def _released(table: Mapping[str, str], name: str) -> str:
    general, number = _NUMBER.sub("*", name), _NUMBER.search(name)
    module, _, parameter = general.rpartition(".")
    released = table[general] if general in table else f"{table[module]}.{parameter}"
    return released.replace("*", number.group()) if number else released
