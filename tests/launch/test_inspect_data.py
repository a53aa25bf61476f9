"""The command line: a source or a config, what is printed and written, and mistakes in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny import tiny_config, write_config

from data.loader import Loader, merge_states
from launch.inspect_data import main
from t2i.config.loading import load_config, stage_config
from t2i.engine.checkpoint.format import manifest_text
from t2i.train.data import image_settings, open_source


@pytest.fixture
def config(scenes: Path, tmp_path: Path) -> Path:
    tree = tiny_config(scenes, tmp_path / "runs")
    tree["data"]["sources"] = [
        tree["data"]["sources"][0] | {"captions": {"max_words": 8}},
        {"name": "held", "url": str(scenes / "heldout")},
    ]
    tree["stages"][1]["data"]["resolution"] = 32
    return write_config(tmp_path / "config.yaml", tree)


@pytest.fixture
def run(capsys) -> Callable[..., tuple[str, str]]:
    """Run the command, see its exit code, and return what it said."""

    def attempt(*words: object, code: int = 0) -> tuple[str, str]:
        assert main([str(word) for word in words]) == code
        said = capsys.readouterr()
        return said.out, said.err

    return attempt


def batches_of(out: str) -> list[dict[int, str]]:
    batches: list[dict[int, str]] = []
    for line in out.splitlines():
        if line.startswith("batch "):
            batches.append({})
        else:
            slot, id_ = line.split("\t")
            batches[-1][int(slot)] = id_
    return batches


def test_a_directory(run, scenes: Path, tmp_path: Path) -> None:
    out, _ = run(scenes / "train", "--samples", 50, "--sheet", 7, "--out", tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text()
    assert "samples: 240, " in out and "looked at: 50, 50 of them decoded" in out
    assert page.count("<img ") == 7
    assert "train/00000.tar/" in page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_all_samples_and_a_name(run, scenes: Path, tmp_path: Path) -> None:
    words = ("--samples", "all", "--decode", 16, "--name", "scenes", "--resolution", 32)
    out, _ = run(scenes / "train", *words, "--out", tmp_path / "page.html")
    assert "looked at: 240, 16 of them decoded" in out
    assert "usable: 0 %" in out and "scenes/00000.tar/" in out  # they are 24 px


def test_the_rules_of_a_stage(run, config: Path, tmp_path: Path) -> None:
    low, _ = run("--config", config, "--stage", 1, "--source", "shapes", "--out", tmp_path / "page.html")
    assert "stage low of" in low and "caption words" in low and "small image" not in low
    high, _ = run("--config", config, "--stage", "high", "--source", "held", "--out", tmp_path / "page.html")
    assert "at 32 px with smaller images dropped" in high
    assert "small image" in high and "caption words" not in high
    assert "caption over 12 tokens" in high


def test_the_order_of_a_config_is_that_of_training(run, config: Path, tmp_path: Path) -> None:
    stage = stage_config(load_config(config), 0)
    sources = [open_source(stage.data, source, source.url, None, {}) for source in stage.data.sources]
    loaders = [
        Loader(
            sources, image_settings(stage.data), batch_size=8, lanes=4, seed=0, stage="low", rank=rank, world_size=2,
            workers=1, shuffle_block=16, buffer_bytes=1 << 30,
        )
        for rank in range(2)
    ]  # fmt: skip
    expected: list[dict[int, str]] = []
    for number in range(5):
        shares = [next(loader) for loader in loaders]
        expected.append({s: id_ for it in shares for s, id_ in zip(it.slots.tolist(), it.ids, strict=True)})
        if number == 2:
            state = merge_states([share.state for share in shares])
    for loader in loaders:
        loader.close()
    out, err = run("--config", config, "--stage", 1, "--order", 5)
    assert batches_of(out) == expected
    assert "skipped on the way: " in err and "caption words" in err
    checkpoint = tmp_path / "step_00000003"
    checkpoint.mkdir()
    body = {"step": 3, "state": {"data": state}, "shapes": {}, "parts": []}
    (checkpoint / "manifest.json").write_text(manifest_text(body))
    out, _ = run("--config", config, "--stage", "low", "--order", 2, "--checkpoint", checkpoint)
    assert batches_of(out) == expected[3:]
    assert out.startswith("batch 3: slots 24 to 31\n")


def test_the_order_with_buckets_tells_their_sizes(run, config: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    tree["data"] |= {"buckets": [[16, 16], [16, 24]], "group_size": 2}
    tree["stages"] = tree["stages"][:1]
    write_config(config, tree)
    out, err = run("--config", config, "--stage", 1, "--order", 3)
    assert [len(batch) for batch in batches_of(out)] == [8, 8, 8]
    assert "by height and width: 16x16: 24; 0 wait in buckets for more" in err
    page, _ = run("--config", config, "--stage", 1, "--source", "held", "--out", tmp_path / "page.html")
    assert "at 16 px in 2 buckets with smaller images dropped" in page


def test_the_order_of_flags(run, scenes: Path, config: Path) -> None:
    alone = yaml.safe_load(config.read_text())
    del alone["data"]["sources"][1], alone["data"]["sources"][0]["captions"]
    write_config(config, alone | {"seed": 4})
    by_config, _ = run("--config", config, "--stage", 1, "--order", 2)
    flags = ("--name", "shapes", "--stage", "low", "--seed", 4, "--batch_size", 8, "--lanes", 4, "--shuffle_block", 16)
    by_flags, _ = run(scenes / "train", "--order", 2, *flags, "--resolution", 16)
    assert by_flags == by_config
    assert len(batches_of(by_flags)) == 2
    other, _ = run(scenes / "train", "--order", 2, *flags, "--resolution", 16, "--seed", 5)
    assert other != by_config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "either SOURCE"),
        ("SCENES --config CONFIG", "either SOURCE"),
        ("/nowhere", "/nowhere"),
        ("gs://bucket", "scheme"),
        ("SCENES --samples 0", "samples is 0"),
        ("SCENES --samples few", "samples"),
        ("SCENES --sheet -1", "sheet is -1"),
        ("SCENES --out .", "out is .: it should be a local file"),
        ("SCENES --out /proc/page.html", "out is /proc/page.html: cannot be written"),
        ("SCENES --source a", "--name names SOURCE"),
        ("SCENES --name a/b", "'a/b'"),
        ("SCENES --checkpoint x", "goes with --order"),
        ("SCENES --order 0", "order is 0"),
        ("SCENES --order 1 --batch_size 100", "nearest allowed is 128"),
        ("SCENES --order 1 --lanes 0", "lanes"),
        ("SCENES --order 1 --resolution 64 --lanes 2 --batch_size 2", "small_image"),
        ("SCENES --order 1 --checkpoint /nowhere", "manifest"),
        ("SCENES --manifest /nowhere/index.json", "manifest"),
        ("--config CONFIG", "stage is not given: it should be one of 1 (low), 2 (high)"),
        ("--config CONFIG --stage 3", "stage '3' is not in the config"),
        ("--config CONFIG --stage 1", "source is not given: it should be one of shapes, held"),
        ("--config CONFIG --stage 1 --source x", "source 'x' is not in the stage"),
        ("--config CONFIG --stage 1 --lanes 8 --order 1", "lanes is set: with --config, the config says it"),
        ("--config CONFIG --stage 1 --anonymous true --source held", "anonymous is set"),
        ("--config CONFIG --stage 1 --seed 0 --order 1", "seed is set"),
        ("--config CONFIG --stage 1 --source held --order 1", "--order reads all"),
        ("--config /nowhere.yaml", "/nowhere.yaml"),
        ("--shards x", "shards"),
    ],
)
def test_mistakes(run, scenes: Path, config: Path, tmp_path: Path, monkeypatch, words: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"SCENES": scenes / "train", "CONFIG": config}
    _, err = run(*(places.get(word, word) for word in words.split()), code=2)
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last
    assert not list(tmp_path.glob("*inspect.html*"))
