"""A hand-made copy of DPG-Bench: two prompts, seven questions, dependencies two deep."""

from __future__ import annotations

import csv
from pathlib import Path

HEADER = (
    "item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
    "question_natural_language",
)  # fmt: skip
CAT, DOG = "a red cat with stripes", "a dog left of a cat"
ROWS = [
    ("cat1", CAT, "", "1", "0", "entity", "whole", "entity - whole (cat)", "Is there a cat?"),
    ("cat1", CAT, "", "2", "1", "attribute", "color", "attribute - color (cat, red)", "Is the cat red?"),
    ("cat1", CAT, "", "3", "2", "attribute", "texture", "attribute - texture (stripes)", "Are its stripes red, too?"),
    ("cat1", CAT, "", "4", "0", "global", "", "global - (photo)", "Is it a photo?"),
    ("dog2", DOG, "", "1", "0", "entity", "whole", "entity - whole (dog)", "Is there a dog?"),
    ("dog2", DOG, "", "2", "1, 3", "relation", "spatial", "relation - spatial (dog, cat)", "Is the dog on the left?"),
    ("dog2", DOG, "", "3", "0", "entity", "whole", "entity - whole (cat)", "Is there a cat?"),
]  # fmt: skip


def write_copy(folder: Path, rows: list[tuple[str, ...]] = ROWS, header: tuple[str, ...] = HEADER) -> Path:
    """Write it; prompts are always both."""
    (folder / "prompts").mkdir(parents=True)
    for name, prompt in (("cat1", CAT), ("dog2", DOG)):
        (folder / "prompts" / f"{name}.txt").write_text(prompt + "\n")
    with (folder / "dpg_bench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder
