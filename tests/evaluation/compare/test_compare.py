"""Runs side by side as text, on folders made by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_runs import results, score, train, validation, write_run, write_scores

from data.errors import UserError
from evaluation.compare.page import format_comparison
from evaluation.compare.read import RunGroup, differing, read_groups
from evaluation.compare.tables import Table, all_tables, settings_table, stage_tables
from t2i.config.loading import fields_of


def rows(table: Table) -> dict[str, list[str]]:
    """Cells by label: "text", or "text change"."""
    return {
        row.label.strip(): [f"{c.text} {c.change}{' *' if c.significant else ''}".strip() for c in row.cells]
        for row in table.rows
    }


def groups(*paths: Path, together: bool = True) -> list[RunGroup]:
    return read_groups(paths, together)


def scores(*paths: Path) -> list[Table]:
    return all_tables(groups(*paths))["Scores"]


# --- settings ---


def test_only_what_differs_is_shown(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [])
    sources = [{"name": "shapes", "url": "s3://bucket/shapes", "weight": 2.0}]
    b = write_run(tmp_path / "b", [], git="bead", optimizer={"lr": 0.002}, data={"sources": sources})
    assert rows(settings_table(groups(a, b))) == {
        "data.sources.shapes.weight": ["1.0", "2.0 ≠"],
        "environment: git": ["c0ffee", "bead ≠"],
        "optimizer.lr": ["0.001", "0.002 ≠"],
    }


def test_a_setting_counts_as_a_stage_has_it(tmp_path: Path) -> None:
    """Stage high sets its own steps in both runs, so the shared 50 matters to stage low alone."""
    a, b = write_run(tmp_path / "a", []), write_run(tmp_path / "b", [], train={"steps": 50})
    assert rows(settings_table(groups(a, b))) == {"low: train.steps": ["40", "50 ≠"]}


def test_stages_and_fields_that_one_alone_has(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [])
    b = write_run(tmp_path / "b", [], stages=[{"name": "low"}], ema={"decay": None})
    assert rows(settings_table(groups(a, b))) == {"stages": ["low, high", "low ≠"], "ema.decay": ["-", "null"]}
    c = write_run(tmp_path / "c", [], stages=[{"name": "other"}], seed=3)
    assert rows(settings_table(groups(a, c))) == {"stages": ["low, high", "other ≠"], "seed": ["0", "3 ≠"]}


def test_runs_that_are_the_same_say_so(tmp_path: Path) -> None:
    table = settings_table(groups(write_run(tmp_path / "a", []), write_run(tmp_path / "b", [])))
    assert not table.rows and "differ in neither settings nor code" in table.notes[0]


def test_flat_trees() -> None:
    assert fields_of({"a": {"b": 1, "c": {}}, "d": [1, 2], "e": [{"name": "x", "f": None}]}) == {
        "a.b": 1,
        "d": [1, 2],
        "e": ["x"],
        "e.x.name": "x",
        "e.x.f": None,
    }
    assert differing([{"a": 1, "b": None}, {"a": 1}]) == ["b"]
    assert differing([{"a": 1}, {"a": 1, "b": None}]) == ["b"]


# --- stages ---


def test_what_a_stage_cost_and_came_to(tmp_path: Path) -> None:
    lines = [validation("low", 0, 4.0)]
    lines += [train("low", s, images_per_s=10.0 * s, memory_gib=1 + s / 100, skipped_updates=2) for s in range(1, 41)]
    lines += [validation("low", 20, 1.0), validation("low", 40, 2.0)]
    a = write_run(tmp_path / "a", sorted(lines, key=lambda line: line["step"]))
    b = write_run(tmp_path / "b", [train("low", s, mfu=0.5, batch_size=12) for s in range(1, 21)])
    (table,) = stage_tables(groups(a, b))
    assert table.title == "Stage low"
    assert rows(table) == {
        "steps": ["40 of 40", "20 of 40 ≠"],
        "images seen": ["320", "240 -25.0 %"],
        "wall time": ["40.0 s", "20.0 s -50.0 %"],
        "images/s, median": ["205.0", "12.5 -93.9 %"],
        "MFU, median": ["25.0 %", "50.0 % +100.0 %"],
        "memory, peak": ["1.40 GiB", "1.50 GiB +7.1 %"],
        "skipped updates": ["2", "0 -100.0 %"],
        "validation loss, first": ["4.000", "-"],
        "validation loss, last": ["2.000", "-"],
        "t 0.0–0.5": ["1.000", "-"],
        "validation loss, best": ["1.000", "-"],
        "of step": ["20", "-"],
        "training loss, end": ["0.05199", "0.1026 +97.4 %"],  # the last 4 lines' mean of 2/step, and the last 2's
        "fm": ["0.02600", "0.05132 +97.4 %"],
    }


def test_a_later_stage_counts_its_own_steps(tmp_path: Path) -> None:
    lines = [
        train("low", 1, 1),
        train("high", 1, 2),
        validation("high", 1, 0.5),
        train("high", 2, 2),
        validation("high", 2, 0.75),
    ]
    low, high = stage_tables(groups(write_run(tmp_path / "a", lines), write_run(tmp_path / "b", [])))
    assert rows(low)["steps"] == ["1 of 1", "-"]
    assert rows(high)["of step"] == ["1", "-"]


def test_hours_where_it_took_hours(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, [train("low", s, time=1e9 + pace * s, step_s=pace) for s in range(1, 41)])
        for name, pace in (("a", 300.0), ("b", 30.0))
    ]
    (table,) = stage_tables(groups(*runs))
    assert rows(table)["wall time"] == ["3.3 h", "0.3 h -90.0 %"]


# --- seeds ---


def three_seeds(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / f"prove-{s}", [train("low", 1), validation("low", 1, 0.1 * s)], seed=s) for s in (1, 2, 3)
    ]


def test_seeds_are_one_column_with_mean_and_spread(tmp_path: Path) -> None:
    runs = three_seeds(tmp_path)
    found = groups(*runs, write_run(tmp_path / "b", [train("low", 1)], optimizer={"lr": 1.0}))
    assert [column.name for column in found] == ["prove-{1,2,3}", "b"]
    (table,) = stage_tables(found)
    assert rows(table)["validation loss, last"] == ["0.2000 ± 0.1000", "-"]
    assert rows(table)["images seen"] == ["8", "8"]  # no spread to speak of
    assert rows(settings_table(found)) == {"optimizer.lr": ["0.001", "1.0 ≠"], "seed": ["1, 2, 3", "0 ≠"]}
    assert "3 runs that differ in the seed alone" in format_comparison(found, all_tables(found))
    assert [column.name for column in groups(*runs, together=False)] == ["prove-1", "prove-2", "prove-3"]


def test_a_seed_that_is_not_there_yet_is_counted(tmp_path: Path) -> None:
    runs = [*three_seeds(tmp_path), write_run(tmp_path / "prove-4", [train("low", 1)], seed=4)]
    (table,) = stage_tables(groups(*runs))
    assert rows(table)["validation loss, last"] == ["0.2000 ± 0.1000 (3 of 4)"]


def test_what_is_no_other_seed_of_the_same(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [])
    for other in (
        write_run(tmp_path / "same-seed", []),
        write_run(tmp_path / "other-code", [], git="bead", seed=1),
        write_run(tmp_path / "other-setting", [], seed=1, train={"steps": 50}),
        write_scores(tmp_path / "scores", results("colors", [[True]])),
    ):
        assert len(groups(a, other)) == 2, other
    assert len(groups(write_scores(tmp_path / "s2", results("colors", [[True]])), tmp_path / "scores")) == 2


# --- scores ---


def test_newest_scores_while_training(tmp_path: Path) -> None:
    lines = [train("low", 1), score("low", 1, overall=0.5, colors=0.75), train("low", 2)]
    lines += [score("low", 2, overall=0.25, colors=0.5, prompts=9, images=36, complete=True, held_s=3.0)]
    lines += [train("low", 3), score("low", 3, overall=0.9, colors=0.9, complete=False)]
    a = write_run(tmp_path / "a", lines)
    b = write_run(tmp_path / "b", [train("low", 1), score("low", 1, overall=0.3, counting=0.3)])
    (table,) = scores(a, b)
    assert rows(table) == {
        "of step": ["2", "1 ≠"],
        "overall": ["0.250", "0.300 +0.050"],
        "colors": ["0.500", "-"],
        "counting": ["-", "0.300"],
        "overall, best": ["0.500", "0.300 -0.200"],
    }


def gained(task: str, prompts: int, right: int) -> list[dict]:
    return results(task, [[i < right] * 4 for i in range(prompts)])


def test_geneval_and_what_is_significant(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", []), write_run(tmp_path / "b", [])
    write_scores(a / "geneval", gained("colors", 40, 10) + gained("counting", 40, 10), generated_with={"steps": 25})
    write_scores(b / "low/geneval", gained("colors", 40, 30) + gained("counting", 40, 12), generated_with={"steps": 50})
    table, how = scores(a, b)
    assert rows(table) == {
        "overall": ["0.250 [0.210, 0.290]", "0.525 [0.485, 0.565] +0.275 *"],
        "colors": ["0.250 [0.200, 0.300]", "0.750 [0.700, 0.800] +0.500 *"],
        "counting": ["0.250 [0.200, 0.300]", "0.300 [0.250, 0.350] +0.050"],
        "images": ["320", "320"],
    }
    assert re.match(
        r"b less a: overall \+0\.275 \[\+0\.1\d\d, \+0\.3\d\d\], significant .* over 80 prompts", table.notes[0]
    )
    assert "another seed" in table.notes[1]
    assert how.title == "GenEval: generated or judged with other settings"
    assert rows(how) == {"generated_with.steps": ["25", "50 ≠"]}


def test_a_score_by_another_judge_is_no_comparison(tmp_path: Path) -> None:
    lines = gained("colors", 40, 10)
    a = write_scores(tmp_path / "a", lines, thresholds={"score": 0.3})
    b = write_scores(tmp_path / "b", lines, thresholds={"score": 0.2})
    table, _ = scores(a, b)
    assert table.notes == [
        "b less a: cannot tell whether the difference is more than chance: "
        "they were not judged alike (thresholds.score)"
    ]


def test_the_same_weights_in_another_place_are_the_same_judge(tmp_path: Path) -> None:
    lines = gained("colors", 40, 10)

    def noted(name: str, sha256: str) -> str:
        detector = {"colors": {"model": f"/{name}/clip", "file": f"{name}.bin", "sha256": sha256}}
        path = write_scores(tmp_path / name, lines, detector=detector)
        return scores(first, path)[0].notes[0]

    first = write_scores(tmp_path / "a", lines, detector={"colors": {"model": "b", "file": "b", "sha256": "c0ffee"}})
    assert "not significant (paired bootstrap over 40 prompts)" in noted("here", "c0ffee")
    assert noted("there", "bead").endswith("they were not judged alike (detector.colors.sha256)")


def test_without_results_nothing_is_said_of_chance(tmp_path: Path) -> None:
    a, b = (write_scores(tmp_path / name, gained("colors", 40, 10)) for name in "ab")
    (b / "results.jsonl").unlink()
    (table,) = scores(a, b)
    assert "cannot tell" in table.notes[0] and "b has no results.jsonl" in table.notes[0]
    assert rows(table)["overall"] == ["0.250 [0.210, 0.290]", "0.250 [0.210, 0.290]"]


def seeds_of(tmp_path: Path, rights: dict[float, tuple[int, int, int]]) -> list[Path]:
    """Three runs of each recipe, with as many of 40 prompts right."""
    runs = []
    for lr, counts in rights.items():
        for seed, right in enumerate(counts):
            runs.append(write_run(tmp_path / f"{lr}-{seed}", [], seed=seed, optimizer={"lr": lr}))
            write_scores(runs[-1] / "geneval", gained("colors", 40, right))
    return runs


def test_seeds_of_two_recipes(tmp_path: Path) -> None:
    (table,) = scores(*seeds_of(tmp_path, {0.1: (10, 11, 12), 0.2: (18, 19, 20)}))
    assert rows(table)["overall"] == ["0.275 ± 0.025", "0.475 ± 0.025 +0.200 *"]
    assert rows(table)["colors"] == rows(table)["overall"]
    assert "significant (paired bootstrap over 40 prompts)" in table.notes[0]
    # t is 2.7764 at 4 degrees of freedom, the difference's deviation 0.025 * sqrt(2 / 3): 0.2 less and more 0.0567
    assert "overall +0.200 [+0.143, +0.257], significant (Welch's t over 3 and 3 training runs)" in table.notes[1]


def test_what_seeds_differ_by_is_no_difference_of_recipes(tmp_path: Path) -> None:
    """Every model gains many prompts or none: images of many prompts say much of each, and three runs little."""
    (table,) = scores(*seeds_of(tmp_path, {0.1: (10, 10, 11), 0.2: (10, 11, 30)}))
    assert ", significant (paired" in table.notes[0] and ", not significant (Welch" in table.notes[1]
    assert [rows(table)[name][1] for name in ("overall", "colors")] == ["0.425 ± 0.282 +0.167"] * 2


def test_several_folders_of_scores_go_by_their_names(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", []), write_run(tmp_path / "b", [])
    for folder in (a / "geneval", a / "early/geneval", b / "geneval"):
        write_scores(folder, gained("colors", 10, 5))
    write_scores(a / "low/samples/geneval", gained("colors", 10, 5))  # a place that holds no scores
    (a / "fid").mkdir()
    (a / "fid/summary.json").write_text('{"fid": 3.0}')
    assert [table.title for table in scores(a, b)] == ["GenEval, early/geneval", "GenEval, geneval"]


def test_means_of_different_tasks_are_pointed_out(tmp_path: Path) -> None:
    a = write_scores(tmp_path / "a", gained("colors", 10, 5))
    b = write_scores(tmp_path / "b", gained("colors", 10, 5) + gained("counting", 10, 5), held_out={"overall": 0.5})
    (table,) = scores(a, b)
    assert "different tasks" in table.notes[-1] and "10 of 20 prompts are in one" in table.notes[0]
    assert rows(table)["counting"] == ["-", "0.500 [0.450, 0.550]"]
    assert rows(table)["held out"] == ["-", "0.500"]


# --- text ---


def test_the_text_keeps_to_its_width_and_shows_where_long_cells_differ(tmp_path: Path) -> None:
    prompts = [f"a photo of {i} red circles" for i in range(40)]
    a = write_run(tmp_path / "a", [train("low", 1)], validation={"prompts": prompts})
    b = write_run(tmp_path / "b", [train("low", 1)], validation={"prompts": [*prompts[:20], "a cat"]})
    found = groups(a, b)
    text = format_comparison(found, all_tables(found))
    assert max(map(len, text.splitlines())) <= 120
    assert re.search(
        r'validation.prompts +…\S* "a photo of 20 red.*…"a cat"\]|validation.prompts +….*20 red.*cat', text
    )
    aligned = [line for line in text.splitlines() if line.startswith(("  images seen", "  MFU"))]
    assert len({len(line) for line in aligned}) == 1


# --- mistakes ---


def test_what_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [])
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.yaml").write_text("name: x\n")
    for path in (tmp_path / "nowhere", model):
        with pytest.raises(UserError, match=f"{path.name} is no run: it should be a run's folder"):
            groups(run, path)
    with pytest.raises(UserError, match="given twice"):
        groups(run, tmp_path / "model/../a")
    with pytest.raises(UserError, match="a single run"):
        groups(run)


@pytest.mark.parametrize("name", ["environment.json", "config.yaml", "geneval/summary.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "a", [])
    write_scores(run / "geneval", gained("colors", 10, 5))
    (run / name).write_text('{"torn": ')
    with pytest.raises(UserError, match=f"{name} is damaged"):
        groups(run, write_run(tmp_path / "b", []))


def test_a_run_that_has_just_begun_is_all_dashes(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", [validation("low", 0, 1.0)]), write_run(tmp_path / "b", [])
    (b / "metrics.jsonl").unlink()
    found = all_tables(groups(a, b))
    assert found["Stages"] == found["Scores"] == []
    (a / "environment.json").unlink()
    assert rows(settings_table(groups(a, b)))["environment: git"] == ["-", "c0ffee"]


def test_names_tell_runs_of_one_name_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / where / "run", []) for where in ("here", "there")]
    assert [column.name for column in groups(*runs)] == ["here/run", "there/run"]
    assert json.loads((runs[0] / "environment.json").read_text())["git"] == "c0ffee"
