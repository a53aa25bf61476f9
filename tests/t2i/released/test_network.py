"""A checkpoint is refused by a config of another network, with the name of the network that it is of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from released_cases import CASES, XL, XXL, L, stored
from released_class_pixelgen import class_denoiser_shapes
from released_pixelgen import denoiser_shapes, random_weights

from t2i.config_base import ConfigError
from t2i.config_loading import load_config, validate_config
from t2i.released.convert import import_weights
from t2i.released.network import check_condition

ROOT = Path(__file__).parents[3]
SHIPPED = {"xxl": denoiser_shapes(XXL), "xl": class_denoiser_shapes(XL), "l": class_denoiser_shapes(L)}
TITLES = {"xxl": "PixelGen-XXL/16 for text to image", "xl": "PixelGen-XL/16 for class to image"}
TITLES["l"] = "PixelGen-L/16 for class to image"


@pytest.mark.parametrize(("of", "given"), [(of, given) for of in SHIPPED for given in SHIPPED if of != given])
def test_a_checkpoint_of_another_size_or_task_says_what_it_is(of: str, given: str, tmp_path: Path) -> None:
    weights = {f"denoiser.{name}": torch.zeros(1).expand(shape) for name, shape in SHIPPED[of].items()}
    checkpoint, run = stored(tmp_path / "x.ckpt", weights), load_config(ROOT / f"configs/pixelgen_{given}.yaml")
    named = f"{TITLES[of]}, as in configs/pixelgen_{of}.yaml"
    with pytest.raises(ConfigError, match=f"x.ckpt, {named}, is of another network than the config's model: it lacks"):
        import_weights(checkpoint, run, 2048)
    conditions = ["text" if size == "xxl" else "class" for size in (of, given)]
    if conditions[0] == conditions[1]:
        check_condition(checkpoint, run.model)
        return
    sentence = f"x.ckpt is {named}: the config's model.condition should be {conditions[0]}, not {conditions[1]}"
    with pytest.raises(ConfigError, match=sentence):
        check_condition(checkpoint, run.model)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"width": 96, "heads": 6}, r"in_context_posemb is \[1, 3, 48\], by the config \[1, 3, 96\]"),
        ({"heads": 4}, r"attn.q_norm.weight is \[16\], by the config \[12\]"),
        ({"bottleneck": 12}, r"x_embedder.proj1.weight is \[10, 3, 4, 4\], by the config \[12, 3, 4, 4\]"),
        ({"bottleneck": 0}, r"it lacks denoiser.x_embedder.proj1.bias"),
        ({"classes": 6}, r"y_embedder.embedding_table.weight is \[6, 48\], by the config \[7, 48\]"),
        ({"context_tokens": 2}, r"in_context_posemb is \[1, 3, 48\], by the config \[1, 2, 48\]"),
        ({"depth": 5}, r"PixelGen for class to image, 4 blocks of width 48, .* it lacks denoiser.blocks.4"),
        ({"patch_size": 2}, r"x_embedder.proj1.weight is \[10, 3, 4, 4\], by the config \[10, 3, 2, 2\]"),
    ],
)
def test_another_network_for_classes_is_refused(sizes: dict[str, int], words: str, tmp_path: Path) -> None:
    case = CASES["L"]
    checkpoint = stored(tmp_path / "x.ckpt", random_weights(case.shapes, 11))
    tree = case.run.model_dump()
    tree["model"] |= sizes
    with pytest.raises(ConfigError, match=words):
        import_weights(checkpoint, validate_config(tree, "the test"), 0)
