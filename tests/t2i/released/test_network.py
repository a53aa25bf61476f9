"""A checkpoint is refused by a config of another network, with the name of the network that it is of."""

from __future__ import annotations

from pathlib import Path

import pytest
import released_pixeldit_cases as cases
import torch
from released_cases import CASES, XL, XXL, L, stored
from released_class_pixelgen import class_denoiser_shapes
from released_pixeldit import dit_shapes
from released_pixelgen import denoiser_shapes, random_weights

from t2i.config.base import ConfigError
from t2i.config.loading import load_config, validate_config
from t2i.config.run import RunConfig
from t2i.released.checkpoint import Checkpoint
from t2i.released.convert import import_weights
from t2i.released.names import check_kind, network_of

ROOT = Path(__file__).parents[3]
SHIPPED = {"pixelgen_xxl": denoiser_shapes(XXL), "pixelgen_xl": class_denoiser_shapes(XL)}
SHIPPED |= {"pixelgen_l": class_denoiser_shapes(L), "pixeldit_t2i": dit_shapes(cases.T2I)}
SHIPPED |= {"pixeldit_xl": dit_shapes(cases.XL), "pixeldit_l": dit_shapes(cases.L), "pixeldit_b": dit_shapes(cases.B)}
TITLES = {
    "pixelgen_xxl": "PixelGen-XXL/16 for text to image",
    "pixelgen_xl": "PixelGen-XL/16 for class to image",
    "pixelgen_l": "PixelGen-L/16 for class to image",
    "pixeldit_t2i": "PixelDiT-T2I for text to image",
    "pixeldit_xl": "PixelDiT-XL/16 for class to image",
    "pixeldit_l": "PixelDiT-L/16 for class to image",
    "pixeldit_b": "PixelDiT-B/16 for class to image",
}


def run_of(name: str) -> RunConfig:
    if name.startswith("pixelgen"):
        return load_config(ROOT / f"configs/{name}.yaml")
    return cases.dit_config(getattr(cases, name.partition("_")[2].upper()))


def kind(name: str) -> dict[str, str]:
    family = name.partition("_")[0]
    condition = "text" if "for text" in TITLES[name] else "class"
    return {"family": family, "condition": condition, "prediction": "image" if family == "pixelgen" else "velocity"}


def checkpoint_of(name: str, path: Path) -> Checkpoint:
    prefix = "core." if name == "pixeldit_t2i" else "denoiser."
    weights = {f"{prefix}{key}": torch.zeros(1).expand(shape) for key, shape in SHIPPED[name].items()}
    return stored(path, weights)


@pytest.mark.parametrize(("of", "given"), [(of, given) for of in SHIPPED for given in SHIPPED if of != given])
def test_a_checkpoint_of_another_network_says_what_it_is(of: str, given: str, tmp_path: Path) -> None:
    checkpoint, run = checkpoint_of(of, tmp_path / "x.ckpt"), run_of(given)
    named = f"{TITLES[of]}, as in configs/{of}.yaml"
    another = f"x.ckpt, {named}, is of another network than the config's model: it (lacks|has) "
    wrong = [
        f"model.{field} should be {value}, not {kind(given)[field]}"
        for field, value in kind(of).items()
        if value != kind(given)[field]
    ]
    if wrong:
        with pytest.raises(ConfigError, match=f"x.ckpt is {named}: the config's {' and '.join(wrong)}$"):
            check_kind(checkpoint, run.model)
        return
    check_kind(checkpoint, run.model)
    with pytest.raises(ConfigError, match=another):
        import_weights(checkpoint, run, 2048)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_of_the_network_that_the_checkpoint_names(name: str, tmp_path: Path) -> None:
    model, network = load_config(ROOT / f"configs/{name}.yaml").model, network_of(checkpoint_of(name, tmp_path / "x"))
    assert network == (model.family, model.condition, model.width, model.depth)


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
