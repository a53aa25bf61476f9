"""Names, shapes and orders of the released checkpoints' tensors, and the networks that they belong to.

- Each network has a table from our modules and parameters to theirs, where `*` is a block's number. Both fuse queries,
  keys and values in one matrix, keys and values of the text, and adaLN's shift, scale and gate of attention, then of
  the MLP. Both rotate neighbouring channels as pairs. SwiGLU's gate and up are one matrix in PixelGen, as here, and two
  in PixelDiT.
- The last block of PixelDiT from text has a whole block for its text, of which we have keys and values only: the rest,
  `unused_weights`, has no effect on the image.
- PixelGen for classes has convolutions as patch embedding: (O, 3, p, p) for pixels, (O, I, 1, 1) between bottleneck and
  width; flattened they are our matrices. Its head orders a patch's values by (row, column, channel), ours by channel
  first.
- PixelDiT from text predicts noise - image, so its head is ours negated.

Names and shapes come from the public code; they were not checked against a released file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t2i.config.base import ConfigError
from t2i.config.model import PixelConfig
from t2i.config.run import ModelConfig
from t2i.released.checkpoint import AVERAGE, Checkpoint

TITLES: dict[str, str] = {"pixelgen": "PixelGen", "pixeldit": "PixelDiT"}
PREDICTIONS: dict[str, str] = {"pixelgen": "image", "pixeldit": "velocity"}
"""What the released networks of a family predict, as in model.prediction."""


class Prefixes(NamedTuple):
    """Prefixes of names in a checkpoint, by our files: raw and ema."""

    denoiser: dict[str, str]
    projector: dict[str, str]
    """Of representation alignment; Lightning's has no EMA."""


LIGHTNING = Prefixes({"raw": "denoiser.", "ema": "ema_denoiser."}, {"raw": "diffusion_trainer.proj.0."})
PLAIN = Prefixes(
    {"raw": "core.", "ema": f"{AVERAGE}.core."}, {"raw": "_repa_projector.", "ema": f"{AVERAGE}._repa_projector."}
)
"""Of PixelDiT from text."""

POSITIONS = "pos_embed"
"""The position table of PixelGen, which our networks compute."""


class Share(NamedTuple):
    """Rows of a released tensor: cut along its first axis into `of` equal parts, those from `first` to before
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
"""From our modules or parameters to the shares that they consist of, concatenated along the first axis."""


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
    return PLAIN if (model.family, model.condition) == ("pixeldit", "text") else LIGHTNING


def denoiser_table(model: ModelConfig) -> Table:
    """The table of a config's network."""
    if model.family == "pixeldit":
        return PIXELDIT_CLASS if model.condition == "class" else {**PIXELDIT_TEXT, **_text_end(model.depth - 1)}
    if model.condition == "text":
        return PIXELGEN_TEXT
    return PIXELGEN_CLASS if model.bottleneck else PIXELGEN_CLASS_DIRECT


def unused_weights(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a released denoiser's tensors that our network has no place for, by their names there without a
    prefix."""
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
    """The shares of a checkpoint that make one of our parameters; a KeyError if the table does not have it."""
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


class Network(NamedTuple):
    """What distinguishes released networks; `family` and `condition` are the config's."""

    family: str
    condition: str
    width: int
    depth: int


class _Sign(NamedTuple):
    """The tensor that identifies a kind of network, the axis of it that is the width, and the name of its blocks."""

    prefixes: Prefixes
    name: str
    axis: int
    blocks: str


_SIGNS = {  # in this order: PixelDiT for classes has that embedding, too
    ("pixeldit", "text"): _Sign(PLAIN, "s_embedder.proj.weight", 0, "patch_blocks"),
    ("pixeldit", "class"): _Sign(LIGHTNING, "s_embedder.proj.weight", 0, "patch_blocks"),
    ("pixelgen", "text"): _Sign(LIGHTNING, "y_embedder.proj.weight", 0, "blocks"),
    ("pixelgen", "class"): _Sign(LIGHTNING, "y_embedder.embedding_table.weight", 1, "blocks"),
}
_SHIPPED = {
    Network("pixelgen", "text", 1536, 16): "PixelGen-XXL/16 for text to image, as in configs/pixelgen_xxl.yaml",
    Network("pixelgen", "class", 1152, 28): "PixelGen-XL/16 for class to image, as in configs/pixelgen_xl.yaml",
    Network("pixelgen", "class", 1024, 24): "PixelGen-L/16 for class to image, as in configs/pixelgen_l.yaml",
    Network("pixeldit", "text", 1536, 14): "PixelDiT-T2I for text to image, as in configs/pixeldit_t2i.yaml",
    Network("pixeldit", "class", 1152, 26): "PixelDiT-XL/16 for class to image, as in configs/pixeldit_xl.yaml",
    Network("pixeldit", "class", 1024, 22): "PixelDiT-L/16 for class to image, as in configs/pixeldit_l.yaml",
    Network("pixeldit", "class", 768, 12): "PixelDiT-B/16 for class to image, as in configs/pixeldit_b.yaml",
}


def network_of(checkpoint: Checkpoint) -> Network | None:
    """The checkpoint's network; None if it is not a PixelGen or PixelDiT."""
    for (family, condition), sign in _SIGNS.items():
        for prefix in sign.prefixes.denoiser.values():
            stored = checkpoint.weights.get(prefix + sign.name)
            if stored is not None and len(stored.size) == 2:
                numbers = [re.match(rf"{re.escape(prefix)}{sign.blocks}\.(\d+)\.", name) for name in checkpoint.weights]
                depth = 1 + max((int(number[1]) for number in numbers if number), default=-1)
                return Network(family, condition, stored.size[sign.axis], depth)
    return None


def network_name(checkpoint: Checkpoint) -> str:
    """The network in words, with its config if there is one."""
    network = network_of(checkpoint)
    if network is None:
        return "an unknown network"
    family, condition, width, depth = network
    return _SHIPPED.get(network, f"{TITLES[family]} for {condition} to image, {depth} blocks of width {width}")


def check_released(model: ModelConfig) -> None:
    """Raise a ConfigError if networks of a config's kind were not released."""
    prediction = PREDICTIONS[model.family]
    if model.prediction != prediction:
        raise ConfigError(
            f"model.prediction {model.prediction}: it should be {prediction} for the released layout of "
            f"{TITLES[model.family]}"
        )
    for name in ("attention", "tokens_per_patch", "modulation"):
        value, default = getattr(model.pixel, name), PixelConfig.model_fields[name].default
        if value != default:
            raise ConfigError(f"model.pixel.{name} {value}: it should be {default} for the released layout of PixelDiT")


def check_kind(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raise a ConfigError if a checkpoint is not of the config's family, condition and prediction, or none such was
    released."""
    if (network := network_of(checkpoint)) is not None:
        # Name all needed changes at once.
        expected = {"family": network.family, "condition": network.condition, "prediction": PREDICTIONS[network.family]}
        wrong = [
            f"model.{field} should be {value}, not {getattr(model, field)}"
            for field, value in expected.items()
            if getattr(model, field) != value
        ]
        if wrong:
            raise ConfigError(f"{checkpoint.path} is {network_name(checkpoint)}: the config's {' and '.join(wrong)}")
    check_released(model)


_CHANNELS = 3


def _is_convolution(name: str, model: ModelConfig) -> bool:
    of_classes = (model.family, model.condition) == ("pixelgen", "class")
    return of_classes and name in ("patch_down.weight", "patch_up.weight")


def _is_pixelwise(name: str, model: ModelConfig) -> bool:
    return (model.family, model.condition) == ("pixelgen", "class") and name in ("head.weight", "head.bias")


def _is_negated(name: str, model: ModelConfig) -> bool:
    return (model.family, model.condition) == ("pixeldit", "text") and name.startswith("pixels.head.")


def released_sizes(name: str, size: Sequence[int], shares: Sequence[Share], model: ModelConfig) -> list[list[int]]:
    """Shapes in a checkpoint of the `shares` that make our parameter `name` of shape `size`."""
    rest = [*size[1:]]
    if _is_convolution(name, model):
        of_pixels = name == "patch_down.weight" or not model.bottleneck
        kernel = model.patch_size if of_pixels else 1
        rest = [size[1] // kernel**2, kernel, kernel]
    rows = size[0] // sum(share.last - share.first for share in shares)
    return [[rows * share.of, *rest] for share in shares]


def from_released(name: str, tensors: Sequence[Tensor], shares: Sequence[Share], model: ModelConfig) -> Tensor:
    """Our denoiser's parameter `name` from tensors of a checkpoint, which have `released_sizes`."""
    tensor = tensors[0]
    if len(shares) > 1 or not shares[0].whole:
        tensor = torch.cat([_rows(tensor, share) for tensor, share in zip(tensors, shares, strict=True)])
    if _is_convolution(name, model):
        return tensor.flatten(1)
    if _is_pixelwise(name, model):
        pixelwise = tensor.unflatten(0, (model.patch_size, model.patch_size, _CHANNELS))
        return pixelwise.movedim(2, 0).flatten(0, 2)
    return -tensor if _is_negated(name, model) else tensor


def to_released(
    name: str, tensor: Tensor, shares: Sequence[Share], model: ModelConfig, kept: Mapping[str, Tensor]
) -> list[Tensor]:
    """The reverse of `from_released`. Rows that our network has not come from `kept`, tensors of the imported
    checkpoint by their names there, else they are zero."""
    sizes = released_sizes(name, tensor.shape, shares, model)
    if _is_pixelwise(name, model):
        channelwise = tensor.unflatten(0, (_CHANNELS, model.patch_size, model.patch_size))
        tensor = channelwise.movedim(0, 2).flatten(0, 2)
    elif _is_negated(name, model):
        tensor = -tensor
    if len(shares) == 1 and shares[0].whole:
        return [tensor.reshape(sizes[0])]
    made = [
        kept[share.name].clone() if share.name in kept else tensor.new_zeros(size)
        for share, size in zip(shares, sizes, strict=True)
    ]
    wanted = [_rows(whole, share) for whole, share in zip(made, shares, strict=True)]
    for rows, ours in zip(wanted, tensor.split([len(rows) for rows in wanted]), strict=True):
        rows.copy_(ours)
    return made


def _rows(tensor: Tensor, share: Share) -> Tensor:
    """A share of a whole, as a view."""
    part = len(tensor) // share.of
    return tensor[share.first * part : share.last * part]
