"""How the released checkpoints call what our networks hold.

Every network has a table from our modules and parameters to theirs, where `*` is a block's number. Both sides fuse
alike, so that tensors go over as they are: queries, keys and values of a block in one matrix, in this order; keys and
values of the text; gate and up of SwiGLU, the gate first; adaLN's shift, scale and gate of attention, then of the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_IN_EVERY_BLOCK = {
    "norm1": "norm1",
    "attn.q_norm": "attn.q_norm",
    "attn.k_norm": "attn.k_norm",
    "attn.out": "attn.proj",
    "norm2": "norm2",
    "mlp.gate_up": "mlp.w12",
    "mlp.down": "mlp.w3",
    "adaln": "adaLN_modulation.0",
}
_BLOCKS = {
    ("text_blocks", "text_refine_blocks"): {**_IN_EVERY_BLOCK, "attn.qkv": "attn.qkv"},
    ("blocks", "blocks"): {**_IN_EVERY_BLOCK, "attn.qkv": "attn.qkv_x", "attn.context_kv": "attn.kv_y"},
}

TEXT_TO_IMAGE = {
    "patch_down": "x_embedder.proj1",
    "patch_up": "x_embedder.proj2",
    "time.mlp.0": "t_embedder.mlp.0",
    "time.mlp.2": "t_embedder.mlp.2",
    "text_in": "y_embedder.proj",
    "text_norm": "y_embedder.norm",
    "text_position": "y_pos_embedding",
    "head": "final_layer.linear",
    **{
        f"{ours}.*.{part}": f"{theirs}.*.{their_part}"
        for (ours, theirs), parts in _BLOCKS.items()
        for part, their_part in parts.items()
    },
}
"""PixelGen for text to image (XXL), without its position table, which is computed."""

PROJECTOR = {"layers.0": "0", "layers.2": "2", "layers.4": "4"}
"""The projector of representation alignment."""

_NUMBER = re.compile(r"(?<=blocks\.)\d+")


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
