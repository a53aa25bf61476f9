"""What the proving ground's detector finds in drawn scenes and in spoiled ones, by its threshold of acceptance.

    python tests/benchmarks/shape_detector.py [scenes [spoiled]]

Prints one JSON object. "scenes": for sizes and disturbances the share of scenes whose objects are all found, by shape
and color, with nothing else; "lowest": the lowest score of an object. "spoiled": for each kind the share of pictures
in which anything is accepted. "others": which other shape a drawn shape is most like, and its agreement.
"""

import json
import sys
import time
from collections import Counter

import numpy as np
from spoiled_shapes import disturbed, spoiled_pictures

from data.packing.shapes import HELDOUT_START, draw, scene
from evaluation.proving import detector as shapes_detector
from evaluation.proving.detector import ACCEPTED, ShapeDetector

THRESHOLDS = (0.80, 0.82, 0.83, 0.84, 0.85, 0.86, 0.87, 0.88, 0.89, 0.90)
DISTURBED = {"as drawn": (0, 0), "blur 0.5 px": (0.5, 0), "noise 6": (0, 6), "both": (0.5, 6)}


def shares(scores):
    """Of lists of the scores of pictures, the share with any above each threshold."""
    best = np.array([max(of_one, default=0.0) for of_one in scores])
    return {threshold: round(float(np.mean(best > threshold)), 4) for threshold in THRESHOLDS}


def drawn_scenes(detector, count, size, blur, noise):
    rng = np.random.default_rng(0)
    scenes = [scene(0, HELDOUT_START + index) for index in range(count)]
    images = [disturbed(draw(drawn, size), rng, blur, noise) for drawn in scenes]
    for image in images[:200]:  # templates are drawn at their first use
        detector.detect(image)
    start = time.process_time()
    found = [detector.detect(image) for image in images]
    seconds = time.process_time() - start
    right = Counter()
    for drawn, image, detections in zip(scenes, images, found, strict=True):
        asked = Counter((obj.shape, obj.color) for obj in drawn.objects)
        colors = detector.colors(image, detections)
        for least in THRESHOLDS:
            told = Counter((d.label, color) for d, color in zip(detections, colors, strict=True) if d.score > least)
            right[least] += told == asked
    return {
        "right": {least: right[least] / count for least in THRESHOLDS},
        "lowest": round(min(d.score for detections in found for d in detections), 3),
        "ms_per_image": round(1000 * seconds / count, 2),
    }


def others(detector, count):
    """For every shape the highest score where only the seven others are known."""
    names, found = shapes_detector.SHAPES, {}
    scenes = [scene(0, HELDOUT_START + index) for index in range(count)]
    for left_out in names:
        shapes_detector.SHAPES = tuple(name for name in names if name != left_out)
        only = [drawn for drawn in scenes if {obj.shape for obj in drawn.objects} == {left_out}]
        scores = ((d.score, d.label) for drawn in only for d in detector.detect(draw(drawn, 32)))
        score, label = max(scores)
        found[left_out] = [label, round(score, 3)]
    shapes_detector.SHAPES = names
    return found


def measure(scenes=2000, spoiled=500):
    detector = ShapeDetector()
    result = {"accepted": ACCEPTED, "scenes": {}, "spoiled": {}}
    for size in (32, 64):
        for name, (blur, noise) in DISTURBED.items():
            result["scenes"][f"{size} px, {name}"] = drawn_scenes(detector, scenes, size, blur, noise)
    for kind, pictures in spoiled_pictures(spoiled).items():
        result["spoiled"][kind] = shares([[d.score for d in detector.detect(image)] for image, _ in pictures])
    result["others"] = others(detector, scenes)
    return result


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:3]))))
