"""GenEval as a scorer of training: drawn shapes score fully for their own prompts, and next to nothing for others'."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_geneval import save_clip, save_mask2former

from data.packing.shapes import draw
from evaluation.geneval.detectors import GenEvalScorer
from evaluation.geneval.prompts import TASKS, official
from evaluation.proving.detector import ShapeDetector
from evaluation.proving.prompts import proving_prompts, proving_scenes
from launch.train import build_scorer
from t2i.config.train import ScoringConfig

COUNT, SIDE = 36, 64


def images() -> list[torch.Tensor]:
    return [torch.from_numpy(draw(scene, SIDE).copy()).permute(2, 0, 1) for scene in proving_scenes(COUNT)]


def test_drawn_scenes_score_for_their_own_prompts_by_task() -> None:
    scorer = GenEvalScorer(proving_prompts(COUNT), ShapeDetector())
    drawn = images()
    results = [scorer.judge(index, image) for index, image in enumerate(drawn)]
    assert scorer.summary(results) == dict.fromkeys(("overall", *TASKS), 1.0)
    assert json.loads(json.dumps(results)) == results
    # A third of each task's images are another's; tasks count alike, however many images there are of each.
    wrong = [scorer.judge(index, drawn[index if index % 3 else index - 1]) for index in range(COUNT)]
    kept = [it for it in wrong if it["tag"] != "colors"] + [it for it in wrong if it["tag"] == "colors"][:1]
    summary = scorer.summary(kept)
    correct = {task: [it["correct"] for it in kept if it["tag"] == task] for task in TASKS}
    assert len(correct["colors"]) == 1 and not all(correct["position"])
    assert summary["overall"] == sum(sum(each) / len(each) for each in correct.values()) / len(TASKS)


def test_a_part_of_the_tasks_is_scored_over_those() -> None:
    scorer = GenEvalScorer(proving_prompts(COUNT), ShapeDetector())
    result = scorer.judge(0, images()[0])
    assert scorer.summary([result]) == {"overall": 1.0, scorer.tasks[0]: 1.0}


def test_the_job_builds_what_the_config_names(tmp_path: Path) -> None:
    scorer = build_scorer(ScoringConfig(every=1, scorer="shapes"), torch.device("cpu"))
    assert len(scorer.prompts) == len(scorer.tasks) >= 500
    assert set(scorer.tasks) == set(TASKS)
    weights = {"detector_weights": str(save_mask2former(tmp_path / "m")), "clip": str(save_clip(tmp_path / "c"))}
    scorer = build_scorer(ScoringConfig(every=1, **weights), torch.device("cpu"))
    assert scorer.prompts == [it["prompt"] for it in official()]
    assert not scorer.judge(0, torch.zeros(3, 48, 64, dtype=torch.uint8))["correct"]  # by networks that know nothing
