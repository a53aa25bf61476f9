"""Conditions of a denoiser: states of a caption from a frozen text encoder, or a class.

- The text encoder is any Hugging Face text model: its last hidden states (after the final norm) of a caption, without a
  chat template. Encoder-decoders use their encoder, models of text and images the part that reads text.
- An instruction may precede a caption ("complex human instruction" of SANA, Xie et al. 2024). The states of its own
  tokens are dropped; those of a decoder's later tokens depend on them.
- Padding attend pads a caption on the right to a fixed number of tokens, whose states the denoiser reads. Padding mask
  pads it to a multiple of 32 tokens, and the states of pads are zero.
- The null caption (guidance, caption dropout) is the empty caption without instruction. A tokenizer that makes no token
  of it gets pads, since the states of a fully masked row are a library's choice.
- Captions are encoded in batches of one fixed size, so that a caption's states do not depend on its neighbours.
- With classes, a caption is the label in digits, "207", and the empty caption is the null class.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data.errors import UserError, shortened
from data.files import refuse_lfs_pointers
from t2i.distributed import to_device


class Conditioner(Protocol):
    """Turns captions into a denoiser's conditions: `TextEncoder` or `ClassLabels`."""

    width: int
    """Width E of a caption's states; 0 for classes."""
    dtype: torch.dtype
    """Of the conditions."""

    def __call__(self, captions: list[str], plain: bool = False) -> list[Tensor]:
        """Each caption's states (L, E), whose lengths may differ, or class (), on its device; do not write to them.

        `plain` leaves out text.instruction, as negative prompts do; the empty caption never has it.
        """

    def cut(self, captions: Sequence[str], plain: bool = False) -> int:
        """How many captions are longer than the encoder reads."""

    def null_caption(self) -> Tensor:
        """The condition of the empty caption: states or a class."""


def stack_conditions(conditions: Sequence[Tensor], length: int = 0) -> Tensor:
    """Captions' states as one tensor (B, L, E), padded with zeros to the longest and at least to `length`, or their
    classes (B,)."""
    if conditions[0].ndim == 0:
        return torch.stack(list(conditions))
    states = pad_sequence(list(conditions), batch_first=True)
    return F.pad(states, (0, 0, 0, max(0, length - states.shape[1])))


class ClassLabels:
    """Labels 0 ... `classes` - 1; the number `classes` is the null class."""

    width = 0
    dtype = torch.long

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self._device = device

    def _number(self, caption: str) -> int:
        if not caption:
            return self.classes
        label = int(caption) if caption.isascii() and caption.isdigit() else self.classes
        if label >= self.classes:
            raise UserError(
                f"the caption {shortened(caption)!r} is no class: model.condition is class and model.classes "
                f"{self.classes}, so a caption is a number from 0 to {self.classes - 1}"
            )
        return label

    def __call__(self, captions: list[str], plain: bool = False) -> list[Tensor]:
        """Labels (), int64; plain or not, a label is the same.

        Raises:
            UserError: a caption is no label.
        """
        return list(to_device(np.array([self._number(caption) for caption in captions], np.int64), self._device))

    def cut(self, captions: Sequence[str], plain: bool = False) -> int:
        """None is."""
        return 0

    def null_caption(self) -> Tensor:
        """The null class (), int64."""
        return self([""])[0]


ENCODE_BATCH = 16
ENCODERS_ALONE = ("t5", "mt5", "umt5")
"""Encoder-decoders whose encoder transformers can load without the decoder."""
LENGTH_STEP = 32
"""Padding mask rounds lengths up to multiples of it, so that a compiler sees few shapes."""

SAME_STATES = 0.1
"""States at a smaller relative distance come from the same encoder: bf16 gives about 0.01, another model about 1."""

Key = tuple[str, bool]  # a caption, and whether the instruction comes before it


def resolve_model(name: str) -> str:
    """A Hugging Face name or folder unchanged; `package:NAME/FOLDER` as a folder of an installed package."""
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
    folder = resolve_model(name)
    try:
        return auto.from_pretrained(folder, **options)
    except MemoryError:
        raise
    except Exception as error:  # a missing tokenizer package, torn weights, an unknown model, ...
        refuse_lfs_pointers(Path(folder), f"text.model {name!r}")
        reason = [*str(error).splitlines(), type(error).__name__][0]
        raise UserError(f"text.model {name!r} cannot be loaded: {reason}") from error


def check_same_text(stored: Tensor, computed: Tensor, where: str, of: str) -> None:
    """Raise a UserError if a text encoder is not the one that computed a stored null caption.

    Args:
        stored, computed: states (L, E) of the empty caption, perhaps in different precision.
        where: the field or option that names the encoder.
        of: what the stored states belong to.
    """
    computed = computed.to(stored)
    if stored.shape != computed.shape or (stored - computed).norm() > SAME_STATES * stored.norm():
        raise UserError(
            f"{where} is not the text encoder of {of}: its states of the empty caption differ (they always do for a "
            "model imported with --null_attention zero: put a link at the old path instead)"
        )


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that loads no more of this model than its text encoder needs."""
    from transformers import AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if config.model_type in ENCODERS_ALONE else AutoModel


def text_part(net: Any) -> Any:
    """The module that reads text: an encoder-decoder's encoder, a multimodal model's text tower or language model, or
    the model itself."""
    if net.config.is_encoder_decoder:
        return net.get_encoder()
    if net.config.get_text_config() is net.config:
        return net
    part = net.get_decoder()  # transformers' name for the module of `text_config`
    return part if part is not net else net.get_encoder()


def load_text_model(name: str, dtype: torch.dtype, **options: Any) -> Any:
    """The part of a model that reads text, with its weights."""
    from transformers import AutoConfig

    auto = auto_class(_load(AutoConfig, name, **options))
    net, found = _load(auto, name, dtype=dtype, output_loading_info=True, **options)
    try:
        part = text_part(net)
    except ValueError:  # several text configurations
        part = net
    if not {"input_ids", "attention_mask"} <= signature(part.forward).parameters.keys():
        raise UserError(f"text.model {name!r}: {type(net).__name__} has no part that reads text alone: take another")
    own = {id(p) for p in part.parameters()}
    missing = [
        n for n, p in net.named_parameters() if n in found["missing_keys"] and id(p) in own and "pooler" not in n
    ]
    if missing:
        raise UserError(
            f"text.model {name!r}: {len(missing)} weights of its {type(part).__name__} are missing, the first "
            f"{missing[0]}: give a model that has them"
        )
    return part.eval().requires_grad_(False)


def check_length(name: str, net: Any, length: int, instruction: int = 0) -> None:
    """Refuse captions of `length` tokens, after `instruction` tokens, for which a model has no positions."""
    most = getattr(net.config.get_text_config(), "max_position_embeddings", None) or 0
    if most <= 0:  # unlimited
        return
    words = net.get_input_embeddings()
    for table in net.modules():
        # RoBERTa-like models do not use the positions up to the pad's index.
        if isinstance(table, nn.Embedding) and table is not words and table.num_embeddings == most:
            most -= 0 if table.padding_idx is None else table.padding_idx + 1
            break
    if length + instruction > most:
        asked = f"text.length {length}" + (f" and the {instruction} of text.instruction" if instruction else "")
        raise UserError(
            f"{asked} are more tokens than the {most} that text.model {name!r} has positions for: lower text.length to "
            f"{max(0, most - instruction)} or less"
        )


class TextEncoder(nn.Module):
    """A frozen text model with its tokenizer.

    Args:
        name: see `resolve_model`.
        length: tokens a caption is padded or cut to; under mask, the most it may have.
        cache: captions whose states are cached (the latest used).
        reload_every_step: hold the weights only while captions are encoded.
        compiled: compile the model; without, transformers waits for the device at each batch to look at its mask.
        instruction: words before captions, ending in a space.

    Raises:
        UserError: the weights or the tokenizer cannot be loaded, or `length` does not fit them.
    """

    def __init__(
        self,
        name: str,
        length: int,
        dtype: torch.dtype = torch.bfloat16,
        cache: int = 0,
        padding: Literal["attend", "mask"] = "attend",
        reload_every_step: bool = False,
        compiled: bool = False,
        instruction: str = "",
    ) -> None:
        super().__init__()
        from transformers import AutoTokenizer

        self._name = name
        self.tokenizer = _load(AutoTokenizer, name)
        self.tokenizer.truncation_side = "right"
        if self.tokenizer.pad_token is None:
            if self.tokenizer.eos_token is None:
                raise UserError(f"text.model {name!r}: its tokenizer has neither a pad nor an end token to pad with")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.dtype = dtype
        self.length = length
        self._masks = padding == "mask"
        self._compiled = compiled
        self._instruction = instruction
        # The instruction's first token stays (a decoder's begin token, a constant). Its last one takes no place: a
        # final space merges with the caption's first word, and an end token comes after the caption.
        self._skipped = max(0, len(self.tokenizer(instruction)["input_ids"]) - 2) if instruction else 0
        self._cache_size = cache
        self._cache: OrderedDict[Key, Tensor] = OrderedDict()
        self._place: Tensor
        self.register_buffer("_place", torch.empty(0), persistent=False)  # on the model's device, loaded or not
        if (own := self.tokenizer.num_special_tokens_to_add()) >= length:
            raise UserError(
                f"text.length {length} leaves no place for a caption: the tokenizer of text.model {name!r} adds {own} "
                f"tokens of its own; {own + 1} is the least"
            )
        net = self._load_net()
        check_length(name, net, length, self._skipped)
        self.width = self._measured_width(net)
        self.net: nn.Module | None = None if reload_every_step else net

    @torch.no_grad()
    def _measured_width(self, net: Any) -> int:
        pad, rows = self.tokenizer.pad_token_id, net.get_input_embeddings().num_embeddings
        if pad >= rows:
            raise UserError(
                f"text.model {self._name!r}: its tokenizer's pad token has number {pad}, and the model knows {rows} "
                "tokens: give a folder whose tokenizer is the model's own"
            )
        token = torch.tensor([[pad]], device=self._place.device)
        return net(input_ids=token, attention_mask=torch.ones_like(token)).last_hidden_state.shape[-1]

    def _load_net(self, **options: Any) -> Any:
        net = load_text_model(self._name, self.dtype, **options).to(self._place.device)
        if self._compiled:
            net.forward = torch.compile(net.forward)
        return net

    @contextmanager
    def loaded(self) -> Iterator[nn.Module]:
        """The language model; `reload_every_step` loads it now and frees it at the end."""
        if self.net is not None:
            yield self.net
            return
        self.net = self._load_net(local_files_only=True)  # found before: no request to the hub
        try:
            yield self.net
        finally:
            self.net = None

    def _tokens(self, captions: list[str], instructed: bool) -> list[list[int]]:
        """Tokens of each caption, with the instruction's; at least one."""
        pads = [self.tokenizer.pad_token_id] * (1 if self._masks else self.length)
        words = [self._instruction + caption for caption in captions] if instructed else captions
        found = self.tokenizer(words, truncation=True, max_length=self._most_tokens(instructed))["input_ids"]
        return [own or pads for own in found]

    def _most_tokens(self, instructed: bool) -> int:
        return self.length + (self._skipped if instructed else 0)

    def cut(self, captions: Sequence[str], plain: bool = False) -> int:
        """How many captions have more tokens than `length`, and are cut there."""
        count = 0
        for caption in captions:
            instructed = bool(self._instruction and caption) and not plain
            words = self._instruction + caption if instructed else caption
            count += len(self.tokenizer(words)["input_ids"]) > self._most_tokens(instructed)
        return count

    def _alike(self, captions: list[str], instructed: bool) -> Iterator[tuple[int, list[str], list[list[int]]]]:
        """Batches of captions of one length: how many states a row keeps, the captions and their tokens.

        Under mask, captions without pads are batched apart: where nothing is masked, transformers uses another kernel.
        """
        groups: dict[tuple[int, bool], list[tuple[str, list[int]]]] = defaultdict(list)
        for caption, own in zip(captions, self._tokens(captions, instructed), strict=True):
            kept = max(1, len(own) - (self._skipped if instructed else 0))
            row = min(-(-kept // LENGTH_STEP) * LENGTH_STEP, self.length) if self._masks else self.length
            groups[row, self._masks and kept == row].append((caption, own))
        for (row, _), group in groups.items():
            for start in range(0, len(group), ENCODE_BATCH):
                texts, tokens = zip(*group[start : start + ENCODE_BATCH], strict=True)
                yield row, list(texts), list(tokens)

    @torch.no_grad()
    def _encode_batch(self, net: nn.Module, row: int, tokens: list[list[int]], instructed: bool) -> Tensor:
        """States (B, row, width) of at most ENCODE_BATCH captions; the batch is filled up to it."""
        filled = tokens + tokens[:1] * (ENCODE_BATCH - len(tokens))
        pad, skipped = self.tokenizer.pad_token_id, self._skipped if instructed else 0
        pads = [row + skipped - len(own) for own in filled]
        rows = [own + [pad] * count for own, count in zip(filled, pads, strict=True)]
        seen = [[1] * len(own) + [0] * count for own, count in zip(filled, pads, strict=True)]
        ids, mask = (to_device(np.array(table, np.int64), self._place.device) for table in (rows, seen))
        states = net(input_ids=ids, attention_mask=mask).last_hidden_state
        states, mask = (torch.cat([table[:, :1], table[:, 1 + skipped :]], 1) for table in (states, mask))
        if self._masks:
            states = states.masked_fill(mask[..., None] == 0, 0)
        return states[: len(tokens)]

    def _encode(self, net: nn.Module, captions: list[str], instructed: bool) -> None:
        for row, texts, tokens in self._alike(captions, instructed):
            for caption, states in zip(texts, self._encode_batch(net, row, tokens, instructed), strict=True):
                self._cache[caption, instructed] = states.clone()

    def forward(self, captions: list[str], plain: bool = False) -> list[Tensor]:
        """Each caption's states (L, width), on the encoder's device; they are the cache's: do not write to them.

        L is `length`; under mask, the caption's own tokens rounded up to a multiple of LENGTH_STEP, at most `length`.
        With an instruction, the first state is that of the instruction's first token. `plain` leaves the instruction
        out, as negative prompts do; the empty caption never has it.
        """
        keys = [(caption, bool(self._instruction and caption) and not plain) for caption in captions]
        missing = [key for key in dict.fromkeys(keys) if key not in self._cache]
        if missing:
            with self.loaded() as net:
                for instructed in {kind for _, kind in missing}:
                    self._encode(net, [caption for caption, kind in missing if kind == instructed], instructed)
        for key in keys:
            self._cache.move_to_end(key)
        found = [self._cache[key] for key in keys]
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return found

    def null_caption(self) -> Tensor:
        """States (L, width) of the empty caption."""
        return self([""])[0]
