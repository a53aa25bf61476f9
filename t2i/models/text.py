"""The frozen language model that reads captions.

- Any Hugging Face text model; its last hidden states (after the final norm) of a caption padded on the right, without
  a prompt template.
- Under padding attend a caption is padded to a fixed number of tokens; the denoiser sees the states of the pads too.
- Under padding mask a caption is padded to a multiple of 32 tokens, and the states of the pads are zero.
- The null caption of guidance and caption dropout is the empty caption. Where a tokeniser makes no token of it, a pad
  is its token, under attend all pads are: what a fully masked row gives is a library's choice.
- Captions are encoded in batches of one fixed size, so that a caption's states do not depend on its neighbours, and may
  be cached: a small data set repeats its captions.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import UserError
from t2i.upload import upload

ENCODE_BATCH = 16
LENGTH_STEP = 32
"""Under padding mask, lengths are multiples of it: few shapes for a compiler."""


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


def _load(auto: Any, name: str, **options: Any) -> Any:
    """What one of transformers' Auto classes makes of a model's name."""
    try:
        return auto.from_pretrained(resolve_model(name), **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"text.model {name!r} cannot be loaded: {reason}") from error


class TextEncoder(nn.Module):
    """A frozen text model with its tokeniser.

    Args:
        name: see `resolve_model`.
        length: tokens a caption is padded or cut to; under mask, the most it may have.
        dtype: of the weights and of the states.
        cache: captions whose states are kept in memory (the latest used); 0 keeps none.
        padding: whether pads are encoded, too.
        release: hold the weights only while there are captions to encode.
        compiled: compile the model; eager, transformers waits for the device at each batch to look at its mask.

    Raises:
        UserError: the weights or the tokeniser cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        length: int,
        dtype: torch.dtype = torch.bfloat16,
        cache: int = 0,
        padding: Literal["attend", "mask"] = "attend",
        release: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoTokenizer

        self._name = name
        self.tokenizer = _load(AutoTokenizer, name)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.dtype = dtype
        self.length = length
        self._masks = padding == "mask"
        self._compiled = compiled
        self._cache_size = cache
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._place: Tensor
        self.register_buffer("_place", torch.empty(0), persistent=False)  # where the model belongs, loaded or not
        self.net: nn.Module | None = None if release else self._load_net()
        self.width: int = (_load(AutoConfig, name) if self.net is None else self.net.config).hidden_size

    def _load_net(self, **options: Any) -> Any:
        from transformers import AutoModel

        net = _load(AutoModel, self._name, dtype=self.dtype, **options)
        net.eval().requires_grad_(False).to(self._place.device)
        if self._compiled:
            net.forward = torch.compile(net.forward)
        return net

    @contextmanager
    def loaded(self) -> Iterator[nn.Module]:
        """The language model: under `release` loaded now, unless it is, and let go at the end."""
        if self.net is not None:
            yield self.net
            return
        self.net = self._load_net(local_files_only=True)  # once found, no hub is asked again
        try:
            yield self.net
        finally:
            self.net = None

    def _tokens(self, captions: list[str]) -> list[list[int]]:
        """Each caption's own tokens, one at least."""
        pads = [self.tokenizer.pad_token_id] * (1 if self._masks else self.length)
        found = self.tokenizer(captions, truncation=True, max_length=self.length)["input_ids"]
        return [own or pads for own in found]

    def _alike(self, captions: list[str]) -> Iterator[tuple[int, list[str], list[list[int]]]]:
        """Captions that may be encoded together: how many tokens a row has, and they with their tokens.

        Under mask those without pads are apart: where nothing is masked, transformers takes another kernel.
        """
        groups: dict[tuple[int, bool], list[tuple[str, list[int]]]] = defaultdict(list)
        for caption, own in zip(captions, self._tokens(captions), strict=True):
            row = min(-(-len(own) // LENGTH_STEP) * LENGTH_STEP, self.length) if self._masks else self.length
            groups[row, self._masks and len(own) == row].append((caption, own))
        for (row, _), group in groups.items():
            for start in range(0, len(group), ENCODE_BATCH):
                texts, tokens = zip(*group[start : start + ENCODE_BATCH], strict=True)
                yield row, list(texts), list(tokens)

    @torch.no_grad()
    def _encode_batch(self, net: nn.Module, row: int, tokens: list[list[int]]) -> Tensor:
        """States (B, row, width) of at most ENCODE_BATCH captions."""
        filled = tokens + tokens[:1] * (ENCODE_BATCH - len(tokens))
        pad = self.tokenizer.pad_token_id
        ids = upload(np.array([own + [pad] * (row - len(own)) for own in filled], np.int64), self._place.device)
        mask = upload(
            np.array([[1] * len(own) + [0] * (row - len(own)) for own in filled], np.int64), self._place.device
        )
        states = net(input_ids=ids, attention_mask=mask).last_hidden_state
        if self._masks:
            states = states.masked_fill(mask[..., None] == 0, 0)
        return states[: len(tokens)]

    def forward(self, captions: list[str]) -> list[Tensor]:
        """Each caption's states (L, width), on the encoder's device; they are the cache's, not to be written to.

        L is `length`; under mask, the caption's own tokens rounded up to a multiple of LENGTH_STEP, at most `length`.
        """
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._cache]
        if missing:
            with self.loaded() as net:
                for row, texts, tokens in self._alike(missing):
                    for caption, states in zip(texts, self._encode_batch(net, row, tokens), strict=True):
                        self._cache[caption] = states.clone()
        for caption in captions:
            self._cache.move_to_end(caption)
        found = [self._cache[caption] for caption in captions]
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return found

    def null_caption(self) -> Tensor:
        """States (L, width) of the empty caption."""
        return self([""])[0]
