"""The frozen language model that reads captions.

- Any Hugging Face text model; its last hidden states (after the final norm) of a caption padded on the right to
  a fixed number of tokens, without a prompt template. The denoiser sees the states of the pads too.
- The null caption of guidance and caption dropout is the empty caption. Where a tokeniser makes no token of it,
  its pads are encoded under an all-ones mask: what a fully masked row gives is a library's choice.
- Captions are encoded in batches of one fixed size, so that a caption's states do not depend on its
  neighbours, and may be cached: a small data set repeats its captions.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from data.errors import UserError

ENCODE_BATCH = 16


def resolve_model(name: str) -> str:
    """A Hugging Face name or folder as it is; `package:NAME/FOLDER` becomes a folder of an installed package.

    Raises:
        UserError: the package or folder is not there.
    """
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"text.model {name!r}: the Python package {package!r} is not installed")
    path = Path(spec.origin).parent / folder
    if not path.is_dir():
        raise UserError(f"text.model {name!r}: {package!r} holds no folder {folder!r}")
    return str(path)


class TextEncoder(nn.Module):
    """A frozen text model with its tokeniser.

    Args:
        name: see `resolve_model`.
        length: tokens a caption is padded or cut to.
        dtype: of the weights and of the states.
        cache: captions whose states are kept in memory (the latest used); 0 keeps none.

    Raises:
        UserError: the weights or the tokeniser cannot be loaded.
    """

    def __init__(self, name: str, length: int, dtype: torch.dtype = torch.bfloat16, cache: int = 0) -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        path = resolve_model(name)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
            self.net = AutoModel.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"text.model {name!r} cannot be loaded: {reason}") from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.width: int = self.net.config.hidden_size
        self.dtype = dtype
        self.length = length
        self._cache_size = cache
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def _encode_batch(self, captions: list[str]) -> Tensor:
        filled = captions + [""] * (ENCODE_BATCH - len(captions))
        tokens = self.tokenizer(
            filled, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.net.device)
        mask = tokens["attention_mask"]
        mask[mask.sum(1) == 0] = 1
        states = self.net(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        return states[: len(captions)]

    def forward(self, captions: list[str]) -> Tensor:
        """States (B, length, width) of the captions, on the encoder's device."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._cache]
        for start in range(0, len(missing), ENCODE_BATCH):
            chunk = missing[start : start + ENCODE_BATCH]
            for caption, states in zip(chunk, self._encode_batch(chunk), strict=True):
                self._cache[caption] = states.clone()
        for caption in captions:
            self._cache.move_to_end(caption)
        batch = torch.stack([self._cache[caption] for caption in captions])
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return batch

    def null_caption(self) -> Tensor:
        """States (length, width) of the empty caption."""
        return self([""])[0]
