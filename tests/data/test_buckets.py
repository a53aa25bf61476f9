"""The tables of aspect-ratio buckets are those that are known, and an image goes to the nearest ratio."""

from __future__ import annotations

import pytest

from data.errors import DataError
from data.filters import Buckets, Size, pixeldit_sizes, sdxl_sizes

# Of the tables that PixArt and Sana ship: height / width to 2 decimals.
KEYS = """0.25 0.26 0.27 0.28 0.32 0.33 0.35 0.4 0.42 0.48 0.5 0.52 0.57 0.6 0.68 0.72 0.78 0.82 0.88 0.94
    1.0 1.07 1.13 1.21 1.29 1.38 1.46 1.67 1.75 2.0 2.09 2.4 2.5 2.89 3.0 3.11 3.62 3.75 3.88 4.0"""


def test_sdxls_table_has_its_40_sizes() -> None:
    table = sdxl_sizes(1024)
    assert len(table) == len(set(table)) == 40
    assert sorted(round(height / width, 2) for height, width in table) == [float(key) for key in KEYS.split()]
    assert all(side % 64 == 0 and 512 <= side <= 2048 for size in table for side in size)
    assert {(512, 2048), (1024, 1024), (704, 1344), (960, 1024), (1024, 960), (2048, 512)} < set(table)
    assert (1344, 704) not in table


@pytest.mark.parametrize("side", [16, 256, 512, 2048])
def test_sdxls_table_at_another_side_is_the_same_scaled(side: int) -> None:
    assert [(h * 1024, w * 1024) for h, w in sdxl_sizes(side)] == [(h * side, w * side) for h, w in sdxl_sizes(1024)]


def test_pixeldits_table_has_its_7_sizes_and_tokens() -> None:
    table = pixeldit_sizes(1024)
    assert set(table) == {(752, 1344), (896, 1344), (896, 1200), (1024, 1024), (1344, 752), (1344, 896), (1200, 896)}
    assert sorted(h // 16 * (w // 16) for h, w in table) == [3948, 3948, 4096, 4200, 4200, 4704, 4704]
    assert pixeldit_sizes(512) == tuple((h // 2, w // 2) for h, w in table)


@pytest.mark.parametrize("side", [0, -64, 1000, 520])
def test_sides_that_make_no_whole_sizes_are_refused(side: int) -> None:
    for table in (sdxl_sizes, pixeldit_sizes):
        with pytest.raises(DataError, match=rf"resolution {side} must be a multiple of (16|64)"):
            table(side)


@pytest.mark.parametrize(
    ("sizes", "image", "nearest"),
    [
        # Nearest by difference: by quotient, 2.3 is nearer 4.
        ([(8, 8), (16, 4)], (230, 100), (8, 8)),
        ([(8, 8), (16, 4)], (251, 100), (16, 4)),
        # The table's ratios are rounded: 0.341 is nearer 1/3 than 0.35, but not than 0.33.
        ([(9, 27), (7, 20)], (341, 1000), (7, 20)),
        # As near to both: the wider, wherever it stands in the table.
        ([(8, 8), (8, 16)], (75, 100), (8, 16)),
        ([(8, 16), (8, 8)], (75, 100), (8, 16)),
        # Beyond the ends of the table.
        ([(8, 8), (8, 16), (16, 8)], (1, 900), (8, 16)),
        ([(8, 8), (8, 16), (16, 8)], (900, 1), (16, 8)),
    ],
)
def test_an_image_goes_to_the_nearest_ratio(sizes: list[Size], image: Size, nearest: Size) -> None:
    assert Buckets(tuple(sizes), 1).nearest(*image) == nearest


def test_every_size_of_a_table_is_its_own_bucket() -> None:
    for table in (sdxl_sizes(1024), pixeldit_sizes(1024)):
        assert all(Buckets(table, 8).nearest(*size) == size for size in table)


@pytest.mark.parametrize(
    ("sizes", "group_size", "said"),
    [
        ([], 1, "name at least one"),
        ([(8, 0)], 1, "name at least one"),
        ([(8, 8)], 0, "group_size 0"),
        ([(8, 8), (8, 8)], 1, r"\[8, 8\] and \[8, 8\] have the same ratio of height to width, 1.0"),
        ([(8, 8), (300, 1001), (100, 333)], 1, "same ratio of height to width, 0.3"),
    ],
)
def test_wrong_buckets_are_refused(sizes: list[Size], group_size: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Buckets(tuple(sizes), group_size)
