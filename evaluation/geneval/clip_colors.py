"""The colour of an object, by CLIP ViT-L/14, as GenEval asks for it.

- A colour's embedding is the mean of three sentences', each normalised, normalised again (clip_benchmark's zero-shot
  classifier); the object's colour is that which its picture is most alike to.
- An object's picture is the image with #999999 wherever it is not, cut to its box, and prepared as OpenAI's CLIP does:
  short side to 224 pixels by Pillow's antialiased bicubic filter, the centre 224 x 224 of that.
- fp32; GenEval ran both sides in half precision, by autocast.

Source: Ghosh et al. 2023, evaluation/evaluate_images.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import fromarray
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, normalize, pil_to_tensor, resize
from transformers import AutoTokenizer, CLIPModel

from data.errors import UserError
from evaluation.geneval.detection import Detection, Image
from evaluation.geneval.networks import cached, exact, identify, weight_file
from evaluation.geneval.prompts import COLORS

CLIP = "openai/clip-vit-large-patch14"
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
_PUBLISHED = (
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",  # model.safetensors
    "f1a17cdbe0f36fec524f5cafb1c261ea3bbbc13e346e0f74fc9eb0460dedd0d3",  # pytorch_model.bin
)
_BACKGROUND = 0x99
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 16


def cut_out(image: Image, found: Detection) -> Image:
    """The object's picture: its box of the image, grey around its mask."""
    x0, y0, x1, y1 = (round(edge) for edge in found.box)
    alone = np.where(found.mask[..., None], image, np.uint8(_BACKGROUND))
    return alone[y0:y1, x0:x1]


def prepare(image: Image, size: int = 224) -> Tensor:
    """(3, size, size) as CLIP takes it."""
    small = resize(fromarray(image), [size], InterpolationMode.BICUBIC)
    return normalize(pil_to_tensor(center_crop(small, [size, size])).float() / 255, list(_MEAN), list(_STD))


class ClipColors:
    """Names the colours of objects.

    Args:
        name: a folder with weights and tokeniser as transformers saves them, or a name in the Hugging Face cache.
        device: where it runs.

    Raises:
        UserError: the weights are not there, damaged, or not of an OpenAI CLIP.
    """

    def __init__(self, name: str = CLIP, device: torch.device | str = "cpu") -> None:
        folder = Path(name) if Path(name).is_dir() else cached(name)
        if folder is None:
            raise UserError(
                f"clip {name!r} is neither a folder nor in the Hugging Face cache: run 'hf download {CLIP}', or give "
                "the folder of a copy"
            )
        file = weight_file(folder)
        self.identity: dict[str, Any] = {"name": "CLIP", "model": name, **identify(file, _PUBLISHED)}
        """Which weights they are."""
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, use_safetensors=file.suffix == ".safetensors"
            )
        except (OSError, ValueError) as error:
            raise UserError(f"clip {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        activations = {network.config.text_config.hidden_act, network.config.vision_config.hidden_act}
        if activations != {"quick_gelu"}:
            raise UserError(f"clip {name!r} is no CLIP of OpenAI's: its activation should be quick_gelu")
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        self._size = int(network.config.vision_config.image_size)
        self._embeddings: dict[str, Tensor] = {}  # by class: (10, width)

    def colors(self, image: Image, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object, one of `COLORS`."""
        with exact():
            return [
                COLORS[index]
                for start in range(0, len(objects), _BATCH)
                for index in self._most_alike(image, objects[start : start + _BATCH])
            ]

    def _most_alike(self, image: Image, objects: Sequence[Detection]) -> list[int]:
        pictures = torch.stack([prepare(cut_out(image, found), self._size) for found in objects]).to(self._device)
        seen = self._network.visual_projection(self._network.vision_model(pictures).pooler_output)
        named = torch.stack([self._classifier(found.label) for found in objects])
        indices: list[int] = torch.einsum("nd,ncd->nc", F.normalize(seen, dim=-1), named).argmax(-1).tolist()
        return indices

    def _classifier(self, label: str) -> Tensor:
        """The colours' embeddings for objects of a class, (10, width)."""
        if label not in self._embeddings:
            sentences = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            tokens = self._tokenizer(sentences, padding=True, return_tensors="pt").to(self._device)
            states = self._network.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            each = F.normalize(self._network.text_projection(states), dim=-1)
            self._embeddings[label] = F.normalize(each.unflatten(0, (len(COLORS), -1)).mean(1), dim=-1)
        return self._embeddings[label]
