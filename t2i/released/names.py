"""How the released checkpoints call what our networks hold.

Every network has a table from our modules and parameters to theirs, where `*` is a block's number. Both sides fuse
alike: queries, keys and values of a block in one matrix, in this order; keys and values of the text; adaLN's shift,
scale and gate of attention, then of the MLP. Both rotate neighbouring channels as pairs. Of SwiGLU, PixelGen has gate
and up in one matrix, the gate first, as we do; PixelDiT has two. What is shaped or ordered in another way is in
layout.py.

The last block of PixelDiT for text to image has all of a block for its text, where we have keys and values alone: the
rest, `unread`, has no effect on the picture.

Names and shapes are those that the public code gives; they were not checked against a released file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from t2i.config import ModelConfig
from t2i.released.checkpoint import AVERAGE

TITLES: dict[str, str] = {"pixelgen": "PixelGen", "pixeldit": "PixelDiT"}
PREDICTIONS: dict[str, str] = {"pixelgen": "image", "pixeldit": "velocity"}
"""What the released networks of a family predict, as in model.prediction."""


class Prefixes(NamedTuple):
    """What names begin with in a checkpoint, by our files: raw and ema."""

    denoiser: dict[str, str]
    projector: dict[str, str]
    """Of representation alignment; Lightning's has no average."""


LIGHTNING = Prefixes({"raw": "denoiser.", "ema": "ema_denoiser."}, {"raw": "diffusion_trainer.proj.0."})
PLAIN = Prefixes(
    {"raw": "core.", "ema": f"{AVERAGE}.core."}, {"raw": "_repa_projector.", "ema": f"{AVERAGE}._repa_projector."}
)
"""Of PixelDiT for text to image."""

POSITIONS = "pos_embed"
"""The position table of PixelGen, which our networks compute."""


class Share(NamedTuple):
    """Of a released tensor, cut along its first axis into `of` equal parts, those from `first` up to, not including,
    `last`."""

    name: str
    first: int = 0
    last: int = 1
    of: int = 1

    @property
    def whole(self) -> bool:
        """Whether no part is left out."""
        return self.last - self.first == self.of


Table = Mapping[str, tuple[Share, ...]]
"""From our modules or parameters to what they are made of, one after the other along the first axis."""


def _table(names: Mapping[str, str]) -> Table:
    """`a.b+c` is a.b, then a.c."""
    table = {}
    for ours, theirs in names.items():
        stem, dot, ends = theirs.rpartition(".")
        table[ours] = tuple(Share(stem + dot + end) for end in ends.split("+"))
    return table


_TIME = {"time.mlp.0": "t_embedder.mlp.0", "time.mlp.2": "t_embedder.mlp.2"}
_ENDS = _TIME | {
    "patch_down": "x_embedder.proj1",
    "patch_up": "x_embedder.proj2",
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
_TEXT = {"text_in": "y_embedder.proj", "text_norm": "y_embedder.norm", "text_position": "y_pos_embedding"}

PIXELGEN_TEXT = _table(
    {
        **_ENDS,
        **_TEXT,
        **{f"text_blocks.*.{ours}": f"text_refine_blocks.*.{theirs}" for ours, theirs in _REFINER.items()},
        **{f"blocks.*.{ours}": f"blocks.*.{theirs}" for ours, theirs in _TEXT_BLOCK.items()},
    }
)
"""PixelGen for text to image (XXL), without its position table."""

PIXELGEN_CLASS = _table(
    {
        **_ENDS,
        "label": "y_embedder.embedding_table",
        "context_position": "in_context_posemb",
        "head_norm": "final_layer.norm_final",
        "head_adaln": "final_layer.adaLN_modulation.1",
        **{f"blocks.*.{ours}": f"blocks.*.{theirs}" for ours, theirs in _CLASS_BLOCK.items()},
    }
)
"""PixelGen for class to image with a bottleneck (L), without its position table; rotary tables are not stored."""

PIXELGEN_CLASS_DIRECT = {**PIXELGEN_CLASS, "patch_up": (Share("x_embedder.proj1"),)}
"""The same without a bottleneck (XL)."""

_ATTENTION = {f"attn.{name}": f"attn.{name}" for name in ("qkv", "q_norm", "k_norm")} | {"attn.out": "attn.proj"}
_PATCH_BLOCK = _ATTENTION | {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.gate_up": "mlp.w1+w3",
    "mlp.down": "mlp.w2",
    "adaln": "adaLN_modulation.0",
}
_PIXEL_BLOCK = _ATTENTION | {
    "adaln": "adaLN_modulation.0",
    "norm1": "norm1",
    "compress": "compress_to_attn",
    "expand": "expand_from_attn",
    "norm2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_PIXELDIT = {
    **_TIME,
    "patch_in": "s_embedder.proj",
    "pixels.embed": "pixel_embedder.proj",
    **{f"pixels.blocks.*.{ours}": f"pixel_blocks.*.{theirs}" for ours, theirs in _PIXEL_BLOCK.items()},
    "pixels.norm": "final_layer.norm",
    "pixels.head": "final_layer.linear",
}

PIXELDIT_CLASS = _table(
    {
        **_PIXELDIT,
        "label": "y_embedder.embedding_table",
        **{f"blocks.*.{ours}": f"patch_blocks.*.{theirs}" for ours, theirs in _PATCH_BLOCK.items()},
    }
)
"""PixelDiT for class to image."""


def _joint_block(ours: str, letter: str, adaln: str) -> dict[str, str]:
    """One of the two streams of a joint block."""
    attention = {f"attn.{name}": f"attn.{name}_{letter}" for name in ("qkv", "q_norm", "k_norm")}
    stream = attention | {
        "attn.out": f"attn.proj_{letter}",
        "norm1": f"norm_{letter}1",
        "norm2": f"norm_{letter}2",
        "mlp.gate_up": f"mlp_{letter}.w1+w3",
        "mlp.down": f"mlp_{letter}.w2",
        "adaln": f"{adaln}.0",
    }
    return {f"blocks.*.{ours}.{name}": f"patch_blocks.*.{released}" for name, released in stream.items()}


PIXELDIT_TEXT = _table(
    {
        **_PIXELDIT,
        **_TEXT,
        **_joint_block("image", "x", "adaLN_modulation_img"),
        **_joint_block("text", "y", "adaLN_modulation_txt"),
    }
)
"""PixelDiT for text to image; the text's part of its last block is `_text_end`."""


def _text_end(number: int) -> Table:
    return {
        f"blocks.{number}.text.attn.kv": (Share(f"patch_blocks.{number}.attn.qkv_y", 1, 3, 3),),
        f"blocks.{number}.text.adaln": (Share(f"patch_blocks.{number}.adaLN_modulation_txt.0", 0, 2, 6),),
    }


PROJECTOR_TABLE = _table({"layers.0": "0", "layers.2": "2", "layers.4": "4"})
"""The projector of representation alignment."""

_NUMBER = re.compile(r"(?<=blocks\.)\d+")


def prefixes(model: ModelConfig) -> Prefixes:
    """Those of a config's network."""
    return PLAIN if (model.family, model.condition) == ("pixeldit", "text") else LIGHTNING


def denoiser_table(model: ModelConfig) -> Table:
    """The table of a config's network."""
    if model.family == "pixeldit":
        return PIXELDIT_CLASS if model.condition == "class" else {**PIXELDIT_TEXT, **_text_end(model.depth - 1)}
    if model.condition == "text":
        return PIXELGEN_TEXT
    return PIXELGEN_CLASS if model.bottleneck else PIXELGEN_CLASS_DIRECT


def unread(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the denoiser's tensors in a checkpoint that our network has no place for at all, by their names there,
    without a prefix."""
    if (model.family, model.condition) != ("pixeldit", "text"):
        return {}
    width, hidden = model.width, 8 * model.width // 3
    end: dict[str, tuple[int, ...]] = {
        "attn.q_norm_y.weight": (width // model.heads,),
        "attn.proj_y.weight": (width, width),
        "attn.proj_y.bias": (width,),
        "norm_y2.weight": (width,),
        "mlp_y.w1.weight": (hidden, width),
        "mlp_y.w3.weight": (hidden, width),
        "mlp_y.w2.weight": (width, hidden),
    }
    return {f"patch_blocks.{model.depth - 1}.{name}": shape for name, shape in end.items()}


def released_shares(table: Table, name: str) -> tuple[Share, ...]:
    """What one of our parameters is made of in a checkpoint.

    Args:
        table: one of this module's.
        name: ours.

    Raises:
        KeyError: the table does not have it.
    """
    general, number = _NUMBER.sub("*", name), _NUMBER.search(name)
    module, _, parameter = name.rpartition(".")
    general_module = general.rpartition(".")[0]
    if general in table:
        shares, end = table[general], ""
    else:
        shares, end = table.get(module) or table[general_module], f".{parameter}"
    return tuple(
        share._replace(name=share.name.replace("*", number.group() if number else "*") + end) for share in shares
    )
