"""GenEval's detector: Mask2Former Swin-S for COCO's 80 classes, and CLIP ViT-L/14 for the colours of objects.

- Mask2Former is transformers'; its weights are OpenMMLab's, with which published scores were made, or the Hugging Face
  hub's, whose scores do not compare; the identity says which. Pre- and post-processing are mmdet 2.x's. Input: resized
  by OpenCV's bilinear filter, without antialiasing, padded with grey 128 to a multiple of 32, and only then normalized.
  Output: the 100 best of all pairs of query and class, each with its query's mask, which is upsampled bilinearly to the
  padded size, cut to the image, resized to the image's size, and thresholded at 0. Masks may overlap, unlike in
  transformers' own post-processing.
- A colour's embedding is the mean of three sentences', each normalized, normalized again (clip_benchmark's zero-shot
  classifier). An object's image is its box, with #999999 outside its mask, prepared as OpenAI's CLIP does: short side
  to 224 pixels by Pillow's antialiased bicubic filter, centre crop. GenEval ran both in half precision; here fp32.
- Nothing is downloaded: a model is a folder or file, or what the Hugging Face cache has under its name. A file whose
  name contains its SHA-256, as in OpenMMLab's and in that cache, is checked against it.

Source: Cheng et al. 2022; mmdet 2.28 (configs/mask2former, maskformer_fusion_head.py); Ghosh et al. 2023,
evaluation/evaluate_images.py.

Q = queries, C = classes and "no object", h x w = a quarter of the padded image.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from PIL.Image import fromarray
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, normalize, pil_to_tensor, resize
from transformers import AutoTokenizer, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.utils import logging

from data.errors import UserError
from data.files import refuse_lfs_pointers, sha256
from evaluation.geneval import openmmlab
from evaluation.geneval.prompts import CLASSES, COLORS
from evaluation.geneval.rules import Detection, Image, Thresholds

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""File names of weights in a folder, in transformers' order of preference."""
_IN_NAME = re.compile(r"-([0-9a-f]{8})\.pth")  # OpenMMLab's
_BLOB = re.compile(r"[0-9a-f]{64}")  # what a large file of the Hugging Face cache is a link to


def cached(name: str) -> Path | None:
    """The folder in the Hugging Face cache that holds a model's configuration, or None."""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name of a model
        return None
    return Path(found).parent if isinstance(found, str) else None


def weight_file(folder: Path) -> Path:
    """The file with the weights in a folder of transformers'; a UserError if there is none."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no weights: {' or '.join(_WEIGHTS)} should be there")


def identify(path: Path, published: Collection[str]) -> dict[str, Any]:
    """Which weights a file holds: "file", "sha256", and "pinned", whether it is a published one.

    Args:
        published: SHA-256 of the published files, or their first digits.

    Raises:
        UserError: its name has another hash than its content, or it is a Git LFS pointer.
    """
    refuse_lfs_pointers(path, "weights")
    digest = sha256(path)
    named = _IN_NAME.search(path.name)
    blob = _BLOB.fullmatch(path.resolve().name)
    claimed = named[1] if named else blob[0] if blob else ""
    if not digest.startswith(claimed):
        raise UserError(f"{path} is damaged: its SHA-256 is {digest}, its name says {claimed}; download it again")
    return {"file": path.name, "sha256": digest, "pinned": digest.startswith(tuple(published))}


@contextmanager
def exact() -> Iterator[None]:
    """Run networks in fp32 without TF32 or autocast, whatever the training run around this uses."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


CLIP = "openai/clip-vit-large-patch14"
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
_PUBLISHED_CLIP = (
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",  # model.safetensors
    "f1a17cdbe0f36fec524f5cafb1c261ea3bbbc13e346e0f74fc9eb0460dedd0d3",  # pytorch_model.bin
)
_BACKGROUND = 0x99
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 16


def cut_out(image: Image, found: Detection) -> Image:
    """The object's box of the image, grey outside its mask."""
    x0, y0, x1, y1 = (round(edge) for edge in found.box)
    alone = np.where(found.mask[..., None], image, np.uint8(_BACKGROUND))
    return alone[y0:y1, x0:x1]


def prepare_for_clip(image: Image, size: int = 224) -> Tensor:
    """CLIP's input, (3, size, size)."""
    small = resize(fromarray(image), [size], InterpolationMode.BICUBIC)
    return normalize(pil_to_tensor(center_crop(small, [size, size])).float() / 255, list(_CLIP_MEAN), list(_CLIP_STD))


class ClipColors:
    """Names the colours of objects, with a CLIP from a folder of transformers' or by name from the Hugging Face cache.

    Raises:
        UserError: the weights are missing, damaged, or not of an OpenAI CLIP.
    """

    def __init__(self, name: str = CLIP, device: torch.device | str = "cpu") -> None:
        folder = Path(name) if Path(name).is_dir() else cached(name)
        if folder is None:
            raise UserError(
                f"clip {name!r} is neither a folder nor in the Hugging Face cache: run 'hf download {CLIP}', or give "
                "the folder of a copy"
            )
        file = weight_file(folder)
        self.identity: dict[str, Any] = {"name": "CLIP", "model": name, **identify(file, _PUBLISHED_CLIP)}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, use_safetensors=file.suffix == ".safetensors"
            )
        except (OSError, ValueError) as error:
            raise UserError(f"clip {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        activations = {network.config.text_config.hidden_act, network.config.vision_config.hidden_act}
        if activations != {"quick_gelu"}:
            raise UserError(f"clip {name!r} is no CLIP of OpenAI's, whose activation is quick_gelu")
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
                for index in self._most_similar(image, objects[start : start + _BATCH])
            ]

    def _most_similar(self, image: Image, objects: Sequence[Detection]) -> list[int]:
        pictures = torch.stack([prepare_for_clip(cut_out(image, found), self._size) for found in objects]).to(
            self._device
        )
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


OPENMMLAB = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
OPENMMLAB_URL = (
    f"https://download.openmmlab.com/mmdetection/v2.0/mask2former/{OPENMMLAB.partition('_2022')[0]}/{OPENMMLAB}"
)
HUGGING_FACE = "facebook/mask2former-swin-small-coco-instance"
# Of OpenMMLab's file, as its name has it: the first digits of its SHA-256.
_PUBLISHED = ("743b7d99",)
_SHORT, _LONG, _MULTIPLE, _PADDING = 800, 1333, 32, 128
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_MOST = 100
# Weights that files may lack or have without effect: a norm that the backbone's outputs do not pass through, the loss's
# class weights, and a table of positions that older versions of transformers saved.
_UNUSED = ("swin.layernorm.weight", "swin.layernorm.bias", "criterion.empty_weight", "relative_position_index")


def prepare(image: Image) -> tuple[Tensor, tuple[int, int]]:
    """The network's input (1, 3, H, W), H and W multiples of 32, and the height and width of the image in it."""
    height, width = image.shape[:2]
    scale = min(_LONG / max(height, width), _SHORT / min(height, width))
    kept = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = cv2.resize(image, kept[::-1], interpolation=cv2.INTER_LINEAR)
    below, right = (-length % _MULTIPLE for length in kept)
    padded = np.pad(resized, ((0, below), (0, right), (0, 0)), constant_values=_PADDING)
    normalised = ((padded - np.array(_MEAN)) / np.array(_STD)).astype(np.float32)
    return torch.from_numpy(normalised).movedim(-1, 0)[None], kept


def to_detections(
    classes_QC: Tensor, masks_Qhw: Tensor, padded: tuple[int, int], kept: tuple[int, int], size: tuple[int, int]
) -> list[Detection]:
    """Detections, the most confident first, from the network's logits for one image.

    Args:
        padded, kept, size: height and width of the network's input, of the image in it, and of the original image.
    """
    scores = classes_QC.softmax(-1)[:, :-1]
    best, places = scores.flatten().topk(min(_MOST, scores.numel()))
    objects = {}
    for query in {place // scores.shape[1] for place in places.tolist()}:
        objects[query] = _mask(masks_Qhw[query], padded, kept, size)
    found = []
    for score, place in zip(best.tolist(), places.tolist(), strict=True):
        query, label = divmod(place, scores.shape[1])
        mask, quality = objects[query]
        if mask.any():
            found.append(Detection(CLASSES[label], score * quality, _box(mask), mask))
    return sorted(found, key=lambda detection: -detection.score)


def _mask(
    logits_hw: Tensor, padded: tuple[int, int], kept: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], float]:
    """A query's mask at the original size, and its quality: the mean probability inside it."""
    logits = F.interpolate(logits_hw[None, None], padded, mode="bilinear", align_corners=False)
    logits = F.interpolate(logits[..., : kept[0], : kept[1]], size, mode="bilinear", align_corners=False)[0, 0]
    mask = logits > 0
    quality = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
    return mask.cpu().numpy(), quality.item()


def _box(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[float, float, float, float]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class Mask2FormerDetector:
    """A `Detector`: objects by Mask2Former, colours by CLIP; `weights` says in the identity which weights it has."""

    def __init__(
        self,
        network: Mask2FormerForUniversalSegmentation,
        weights: dict[str, Any],
        clip: ClipColors,
        device: torch.device | str = "cpu",
    ) -> None:
        self.thresholds = Thresholds()
        self.classes: tuple[str, ...] = CLASSES
        self._network = network.eval().requires_grad_(False).to(device)
        self._weights, self._clip, self._device = weights, clip, torch.device(device)

    @property
    def identity(self) -> dict[str, Any]:
        """Names, settings, versions and hashes."""
        return {
            "name": "Mask2Former Swin-S",
            "weights": self._weights,
            "colors": self._clip.identity,
            "thresholds": asdict(self.thresholds),
            "input": {"short_side": _SHORT, "long_side": _LONG, "multiple": _MULTIPLE},
            "transformers": transformers.__version__,
        }

    def detect(self, image: Image) -> list[Detection]:
        """The 100 best pairs of mask and class, the most confident first."""
        pixels, kept = prepare(image)
        with exact():
            out = self._network(pixel_values=pixels.to(self._device))
            padded = pixels.shape[2], pixels.shape[3]
            logits = out.class_queries_logits[0], out.masks_queries_logits[0]
            return to_detections(*logits, padded, kept, (image.shape[0], image.shape[1]))

    def colors(self, image: Image, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object, one of GenEval's ten."""
        return self._clip.colors(image, objects)


def build(weights: str = OPENMMLAB, clip: str = CLIP, device: torch.device | str = "cpu") -> Mask2FormerDetector:
    """Load the detector; `clip` is as for `ClipColors`.

    Args:
        weights: OpenMMLab's checkpoint (.pth), a folder of transformers', or a name in the Hugging Face cache; a file
            name alone is also looked for where PyTorch keeps downloaded checkpoints (torch.hub.get_dir()).

    Raises:
        UserError: weights are missing, damaged, or of another network.
    """
    colors = ClipColors(clip, device)
    network, identity = load_network(weights)
    return Mask2FormerDetector(network, identity, colors, device)


def load_network(
    weights: str, config: Mask2FormerConfig | None = None
) -> tuple[Mask2FormerForUniversalSegmentation, dict[str, Any]]:
    """Mask2Former and its identity, see `build`; `config` is of an OpenMMLab checkpoint, by default Swin-S."""
    places = (Path(weights), Path(torch.hub.get_dir(), "checkpoints", weights))
    file = next((path for path in places if path.is_file()), None)
    if file is not None:
        identity = {"source": "OpenMMLab", **identify(file, _PUBLISHED)}
        named = openmmlab.convert(openmmlab.read(file))
        return _load(weights, None, config=config or swin_s(), state_dict=named), identity
    folder = Path(weights) if Path(weights).is_dir() else cached(weights)
    if folder is None:
        raise UserError(
            f"detector weights {weights!r} are neither a file nor a folder nor in the Hugging Face cache: download "
            f"{OPENMMLAB_URL} and give its path, or run 'hf download {HUGGING_FACE}' and give that name"
        )
    file = weight_file(folder)
    identity = {"source": "transformers", "model": weights, **identify(file, ())}
    return _load(weights, folder, use_safetensors=file.suffix == ".safetensors"), identity


def swin_s() -> Mask2FormerConfig:
    """The network of OpenMMLab's mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco."""
    backbone: dict[str, Any] = {
        "embed_dim": 96,
        "depths": [2, 2, 18, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    classes: dict[str, Any] = {"num_labels": len(CLASSES)}
    return Mask2FormerConfig(backbone_config=SwinConfig(**backbone), **classes)


def _load(weights: str, folder: Path | None, **options: Any) -> Mask2FormerForUniversalSegmentation:
    kind: Any = Mask2FormerForUniversalSegmentation
    network: Mask2FormerForUniversalSegmentation
    try:
        with _quiet():
            network, loaded = kind.from_pretrained(
                folder,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below
                **options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"detector weights {weights!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if network.config.num_labels != len(CLASSES):
        raise UserError(
            f"detector weights {weights!r} know {network.config.num_labels} classes, and COCO has {len(CLASSES)}"
        )
    wrong = {name for name, *_ in loaded["mismatched_keys"]} | loaded["missing_keys"] | loaded["unexpected_keys"]
    wrong = {name for name in wrong if not name.endswith(_UNUSED)}
    if wrong:
        raise UserError(
            f"detector weights {weights!r} are not those of this network: {min(wrong)} is missing, unknown, or of "
            "another shape"
        )
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of what a file lacks, which `_load` checks."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
