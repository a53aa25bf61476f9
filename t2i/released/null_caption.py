"""The null caption of the released models, which their checkpoints do not hold.

PixelGen was trained on what Qwen3 makes of an empty caption: 128 pads, all of them masked. What attention then returns
was a library's choice, and one of two: the mean of the values, as without a mask, or zero. No record says which.
PixelDiT's is what Gemma-2 makes of one, which has a first token to attend to.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from t2i.config_base import ConfigError
from t2i.models.text import TextEncoder

NullAttention = Literal["mean", "zero"]


def null_caption(encoder: TextEncoder, attention: NullAttention) -> Tensor:
    """States (L, E) of the empty caption.

    Args:
        attention: what it returns where every token is masked.

    Raises:
        ConfigError: zero is asked of an encoder to which it does not apply.
    """
    if attention == "mean":
        # All pads are one token, and their values alike: any weights over them give the mean.
        return encoder.null_caption()
    with encoder.loaded() as net:
        outputs = [module for name, module in net.named_modules() if name.endswith("self_attn.o_proj")]
        if not outputs or encoder.tokenizer("")["input_ids"]:
            raise ConfigError(
                "null_attention zero: it should be mean for this text.model, which is no decoder of Qwen's kind or "
                "makes tokens of an empty caption"
            )
        hooks = [module.register_forward_pre_hook(_nothing) for module in outputs]
        try:
            return encoder.null_caption()
        finally:
            for hook in hooks:
                hook.remove()


def _nothing(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.zeros_like(arguments[0]),)
