"""Decoding JPEGs to a quarter of their size: this project's decode, its codec alone, Pillow, OpenCV; one JSON object.

    python tests/benchmarks/decode.py [--crops 64] [--rounds 10]

Two sets of photographs at their own resolution, none enlarged, all encoded at quality 90, 4:2:0: the 1024 px crops of
`photographs.py` (256 px come out), and the squares in the middle of what scikit-learn and, where it is installed,
scikit-image ship. One thread; every picture goes through all four in turn, so that a busy machine slows all alike;
a picture counts with the median of its rounds. PSNR is to Pillow's full-size decode and Lanczos.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import photographs
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from data.decode import decode

SHRINK = 4
Pixels = NDArray[np.uint8]


def ours(data: bytes, side: int) -> Pixels:
    return decode(data, side)


def codec_alone(data: bytes, side: int) -> Pixels:
    return np.asarray(simplejpeg.decode_jpeg(data, "RGB", min_height=2 * side, min_width=2 * side))


def pillow_lanczos(data: bytes, side: int) -> Pixels:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def opencv_area(data: bytes, side: int) -> Pixels:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_COLOR_2 | cv2.IMREAD_IGNORE_ORIENTATION)
    image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))


METHODS: dict[str, Callable[[bytes, int], Pixels]] = {
    "decode": ours,
    "simplejpeg_alone": codec_alone,
    "pillow_full_lanczos": pillow_lanczos,
    "opencv_reduced_area": opencv_area,
}


def shipped() -> Iterator[tuple[str, Image.Image]]:
    """The photographs that come with Python packages, by name."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    for name, picture in zip(samples.filenames, samples.images, strict=True):
        yield f"scikit-learn {Path(name).name}", Image.fromarray(picture)
    try:
        import skimage
    except ImportError:
        return
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"):
        yield f"scikit-image {name}", Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def square(image: Image.Image) -> tuple[bytes, int]:
    """The middle of a picture as JPEG, and the side it is decoded to."""
    side = min(image.size) // SHRINK
    left, top = (image.width - SHRINK * side) // 2, (image.height - SHRINK * side) // 2
    buffer = io.BytesIO()
    image.crop((left, top, left + SHRINK * side, top + SHRINK * side)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), side


def psnr(a: Pixels, b: Pixels) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def measure(pictures: list[tuple[bytes, int]], rounds: int) -> dict[str, Any]:
    times = np.zeros((rounds, len(pictures), len(METHODS)))
    for number in range(-1, rounds):  # the first round warms up, and the next one overwrites it
        for at, picture in enumerate(pictures):
            for column, method in enumerate(METHODS.values()):
                began = time.perf_counter()
                method(*picture)
                times[max(number, 0), at, column] = time.perf_counter() - began
    seconds = dict(zip(METHODS, np.median(times, axis=0).sum(axis=0), strict=True))
    results: dict[str, Any] = {}
    for name, method in METHODS.items():
        results[name] = {"images_per_s": round(len(pictures) / seconds[name], 1)}
        if name not in ("simplejpeg_alone", "pillow_full_lanczos"):
            decibels = [psnr(method(*picture), pillow_lanczos(*picture)) for picture in pictures]
            results[name] |= {"psnr_mean_db": round(np.mean(decibels), 1), "psnr_min_db": round(min(decibels), 1)}
    results["ratio_vs_pillow"] = round(seconds["pillow_full_lanczos"] / seconds["decode"], 2)
    results["ratio_vs_opencv"] = round(seconds["opencv_reduced_area"] / seconds["decode"], 2)
    results["share_of_simplejpeg"] = round(seconds["simplejpeg_alone"] / seconds["decode"], 3)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=64, help="how many crops of 1024 px, evenly spread over all")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    everything = photographs.crops()
    crops = everything[:: max(1, len(everything) // options.crops)][: options.crops]
    names, images = zip(*shipped(), strict=True)
    sets = {
        "crops_1024": (photographs.describe(crops), [(crop, photographs.SIDE // SHRINK) for crop in crops]),
        "small": (", ".join(names), [square(image) for image in images]),
    }
    results = {name: {"photographs": what} | measure(some, options.rounds) for name, (what, some) in sets.items()}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
