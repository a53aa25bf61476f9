"""Real photographs for the benchmarks: crops of Debian's wallpaper packages.

The packages are downloaded with `apt-get download` and unpacked below .cache/photographs; nothing is installed. Their
licences are CC BY, CC BY-SA, CC0 and GPL-2+; the crops stay on this machine.
"""

from __future__ import annotations

import io
import re
import subprocess
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "photographs"
PACKAGES = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers")
PHOTOGRAPHS = re.compile(
    r"(Bridge|Dragonfly|Kleiber|Picture_0B|Wine|aitzgorri|free|friends|greentock|life|picosdeeuropa|seeding|sunset)_by_"
    r"|mate/nature/"
    r"|(BytheWater|ColdRipple|DarkestHour|EveningGlow|FallenLeaf|Kite|OneStandsOut|Path|summer_1am)/.*/2560x1600"
)
"""The rest of the packages are drawings, and the same pictures in other sizes."""
SIDE, QUALITY = 1024, 90


def describe(crops: list[bytes]) -> str:
    """Say what a benchmark used."""
    mean = sum(map(len, crops)) / len(crops) / 1000
    return (
        f"{len(crops)} crops of {SIDE} px from the photographs in Debian's {', '.join(PACKAGES)}, JPEG quality "
        f"{QUALITY}, 4:2:0, {mean:.0f} KB on average"
    )


def crops() -> list[bytes]:
    """JPEG files: every photograph of at least 1,024 px, cut into crops that do not overlap."""
    folder = CACHE / "crops"
    if not folder.exists():
        aside = CACHE / "crops.partial"
        aside.mkdir(parents=True, exist_ok=True)
        number = 0
        for path in sorted(path for path in _unpacked().rglob("*.jpg") if PHOTOGRAPHS.search(str(path))):
            for crop in _cut(path):
                (aside / f"{number:05d}.jpg").write_bytes(crop)
                number += 1
        aside.rename(folder)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def _unpacked() -> Path:
    tree = CACHE / "tree"
    if not tree.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=CACHE, check=True)
        aside = CACHE / "tree.partial"
        for package in CACHE.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(aside)], check=True)
        aside.rename(tree)
    return tree


def _cut(path: Path) -> list[bytes]:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        pixels = np.asarray(image.convert("RGB"))
    found = []
    for top in range(0, pixels.shape[0] - SIDE + 1, SIDE):
        for left in range(0, pixels.shape[1] - SIDE + 1, SIDE):
            crop = np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE])
            found.append(bytes(simplejpeg.encode_jpeg(crop, QUALITY, "RGB", "420")))
    return found
