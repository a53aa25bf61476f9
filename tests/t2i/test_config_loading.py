"""A config file on another: `base`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from t2i.config.base import ConfigError
from t2i.config.loading import dump_config, load_config


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """top.yaml on deep/middle.yaml on bottom.yaml, each counting more than the one below."""
    (tmp_path / "deep").mkdir()
    trees = {
        "bottom": {"name": "bottom", "seed": 3, "train": {"steps": 1, "batch_size": 256}, "stages": [{"name": "a"}]},
        "deep/middle": {"base": "../bottom.yaml", "train": {"steps": 2}, "stages": [{"name": "b"}, {"name": "c"}]},
        "top": {"base": "deep/middle.yaml", "name": "top", "ema": {"decay": 0.5}},
    }
    for name, tree in trees.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_a_file_changes_what_its_base_says(files: Path) -> None:
    config = load_config(files / "top.yaml")
    assert (config.name, config.seed, config.ema.decay) == ("top", 3, 0.5)
    assert (config.train.steps, config.train.batch_size) == (2, 256)
    assert [stage["name"] for stage in config.stages] == ["b", "c"]
    kept = files / "kept.yaml"  # as a run keeps it
    kept.write_text(dump_config(config))
    assert "base" not in yaml.safe_load(kept.read_text()) and load_config(kept) == config


@pytest.mark.parametrize(
    ("file", "tree", "sentence"),
    [
        ("bottom", {"base": "top.yaml"}, "top.yaml: base: this file is its own base, perhaps by way of others"),
        ("top", {"base": "absent.yaml"}, "absent.yaml, the base of {folder}/top.yaml: cannot be read: No such file"),
        ("top", {"base": None}, "top.yaml: base: must be the path of a config, relative to this file (got None)"),
        ("bottom", {"train": {"stepz": 1}}, "{folder}/deep/../bottom.yaml: unknown field 'train.stepz'"),
        ("bottom", [], "deep/../bottom.yaml: must be a mapping"),
        ("top", {"base": "bottom.yaml", "train": {"steps": 0}}, "{folder}/top.yaml: train.steps"),
    ],
)
def test_mistakes_in_a_base_name_the_file(files: Path, file: str, tree: Any, sentence: str) -> None:
    (files / f"{file}.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as caught:
        load_config(files / "top.yaml")
    assert sentence.format(folder=files) in str(caught.value) and "\n" not in str(caught.value)
