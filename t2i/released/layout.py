"""Tensors that the public code shapes, orders or means in another way than our networks.

- PixelGen for class to image makes its patch embedding of convolutions: (O, 3, p, p) for pixels, (O, I, 1, 1) between
  bottleneck and width. Flattened they are our matrices, since our patches are channel-major. Its head's outputs are the
  values of a patch pixel by pixel (row, column, channel), ours channel by channel.
- PixelDiT for text to image predicts noise - image, so its head is ours negated. (Its time, 1000 where all is noise, is
  our network's own affair.)

The other two take their patches apart and put them together as we do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from t2i.config import ModelConfig
from t2i.released.names import Share

_CHANNELS = 3


def _is_convolution(name: str, model: ModelConfig) -> bool:
    of_classes = (model.family, model.condition) == ("pixelgen", "class")
    return of_classes and name in ("patch_down.weight", "patch_up.weight")


def _is_pixelwise(name: str, model: ModelConfig) -> bool:
    return (model.family, model.condition) == ("pixelgen", "class") and name in ("head.weight", "head.bias")


def _is_negated(name: str, model: ModelConfig) -> bool:
    return (model.family, model.condition) == ("pixeldit", "text") and name.startswith("pixels.head.")


def released_sizes(name: str, size: Sequence[int], shares: Sequence[Share], model: ModelConfig) -> list[list[int]]:
    """Shapes that the tensors have in a checkpoint of which one of our denoiser's is made.

    Args:
        name: ours.
        size: its shape here.
        shares: what it is made of.
    """
    rest = [*size[1:]]
    if _is_convolution(name, model):
        of_pixels = name == "patch_down.weight" or not model.bottleneck
        kernel = model.patch_size if of_pixels else 1
        rest = [size[1] // kernel**2, kernel, kernel]
    rows = size[0] // sum(share.last - share.first for share in shares)
    return [[rows * share.of, *rest] for share in shares]


def from_released(name: str, tensors: Sequence[Tensor], shares: Sequence[Share], model: ModelConfig) -> Tensor:
    """Tensors of a checkpoint, of `released_sizes`, as our denoiser has them. `name` is ours."""
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
    """The reverse of `from_released`. Where our network has nothing, it is what was `kept` of the checkpoint by names
    there, else zero."""
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
