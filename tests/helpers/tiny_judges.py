"""Tiny judges with random weights, saved as transformers reads them: one of each kind that answers questions."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
    ViltProcessor,
)

_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = ["is", "there", "a", "dog", "cat", "the", "red", "collar", "yes", "no", "?"]
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)


def _bert(folder: Path) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*_BERT, *_WORDS]))
    return BertTokenizer(str(folder / "vocab.txt"))


def _make_loud(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights so large that answers differ between pictures and questions."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # else what is added outweighs what is seen
            torch.nn.init.normal_(parameter, std=0.5)


def save_vilt(folder: Path) -> Path:
    """A classifier of the answers yes, no and red."""
    labels = {0: "yes", 1: "no", 2: "red"}
    config = ViltConfig(
        vocab_size=len(_BERT) + len(_WORDS), image_size=32, patch_size=8, max_image_length=6, id2label=labels,
        label2id={label: n for n, label in labels.items()}, **_SIZES,
    )  # fmt: skip
    model = ViltForQuestionAnswering(config)
    _make_loud(model, seed=11)
    model.save_pretrained(folder)
    ViltProcessor(ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8), _bert(folder)).save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    """A model that writes its answer."""
    tokenizer = _bert(folder)
    tokens = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    tokens |= {"pad_token_id": tokenizer.pad_token_id, "sep_token_id": tokenizer.sep_token_id}
    text = {**_SIZES, **tokens, "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 32}
    vision = {**_SIZES, "image_size": 32, "patch_size": 8}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
    _make_loud(model)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    """A chat model that sees."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*special.values(), "<image>", "<assistant>", *_WORDS, "Answer", "with", "or", "."]
    tokens = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    extra = {"additional_special_tokens": ["<image>", "<assistant>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **special, **extra)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True
    )
    LlavaProcessor(
        image_processor, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=_CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **_SIZES),
            text_config=Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, **_SIZES),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    _make_loud(model)
    model.generation_config.suppress_tokens = [tokenizer.convert_tokens_to_ids("<image>")]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return folder
