"""Tensors that the public code shapes or orders in another way than our networks: all of class to image.

- The patch embedding is made of convolutions there: (O, 3, p, p) for pixels, (O, I, 1, 1) between bottleneck and width.
  Flattened they are our matrices, since our patches are channel-major.
- The head's outputs are the values of a patch pixel by pixel (row, column, channel), ours channel by channel.

Text to image takes its patches apart and puts them together channel by channel, as we do.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from t2i.config import ModelConfig

_CHANNELS = 3


def released_size(name: str, size: Sequence[int], model: ModelConfig) -> list[int]:
    """Shape that one of our denoiser's tensors has in a checkpoint.

    Args:
        name: ours.
        size: its shape here.
    """
    if model.condition == "class" and name in ("patch_down.weight", "patch_up.weight"):
        of_pixels = name == "patch_down.weight" or not model.bottleneck
        kernel = model.patch_size if of_pixels else 1
        return [size[0], size[1] // kernel**2, kernel, kernel]
    return [*size]


def from_released(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """A tensor of a checkpoint, of `released_size`, as our denoiser has it. `name` is ours."""
    if model.condition == "class" and name in ("patch_down.weight", "patch_up.weight"):
        return tensor.flatten(1)
    if model.condition == "class" and name in ("head.weight", "head.bias"):
        pixelwise = tensor.unflatten(0, (model.patch_size, model.patch_size, _CHANNELS))
        return pixelwise.movedim(2, 0).flatten(0, 2)
    return tensor


def to_released(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """The reverse of `from_released`."""
    if model.condition == "class" and name in ("head.weight", "head.bias"):
        channelwise = tensor.unflatten(0, (_CHANNELS, model.patch_size, model.patch_size))
        return channelwise.movedim(0, 2).flatten(0, 2)
    return tensor.reshape(released_size(name, tensor.shape, model))
