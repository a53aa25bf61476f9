"""Colours by CLIP: what it is shown, what it is asked, and how the answer is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from tiny_geneval import save_clip
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from data.errors import UserError
from evaluation.geneval.mask2former import ClipColors, cut_out
from evaluation.geneval.mask2former import prepare_for_clip as prepare
from evaluation.geneval.prompts import COLORS
from evaluation.geneval.rules import Detection, Image


def noise(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detection(label: str, shape: tuple[int, int], box: tuple[int, int, int, int]) -> Detection:
    """An ellipse that fills its box."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    inside = ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2 < 0.25
    return Detection(label, 0.9, tuple(map(float, box)), inside)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_an_object_stands_alone_on_grey() -> None:
    image, found = noise(40, 60), detection("cat", (40, 60), (7, 5, 33, 21))
    alone = cut_out(image, found)
    # As GenEval does it: a composite with a picture of #999, cut by Pillow.
    grey = Pictures.new("RGB", (60, 40), "#999")
    expected = Pictures.composite(Pictures.fromarray(image), grey, Pictures.fromarray(found.mask)).crop(found.box)
    assert np.array_equal(alone, np.asarray(expected)) and alone.shape == (16, 26, 3)
    assert (alone[0, 0] == 0x99).all()


@pytest.mark.parametrize("size", [(300, 500), (90, 31), (224, 224), (1, 40)])
def test_pictures_are_prepared_as_clip_does(size: tuple[int, int]) -> None:
    """Against transformers' processor with its defaults, which are those of OpenAI's ViT-L/14."""
    image = noise(*size)
    expected = CLIPImageProcessor()(Pictures.fromarray(image), return_tensors="pt").pixel_values[0]
    # The two round the bicubic filter to 8 bits in different ways: a level is 0.015.
    assert (prepare(image) - expected).abs().max() < 0.1 and (prepare(image) - expected).abs().mean() < 0.004


def test_the_colour_is_that_of_the_nearest_mean_of_three_sentences(folder: Path) -> None:
    """A second way to the same answer: clip_benchmark's steps, one sentence and one picture at a time."""
    clip = ClipColors(str(folder))
    network, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    image = noise(64, 64)
    objects = [detection(label, (64, 64), (x, 8, x + 20, 50)) for x, label in enumerate(["cat", "wine glass"] * 10)]
    means: dict[str, torch.Tensor] = {}
    expected = []
    with torch.inference_mode():
        for label in ("cat", "wine glass"):
            each = []
            for color in COLORS:
                texts = (f"a photo of a {color} {label}", f"a photo of a {color}-colored {label}",
                         f"a photo of a {color} object")  # fmt: skip
                states = [network.text_model(**tokenizer([text], return_tensors="pt")).pooler_output for text in texts]
                named = [network.text_projection(state)[0] for state in states]
                mean = sum((one / one.norm() for one in named), torch.zeros(16)) / 3
                each.append(mean / mean.norm())
            means[label] = torch.stack(each)
            torch.testing.assert_close(clip._classifier(label), means[label], atol=1e-6, rtol=1e-5)
        for found in objects:
            picture = prepare(cut_out(image, found), 32)[None]
            seen = network.visual_projection(network.vision_model(picture).pooler_output)[0]
            expected.append(COLORS[int((means[found.label] @ seen).argmax())])
    assert torch.pdist(means["cat"]).mean() > 0.3 and len(set(expected)) > 1
    assert clip.colors(image, objects) == expected


def test_no_object_no_colour(folder: Path) -> None:
    assert ClipColors(str(folder)).colors(noise(8, 8), []) == []


def test_another_clip_is_refused_in_one_sentence(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="'no/such' is neither a folder nor in the Hugging Face cache: run 'hf downl"):
        ClipColors("no/such")
    with pytest.raises(UserError, match="is no CLIP of OpenAI's, whose activation is quick_gelu"):
        ClipColors(str(save_clip(tmp_path / "other", "gelu")))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"broken' cannot be loaded: "):
        ClipColors(str(broken))
