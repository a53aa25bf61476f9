"""Judges: models that answer questions about a picture, through transformers, by name or path.

Three kinds are told apart by what transformers knows them as: classifiers of questions and pictures (ViLT), models that
write an answer (BLIP), and chat models that see (Qwen2.5-VL, LLaVA, SmolVLM), which are asked for yes or no.
Questions are put one at a time, so that no answer depends on what is asked beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForVisualQuestionAnswering, AutoProcessor

from data.errors import UserError
from data.files import refuse_lfs_pointers

Answer = Callable[[Image.Image, str], str]

CHAT_REQUEST = "{question} Answer with yes or no."
"""What a chat model is asked."""
_MAX_TOKENS = 10


@dataclass(frozen=True)
class Judge:
    """A model that answers.

    Attributes:
        name: as it was asked for.
        answer: from a picture and a question to the answer.
        weights_blake2b: a hash of its weights.
    """

    name: str
    answer: Answer
    weights_blake2b: str


def load(name: str, device: torch.device) -> Judge:
    """A judge, from the hub's cache, the hub or a folder.

    Raises:
        UserError: transformers cannot load it, or it is of none of the kinds.
    """
    try:
        config = type(AutoConfig.from_pretrained(name))
        # BLIP-2 is known as both, and answers questions as the former.
        kinds = (AutoModelForVisualQuestionAnswering, AutoModelForImageTextToText)
        kind = next((it for it in kinds if config in it._model_mapping), None)
        if kind is None:
            raise UserError(f"--judge {name} ({config.__name__}) is no model that answers questions about a picture")
        processor = AutoProcessor.from_pretrained(name)
        model: Any = kind.from_pretrained(name, dtype="auto")
        model.to(device).eval()
    except UserError:
        raise
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        refuse_lfs_pointers(Path(name), f"--judge {name}")
        raise UserError(f"--judge {name} cannot be loaded: {' '.join(str(error).split())}") from error
    if kind is AutoModelForImageTextToText:
        answer = _chats(model, processor)
    else:
        answer = _writes(model, processor) if hasattr(model, "generate") else _classifies(model, processor)
    return Judge(name, torch.inference_mode()(answer), _digest(model))


def _classifies(model: Any, processor: Any) -> Answer:
    def answer(image: Image.Image, question: str) -> str:
        inputs = processor(images=image, text=question, return_tensors="pt", truncation=True)
        with torch.random.fork_rng(devices=()):  # ViLT draws the order of its patches, and which if they are too many
            torch.manual_seed(0)
            logits = model(**inputs.to(model.device, model.dtype)).logits
        return str(model.config.id2label[int(logits.argmax())])

    return answer


def _writes(model: Any, processor: Any) -> Answer:
    def answer(image: Image.Image, question: str) -> str:
        inputs = processor(images=image, text=question, return_tensors="pt")
        tokens = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=_MAX_TOKENS, do_sample=False)
        return str(processor.decode(tokens[0], skip_special_tokens=True)).strip()

    return answer


def _chats(model: Any, processor: Any) -> Answer:
    def answer(image: Image.Image, question: str) -> str:
        asked = {"type": "text", "text": CHAT_REQUEST.format(question=question)}
        messages = [{"role": "user", "content": [{"type": "image", "image": image}, asked]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=_MAX_TOKENS, do_sample=False)
        written = tokens[0, inputs["input_ids"].shape[1] :]
        return str(processor.decode(written, skip_special_tokens=True)).strip()

    return answer


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
