"""The config tree and its command line: strict, one sentence a mistake, and one order of precedence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import parse

from data.errors import UserError
from t2i.config.base import ConfigError, Section
from t2i.config.loading import check_world_size, dump_config, load_config, merge, stage_config, validate_config
from t2i.config.run import RunConfig

INF = float("inf")
ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("configs/**/*.yaml"))


def sections(root: type[Section] = RunConfig) -> list[type[Section]]:
    """A section and all below it."""
    found = [root]
    for field in root.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if is_section(part):
                found += sections(part)
    return found


def fields() -> list[tuple[type[Section], str]]:
    return [(section, name) for section in sections() for name in section.model_fields]


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def write(folder: Path, tree: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


# Mistakes


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"modell": {}}, "here: unknown field 'modell'; did you mean 'model'?"),
        ({"model": {"detph": 8}}, "here: unknown field 'model.detph'; did you mean 'depth'?"),
        (
            {"data": {"sources": [{"name": "a", "url": "b", "wieght": 2}]}},
            "unknown field 'data.sources.0.wieght'; did you mean 'weight'?",
        ),
        (
            {"data": {"sources": [{"name": "a", "ulr": "b"}]}},
            "unknown field 'data.sources.0.ulr'; did you mean 'url'?",
        ),
        ({"ema": {"qqq": 1}}, "here: unknown field 'ema.qqq'; known fields: decay"),
    ],
)
def test_an_unknown_key_is_refused_with_the_near_name(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(tree, "here")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"train": {"steps": "many"}}, ["train.steps", "integer", "'many'"]),
        ({"train": {"steps": 0}}, ["train.steps", "greater than 0", "got 0"]),
        ({"train": {"steps": 1.5}}, ["train.steps", "integer", "got 1.5"]),
        ({"train": "long"}, ["train", "'long'"]),
        ({"engine": {"dtype": "fp16"}}, ["engine.dtype", "'bf16'", "'fp32'", "got 'fp16'"]),
        ({"engine": {"zero_stage": 4}}, ["engine.zero_stage", "got 4"]),
        ({"engine": {"offload": True}}, ["engine", "offload", "zero_stage 3, not 1"]),
        ({"engine": {"name": "fsdp", "zero_stage": 3}}, ["engine", "zero_stage 3", "name fsdp", "leave it at 1"]),
        ({"engine": {"dp_replicate": 2}}, ["engine", "dp_replicate 2", "name deepspeed", "leave it at 1"]),
        ({"sampling": {"solver": "rk4"}}, ["sampling.solver", "'adams'", "got 'rk4'"]),
        ({"text": {"instruction": "Draw:"}}, ["text", "instruction must end with a space"]),
        ({"sampling": {"order": 5}}, ["sampling.order", "got 5"]),
        ({"sampling": {"solver": "heun", "order": 3}}, ["sampling", "order 3", "solver heun", "leave it at 2"]),
        ({"sampling": {"solver": "dpmpp", "order": 3}}, ["sampling", "order 3", "solver dpmpp", "leave it at 2"]),
        ({"sampling": {"order": 3, "coefficients": "fixed"}}, ["sampling", "fixed", "adams at order 2", "at order 3"]),
        ({"sampling": {"solver": "dpmpp", "coefficients": "fixed"}}, ["sampling", "fixed", "adams", "not with dpmpp"]),
        ({"sampling": {"cfg_interval": [0.9, 0.1]}}, ["sampling", "cfg_interval [0.9, 0.1]", "[low, high]"]),
        ({"sampling": {"cfg_interval": [2, 3]}}, ["sampling.cfg_interval.0", "less than or equal to 1", "got 2"]),
        ({"sampling": {"cfg_interval": [-0.1, 1]}}, ["sampling.cfg_interval.0", "greater than or equal to 0"]),
        ({"sampling": {"cfg_interval": [0, INF]}}, ["sampling.cfg_interval.1", "finite"]),
        ({"sampling": {"guidance_scale": INF}}, ["sampling.guidance_scale", "finite number", "got inf"]),
        ({"sampling": {"guidance_scale": "nan"}}, ["sampling.guidance_scale", "finite number", "got 'nan'"]),
        ({"objective": {"logit_mean": -INF}}, ["objective.logit_mean", "finite number"]),
        ({"optimizer": {"betas": [0.9, INF]}}, ["optimizer.betas.1"]),
        ({"timeouts": {"step_minutes": INF}}, ["timeouts.step_minutes", "finite number"]),
        ({"data": {"sources": [{"name": "a", "url": "b", "weight": INF}]}}, ["data.sources.0.weight", "finite"]),
        ({"data": {"sources": [{"name": "a", "url": "b", "fields": {"x": [0, INF]}}]}}, ["fields.x.1", "finite"]),
        ({"data": {"sources": [{"name": "a", "url": "b", "captions": {"members": {"txt": INF}}}]}}, ["txt", "finite"]),
        ({"stages": [{"name": "a", "ema": {"decay": "nan"}}]}, ["stage a: ema.decay", "finite number"]),
        ({"train": {"steps": "1:30"}}, ["train.steps", "integer", "got '1:30'"]),
        ({"data": {"sources": [{"name": "a", "url": "$NOT_SET"}]}}, ["data.sources.0.url", "NOT_SET is not set"]),
        ({"engine": {"zero_stage": True}}, ["engine", "zero_stage must be a number, not true"]),
        ({"optimizer": {"betas": [True, 0.9]}}, ["optimizer", "betas must hold numbers, not true"]),
        ({"scoring": {"every": 1, "min_delta": True}}, ["scoring", "min_delta must be a number, not true"]),
        ({"optimizer": {"betas": [0.9]}}, ["optimizer.betas.1"]),
        (
            {"objective": {"perceptual_t_min": 1.5}},
            ["objective.perceptual_t_min", "less than or equal to 1", "got 1.5"],
        ),
        ({"objective": {"t_eps": 0}}, ["objective.t_eps", "greater than 0"]),
        ({"data": {"sources": [{"name": "a"}]}}, ["data.sources.0.url", "required"]),
        ({"name": "a/b"}, ["name", "got 'a/b'"]),
        ({"name": ".."}, ["name", "got '..'"]),
        ({"model": {"width": 100, "heads": 3}}, ["model", "width 100", "multiple", "12"]),
        ({"model": {"depth": 4}}, ["model", "repa_layer 8", "depth (4)"]),
        ({"optimizer": {"schedule": "cosine"}}, ["optimizer", "decay_fraction 0.0", "cosine"]),
        ({"optimizer": {"decay_fraction": 0.5}}, ["optimizer", "decay_fraction 0.5", "constant"]),
        ({"optimizer": {"schedule": "step"}}, ["optimizer", "step_down_at []", "schedule step"]),
        ({"optimizer": {"step_down_at": [0.5]}}, ["optimizer", "step_down_at [0.5]", "schedule constant"]),
        ({"optimizer": {"schedule": "step", "step_down_at": [0.9, 0.6]}}, ["step_down_at [0.9, 0.6]", "rise"]),
        (
            {"optimizer": {"schedule": "step", "step_down_at": [0.5], "decay_fraction": 0.5}},
            ["decay_fraction 0.5", "schedule step"],
        ),
        ({"objective": {"noise_scale": 0}}, ["objective.noise_scale", "greater than 0", "got 0"]),
        ({"objective": {"pdino_gate": "off"}}, ["objective.pdino_gate", "'masked' or 'none'", "got 'off'"]),
        ({"objective": {"pdino_layers": [0]}}, ["objective.pdino_layers.0", "greater than 0"]),
        ({"objective": {"pdino_layers": [6, 6]}}, ["objective", "pdino_layers [6, 6]", "once"]),
        (
            {"objective": {"pdino_layers": [12], "features_network": "efficientnet-lite0"}},
            ["objective", "pdino_layers [12]", "must be empty", "one layer"],
        ),
        (
            {"objective": {"balance_from_step": 5, "lpips_weight": 0, "pdino_weight": 0}},
            ["objective", "balance_from_step", "lpips_weight or pdino_weight"],
        ),
        ({"data": {"resolution": 100}}, ["data.resolution 100", "multiple", "model.patch_size (16)"]),
        ({"data": {"resolution": [96, 100]}}, ["data.resolution 96x100", "multiple", "model.patch_size (16)"]),
        ({"data": {"resolution": "large"}}, ["data.resolution", "[height, width]", "got 'large'"]),
        ({"data": {"resolution": 0}}, ["data.resolution", "above 0", "got 0"]),
        ({"data": {"resolution": True}}, ["data", "resolution must be a number, not true"]),
        ({"data": {"resolution": 32.5}}, ["data.resolution", "whole numbers", "got 32.5"]),
        ({"data": {"resolution": [32, 48, 3]}}, ["data.resolution", "[height, width]"]),
        ({"data": {"resolution": [-16, 32]}}, ["data.resolution", "above 0"]),
        ({"stages": [{"name": "a"}, {"name": "b"}, {"name": "a"}]}, ["stages", "same name"]),
        ({"stages": [{"train": {}}]}, ["stages", "needs a name", "got None"]),
        ({"stages": [{"name": "a/b"}]}, ["stages", "needs a name", "got 'a/b'"]),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_field(tree: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(tree, "here")
    message = str(caught.value)
    assert message.startswith(("here: ", "stage a: ")) and "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: [", "not YAML"),
        ("a: b: c", "not YAML"),
        ("train: {steps: 1}\nname: a\ntrain: {batch_size: 8}", "line 3: 'train' is given twice, first in line 1"),
        ("name: a\ntrain:\n  steps: 1\n  steps: 2", "line 4: 'steps' is given twice, first in line 3"),
        ("name: a\ntrain:\n  steps: 010", "line 3: 010 is octal to some"),
        ("train: {steps: .inf}", "train.steps: input should be a finite number"),
        ("train: {steps: yes}", "train.steps: .* integer"),
        ("seed: on", "seed: .* integer"),
        ("a: &a [" + "x, " * 99 + "]\nb: &b [" + "*a, " * 99 + "]\nc: [" + "*b, " * 99 + "]", "aliases expand"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(write(tmp_path, content))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml: cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ({"train": {"stepz": 5}}, "stage sft: unknown field 'train.stepz'; did you mean 'steps'?"),
        ({"train": {"steps": "x"}}, "stage sft: train.steps: "),
        ({"data": {"resolution": 100}}, "stage sft: data.resolution 100 must be a multiple"),
        ({"trian": {}}, "here: stage sft: unknown section 'trian'; did you mean 'train'?"),
        ({"model": {"depth": 8}}, "here: stage sft: unknown section 'model'"),
        ({"text": {"length": 8}}, "here: stage sft: unknown section 'text'"),
    ],
)
def test_mistakes_in_a_stage_name_the_stage(stage: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
        validate_config({"stages": [{"name": "first"}, {"name": "sft", **stage}]}, "here")


def test_a_stage_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="the config has 1 stage.*no stage 2"):
        stage_config(validate_config({"stages": [{"name": "a"}]}, "here"), 1)


# Words for nothing, and paths


@pytest.mark.parametrize("word", ["none", "None", "NONE", "null", "~", '"none"', "'null'"])
def test_none_is_none_in_a_file(tmp_path: Path, word: str) -> None:
    text = f"""
        checkpoint: {{mirror: {word}, mirror_region: {word}}}
        model: {{repa_width: {word}}}
        objective: {{lpips_path: {word}, pdino_gate: {word}}}
        data: {{buckets: {word}, sources: [{{name: a, url: b, heldout: {word}, max_aspect_ratio: {word}}}]}}
        stages: [{{name: none, checkpoint: {{mirror: {word}}}}}]"""
    config = load_config(write(tmp_path, text))
    (source,) = config.data.sources
    assert (config.checkpoint.mirror, config.checkpoint.mirror_region, config.model.repa_width) == (None, None, None)
    assert (config.objective.lpips_path, source.heldout, source.max_aspect_ratio) == (None, None, None)
    assert (config.objective.pdino_gate, config.data.buckets) == ("none", "none")
    assert config.stages == [{"name": "none", "checkpoint": {"mirror": None}}]


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_none_is_none_on_the_command_line(file: str, word: str) -> None:
    fields = ("--checkpoint.mirror", "--model.repa_width", "--objective.lpips_path", "--model.pixel.attention_width")
    config = parse("", file, [f"{field}={word}" for field in (*fields, "--data.buckets", "--scoring.min_delta")])
    assert (config.checkpoint.mirror, config.model.repa_width, config.objective.lpips_path) == (None, None, None)
    assert (config.model.pixel.attention_width, config.scoring.min_delta) == (None, None)
    assert config.data.buckets == "none"


def test_every_path_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("BUCKET", "pictures")
    tree = {
        "root": "~/runs",
        "text": {"model": "${BUCKET}/qwen"},
        "engine": {"offload_dir": "~"},
        "objective": {"lpips_path": "~/vgg.pth", "features_path": "~/dino"},
        "data": {"sources": [{"name": "a", "url": "s3://$BUCKET/a", "index": "~/index.json", "heldout": "$BUCKET/b"}]},
        "checkpoint": {"mirror": "s3://$BUCKET/mirror"},
        "scoring": {"every": 5, "detector_weights": "~/m2f", "clip": "$HOME/clip"},
        "stages": [{"name": "one", "init": {"source": "~/model"}, "data": {"sources": [{"name": "b", "url": "~/b"}]}}],
    }
    config = load_config(write(tmp_path, tree))
    assert config.root == Path("/home/me/runs") and config.directory == Path("/home/me/runs/run")
    assert config.text.model == "pictures/qwen" and config.engine.offload_dir == Path("/home/me")
    assert config.objective.lpips_path == Path("/home/me/vgg.pth") and config.objective.features_path == "/home/me/dino"
    source = config.data.sources[0]
    assert (source.url, source.index, source.heldout) == ("s3://pictures/a", "/home/me/index.json", "pictures/b")
    assert config.checkpoint.mirror == "s3://pictures/mirror"
    assert (config.scoring.detector_weights, config.scoring.clip) == ("/home/me/m2f", "/home/me/clip")
    stage = stage_config(config, 0)
    assert (stage.init.source, stage.data.sources[0].url) == ("/home/me/model", "/home/me/b")
    # What the run keeps means the same on a machine where the variables are others.
    kept = dump_config(config)
    monkeypatch.setenv("HOME", "/home/other")
    monkeypatch.delenv("BUCKET")
    assert "~" not in kept and "$" not in kept and load_config(write(tmp_path, kept)) == config


def test_a_base_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "low.yaml").write_text("seed: 7")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(write(tmp_path, "base: ~/low.yaml")).seed == 7
    with pytest.raises(ConfigError, match="base: .*NOT_SET is not set"):
        load_config(write(tmp_path, "base: $NOT_SET/low.yaml"))


def test_paths_on_the_command_line_are_filled_in(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(file).parent))
    config = parse("", "absent.yaml", ["--config", "~/run.yaml", "--root", "~/runs", "--init.source=${HOME}/m"])
    assert config.root == Path(file).parent / "runs" and config.init.source == f"{Path(file).parent}/m"
    with pytest.raises(UserError, match="NOT_SET is not set"):
        parse("", file, ["--checkpoint.mirror", "s3://$NOT_SET"])


# Precedence


def test_merge_joins_dictionaries_and_replaces_everything_else() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert merge(base, {"a": {"c": [5]}, "e": 6}) == {"a": {"b": 1, "c": [5]}, "d": 3, "e": 6}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 3}


def test_default_file_stage_command_line_from_weakest_to_strongest(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "train": {"steps": 10, "batch_size": 256, "micro_batch_size": 8},
            "data": {"sources": [{"name": "a", "url": "a"}]},
            "stages": [
                {"name": "one"},
                {
                    "name": "two",
                    "train": {"steps": 20, "micro_batch_size": 4},
                    "data": {"sources": [{"name": "b", "url": "b", "weight": 2.0}]},
                },
            ],
        },
    )
    config = parse("", str(path), ["--train.micro_batch_size", "2", "--ema.decay=0.5"])
    one, two = (stage_config(config, n) for n in (0, 1))
    assert one.optimizer.lr == two.optimizer.lr == RunConfig().optimizer.lr
    assert (one.train.steps, one.train.batch_size, one.train.micro_batch_size) == (10, 256, 2)
    assert (two.train.steps, two.train.batch_size, two.train.micro_batch_size) == (20, 256, 2)
    assert one.ema.decay == two.ema.decay == 0.5
    assert [s.name for s in one.data.sources] == ["a"] and [s.weight for s in two.data.sources] == [2.0]
    # What is written down is what runs: the config that the run keeps says the same of every stage.
    kept = load_config(write(tmp_path, dump_config(config)))
    assert [stage_config(kept, n) for n in (0, 1)] == [one, two]


def test_stages_do_not_leak_into_each_other() -> None:
    config = validate_config({"stages": [{"name": "a", "train": {"steps": 5}}, {"name": "b"}]}, "here")
    assert stage_config(config, 0).train.steps == 5 and stage_config(config, 1).train.steps == RunConfig().train.steps


# Numbers of ranks


def sized(lanes: int, batch: int, micro: int) -> RunConfig:
    train = {"batch_size": batch, "micro_batch_size": micro}
    return validate_config({"data": {"lanes": lanes}, "train": train}, "here")


@pytest.mark.parametrize("world_size", [1, 2, 8, 24, 128])
def test_allowed_numbers_of_ranks(world_size: int) -> None:
    lanes, micro = (384, 64) if world_size == 24 else (128, 12)
    check_world_size(sized(lanes, 1536, micro), world_size, "here")


@pytest.mark.parametrize(
    ("lanes", "batch", "micro", "world_size", "words"),
    [
        (128, 1536, 4, 3, ["3 ranks do not divide", "data.lanes 128", "2 or 4"]),
        (128, 1536, 4, 100, ["100 ranks do not divide", "64 or 128"]),
        (16, 64, 4, 17, ["17 ranks do not divide", "data.lanes 16", "is 16"]),
        (128, 1500, 4, 2, ["train.batch_size 1500", "data.lanes 128", "1408 or 1536"]),
        (128, 1536, 50, 8, ["micro_batch_size 50", "192", "48 would"]),
        (128, 1536, 64, 128, ["micro_batch_size 64", "12 would"]),
    ],
)
def test_refused_numbers_of_ranks_name_the_nearest(
    lanes: int, batch: int, micro: int, world_size: int, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world_size(sized(lanes, batch, micro), world_size, "stage x")
    message = str(caught.value)
    assert message.startswith("stage x: ") and [word for word in words if word not in message] == []


# Files and documentation


def test_dump_and_load_are_inverses(tmp_path: Path) -> None:
    tree = {
        "root": "/elsewhere",
        "sampling": {"cfg_interval": [0.1, 0.9]},
        "objective": {"lpips_path": "vgg.pth"},
        "data": {"sources": [{"name": "a", "url": "s3://b/c", "heldout": None}]},
        "validation": {"prompts": ["a: colon", "ünï # hash", "yes"]},
        "stages": [{"name": "one", "optimizer": {"betas": [0.9, 0.95]}}],
    }
    config = validate_config(tree, "here")
    assert config.objective.lpips_path == Path("vgg.pth") and config.sampling.cfg_interval == (0.1, 0.9)
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert load_config(write(tmp_path, dump_config(RunConfig()))) == RunConfig()


@pytest.mark.parametrize(("section", "name"), fields(), ids=lambda value: getattr(value, "__name__", value))
def test_every_field_is_documented(section: type[Section], name: str) -> None:
    field = section.model_fields[name]
    text = field.annotation.__doc__ if is_section(field.annotation) else field.description
    assert text and text.endswith(".")


def test_the_defaults_are_the_papers_recipe() -> None:
    config = RunConfig()
    assert (config.model.width, config.model.depth, config.model.heads, config.model.patch_size) == (1536, 16, 24, 16)
    objective = config.objective
    assert (objective.logit_mean, objective.logit_std, objective.t_eps, objective.perceptual_t_min) == (
        -0.8,
        0.8,
        0.05,
        0.3,
    )
    assert (objective.lpips_weight, objective.pdino_weight, objective.caption_dropout) == (0.1, 0.01, 0.1)
    assert (objective.pdino_gate, objective.pdino_layers, objective.repa_weight) == ("masked", [], 0.5)
    assert (objective.shift, objective.noise_scale, objective.balance_from_step) == (1.0, 1.0, None)
    assert (config.optimizer.betas, config.optimizer.weight_decay, config.ema.decay) == ((0.9, 0.999), 0.0, 0.9999)
    sampling = config.sampling
    assert (sampling.solver, sampling.order, sampling.steps) == ("adams", 2, 25)
    assert (sampling.guidance_scale, sampling.shift, sampling.clamp) == (4.0, 3.0, True)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_resolve_for_every_stage(path: Path) -> None:
    config = load_config(path)
    assert config.stages
    for index, stage in enumerate(config.stages):
        resolved = stage_config(config, index)
        check_world_size(resolved, 2, stage["name"])
        assert resolved.data.sources and resolved.model == config.model


def test_the_papers_three_stages() -> None:
    config = load_config(ROOT / "configs" / "pixelgen_xxl.yaml")
    stages = [stage_config(config, index) for index in range(3)]
    assert [(s.data.resolution, s.train.batch_size, s.train.steps) for s in stages] == [
        (256, 1536, 200_000),
        (512, 512, 80_000),
        (512, 512, 40_000),
    ]
    for stage in stages:
        check_world_size(stage, 8, "paper")


# Command line


@pytest.fixture
def file(tmp_path: Path) -> str:
    model = {"width": 64, "heads": 4, "depth": 4, "repa_layer": 2, "patch_size": 4}
    return str(write(tmp_path, {"name": "small", "model": model}))


def test_overrides_take_the_file_for_what_they_leave_out(file: str) -> None:
    config = parse("", file, ["--model.depth", "8"])
    assert config.model == load_config(Path(file)).model.model_copy(update={"depth": 8})
    assert config.name == "small"
    # Valid beside the file's repa_layer and heads, not beside the defaults.
    assert parse("", file, ["--model.depth=3"]).model.depth == 3
    assert parse("", file, ["--model.width=80"]).model.width == 80


def test_values_keep_their_types(file: str) -> None:
    words = """--sampling.cfg_interval [0.1,0.9] --engine.compile true --root /r --optimizer.lr 1e-3
        --data.resolution [16,24]
        --data.sources [{"name":"a","url":"u"}] --validation.prompts ["x,y","z"]"""
    config = parse("", file, words.split())
    assert config.sampling.cfg_interval == (0.1, 0.9) and config.engine.compile and config.root == Path("/r")
    assert config.data.sources[0].url == "u" and config.validation.prompts == ["x,y", "z"]
    assert config.optimizer.lr == 1e-3 and config.data.size == (16, 24) and config.data.size_text == "16x24"
    square = parse("", file, ["--data.resolution", "32"])
    assert square.data.size == (32, 32) and square.data.size_text == "32"


def test_config_replaces_the_default_file(file: str) -> None:
    assert parse("", "absent.yaml", ["--config", file]).name == "small"
    assert parse("", "absent.yaml", [f"--config={file}", "--name", "other"]).name == "other"


@pytest.mark.parametrize("words", [["--local_rank", "1"], ["--local_rank=1"]])
def test_the_launchers_local_rank_is_ignored(file: str, words: list[str]) -> None:
    assert parse("", file, words) == parse("", file, [])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.detph", "8"], "unknown option --model.detph; did you mean --model.depth?"),
        (["--optimiser.lr=1"], "unknown option --optimiser.lr; did you mean --optimizer.lr?"),
        (["--model.depth"], "model.depth"),
        (["--model.depth", "eight"], "model.depth"),
        (["--model.depth", "1"], "command line: model.repa_layer 2 must be at most depth (1)"),
        (["--data.resolution", "30"], "command line: data.resolution 30 must be a multiple of model.patch_size (4)"),
        (["--model.depth", "8", "extra"], "extra"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--train.steps", "010"], "--train.steps: 010 is octal to some"),
        (["--data.resolution", "[064, 64]"], "--data.resolution: 064 is octal to some"),
        (["--train.steps", "1:30"], "1:30 is no number"),
        (["--data.sources", "[{name: a, url: b, min_side: 1:30}]"], "1:30 is no number"),
        (["--optimizer.lr", "1e999"], "--optimizer.lr 1e999: must be a finite number"),
        (["--optimizer.lr", "nan"], "--optimizer.lr nan: must be a finite number"),
        (["--sampling.cfg_interval", "[2, 3]"], "sampling.cfg_interval.0: input should be less than or equal to 1"),
        (["--data.sources", "[{name: a, name: b}]"], "--data.sources: 'name' is given twice"),
    ],
)
def test_mistakes_on_the_command_line(file: str, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse("", file, words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_value_on_the_command_line_is_said_as_in_a_file(file: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("", file, ["--model.depth", "eight"])
    assert "https://" not in str(caught.value)


def test_a_whole_section_on_the_command_line_is_refused(file: str) -> None:
    with pytest.raises(ConfigError, match=r"--model is a section: set its fields, such as --model\.FIELD"):
        parse("", file, ["--model", '{"depth": 9}'])


@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number(value: bool) -> None:
    with pytest.raises(ConfigError, match="steps must be a number, not"):
        validate_config({"train": {"steps": value}}, "here")


def test_print_config_prints_what_would_run(file: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("", file, ["--model.depth", "8", "--print_config"])
    assert not caught.value.code
    printed = load_config(write(tmp_path, capsys.readouterr().out))
    assert printed == parse("", file, ["--model.depth", "8"]) and printed.model.depth == 8


@pytest.fixture(scope="module")
def help_text() -> str:
    """The output of --help without white space, which argparse wraps anywhere."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as caught:
        parse("", "absent.yaml", ["--help"])
    assert caught.value.code == 0
    return re.sub(r"\s", "", out.getvalue())


def in_help(section: type[Section], name: str, help_text: str) -> bool:
    return re.sub(r"\s", "", section.model_fields[name].description or "nothing") in help_text


LISTED = {"SourceConfig", "CaptionConfig"}


def test_help_tells_every_field(help_text: str) -> None:
    silent = [
        f"{section.__name__}.{name}"
        for section, name in fields()
        if section.__name__ not in LISTED
        and not is_section(section.model_fields[name].annotation)
        and not in_help(section, name, help_text)
    ]
    assert silent == []


def test_help_tells_every_field_of_sources(help_text: str) -> None:
    listed = [(section, name) for section, name in fields() if section.__name__ in LISTED]
    assert len(listed) > 8
    assert [f"{section.__name__}.{name}" for section, name in listed if not in_help(section, name, help_text)] == []
