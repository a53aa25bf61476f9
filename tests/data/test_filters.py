"""Choosing by the filters: what is there, by weight; what is bad and what is only left out; mistakes by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from data.errors import BadSample, DataError, Filtered
from data.filters import PREFIXES, UNIFORMS, Filters

MIDDLE = (0.5,) * UNIFORMS


def sample(metadata: Any = None, **members: str | bytes) -> dict[str, bytes]:
    """An image, a caption, and metadata as JSON unless it is bytes already."""
    parts = {"jpg": b"image", "txt": b"a red cat"} | {
        k: v if isinstance(v, bytes) else v.encode() for k, v in members.items()
    }
    if metadata is not None:
        parts["json"] = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    return parts


def reason(members: Mapping[str, bytes], filters: Filters, kind: type[BadSample] | type[Filtered]) -> str:
    with pytest.raises(kind) as caught:
        filters.select(members, MIDDLE)
    return caught.value.reason


def test_the_first_image_listed_wins_and_the_caption_is_stripped() -> None:
    members = {"png": b"png", "jpeg": b"jpeg", "txt": "\ufeff  a réd cat\n".encode()}
    assert Filters().select(members, MIDDLE) == (b"jpeg", "a réd cat")
    assert Filters(images=("seg.png", "png", "jpeg")).select(members, MIDDLE)[0] == b"png"


def test_what_is_no_text_is_bad_and_what_is_missing_or_empty_is_left_out() -> None:
    assert reason({"txt": b"a"}, Filters(), Filtered) == "missing_image"
    assert reason({"jpg": b""}, Filters(), Filtered) == "missing_caption"
    assert reason(sample(txt=b"caf\xe9"), Filters(), BadSample) == "bad_caption"
    assert reason(sample(txt=" \n"), Filters(), Filtered) == "empty_caption"
    by_field = Filters(captions={"json:text": 1})
    assert reason(sample({"text": 3}), by_field, BadSample) == "bad_caption"
    assert reason(sample({"text": "\ud800"}), by_field, BadSample) == "bad_caption"
    assert reason(sample({"text": None}), by_field, Filtered) == "missing_caption"
    assert reason(sample({"text": ""}), by_field, Filtered) == "empty_caption"
    assert reason(sample(), by_field, Filtered) == "missing_caption"


def test_the_choice_is_by_weight_among_captions_that_are_there_and_not_empty() -> None:
    filters = Filters(captions={"a": 1, "json:deep.b": 3, "empty": 50, "absent": 50})
    members = sample({"deep": {"b": "from b"}}, a="from a", empty=" ")
    draws = (np.arange(1000) + 0.5) / 1000
    counts = Counter(filters.select(members, (draw, 0.5, 0.5))[1] for draw in draws)
    assert counts == {"from a": 250, "from b": 750}
    assert filters.select(members, (1 - 1e-16, 0.5, 0.5))[1] == "from b"


def test_a_list_of_captions_is_a_choice_that_shares_the_fields_weight() -> None:
    five = {"captions": ["one", "two ", None, "", "three"], "short": "four"}
    filters = Filters(captions={"json:captions": 3, "json:short": 1, "txt": 1})
    assert filters.random and Filters(captions={"json:captions": 1}).random and not Filters().random
    draws = (np.arange(1000) + 0.5) / 1000
    counts = Counter(filters.select(sample(five, txt="five"), (draw, 0.5, 0.5))[1] for draw in draws)
    assert counts == {"one": 200, "two": 200, "three": 200, "four": 200, "five": 200}
    alone = Filters(captions={"json:c": 1})
    for value, why in (([], "missing_caption"), ([None], "missing_caption"), (["", " "], "empty_caption")):
        assert reason(sample({"c": value}), alone, Filtered) == why
    kinds = {"an object: name one of its fields": {"en": "x"}, "a list in a list": [["x"]], "a number": ["x", 7]}
    for why, value in {**kinds, "true or false": True}.items():
        with pytest.raises(BadSample, match=f"bad_caption: json:c should be a text or a list of texts, and is {why}"):
            alone.select(sample({"c": value}), MIDDLE)


def test_a_field_may_have_dots_in_its_name() -> None:
    filters = Filters(captions={"json:text.en": 1}, fields={"meta.score": (1, 2)})
    assert filters.select(sample({"text.en": "flat", "meta.score": 1.5}), MIDDLE)[1] == "flat"
    assert filters.select(sample({"text": {"en": "deep"}, "meta": {"score": 1.5}}), MIDDLE)[1] == "deep"


def test_metadata_is_read_only_where_a_rule_needs_it() -> None:
    for broken in (b"{", b"\xff", b"[1]", b'"text"', b"[" * 100_000):
        members = sample(broken)
        assert Filters().select(members, MIDDLE)[1] == "a red cat"
        assert reason(members, Filters(fields={"score": (0, None)}), BadSample) == "bad_metadata"
        assert reason(members, Filters(captions={"txt": 1, "json:x": 1}), BadSample) == "bad_metadata"
    members = sample() | {"meta": b'{"score": 1}'}
    assert Filters(metadata="meta", fields={"score": (0, None)}).select(members, MIDDLE)[0] == b"image"


@pytest.mark.parametrize(
    ("value", "passes"),
    [(5, True), (6.0, True), ("5.5", True), (" 5 ", True), (7, True), (4.99, False), (7.01, False), ("8", False)]
    + [(float("nan"), False), ("nan", False), ("high", False), (None, False), ([5], False), (True, False)]
    + [("inf", False), (10**400, False)],
)
def test_fields_are_numbers_in_a_range_ends_included(value: Any, passes: bool) -> None:
    filters = Filters(fields={"scores.aesthetic": (5, 7)})
    members = sample({"scores": {"aesthetic": value}})
    if passes:
        filters.select(members, MIDDLE)
    else:
        assert reason(members, filters, Filtered) == "field:scores.aesthetic"


def test_open_ranges_and_missing_fields() -> None:
    members = sample({"a": 1, "nsfw": False, "b": {"c": -3}})
    Filters(fields={"a": (1, None), "nsfw": (None, 0), "b.c": (None, None)}).select(members, MIDDLE)
    assert reason(members, Filters(fields={"a": (None, None), "z": (None, None)}), Filtered) == "field:z"
    assert reason(members, Filters(fields={"a.c": (None, None)}), Filtered) == "field:a.c"
    assert reason(sample(), Filters(fields={"a": (None, None)}), Filtered) == "field:a"


def test_caption_words() -> None:
    for least, most, passes in ((3, 3, True), (0, None, True), (4, None, False), (0, 2, False)):
        filters = Filters(min_caption_words=least, max_caption_words=most)
        if passes:
            filters.select(sample(), MIDDLE)
        else:
            assert reason(sample(), filters, Filtered) == "caption_words"
    # The words that count are the caption's own.
    Filters(max_caption_words=3, prefix_probability=1).select(sample(), MIDDLE)


def test_short_captions_are_prefixed_at_the_given_rate() -> None:
    filters = Filters(prefix_probability=0.25, prefix_below_words=4)
    chosen = [
        filters.select(sample(), (0.5, draw, other))[1] for draw, other in np.random.default_rng(0).random((4000, 2))
    ]
    counts = Counter(chosen)
    assert set(counts) == {"a red cat", *(prefix + "a red cat" for prefix in PREFIXES)}
    assert abs(counts.pop("a red cat") - 3000) < 120
    assert len(PREFIXES) == 8 and min(counts.values()) > 80
    always = Filters(prefix_probability=1, prefix_below_words=4)
    assert always.select(sample(txt="Big cat"), (0.5, 0.999, 0))[1] == PREFIXES[0] + "Big cat"
    assert always.select(sample(txt="a red cat sleeps"), MIDDLE)[1] == "a red cat sleeps"
    long = Filters(prefix_probability=1, prefix_below_words=99)
    for kept in ("a PHOTO of cats", PREFIXES[5] + "it"):
        assert long.select(sample(txt=kept), MIDDLE)[1] == kept
    assert Filters(prefix_probability=1, prefix_below_words=3).select(sample(), MIDDLE)[1] == "a red cat"


@pytest.mark.parametrize(
    ("filters", "named"),
    [
        ({"images": ()}, "images"),
        ({"images": ("JPG",)}, "images"),
        ({"images": (".jpg",)}, "images"),
        ({"captions": {}}, "captions"),
        ({"captions": {"txt": 0}}, "captions['txt']"),
        ({"captions": {"txt": float("nan")}}, "captions['txt']"),
        ({"captions": {"txt": float("inf")}}, "captions['txt']"),
        ({"captions": {"json:": 1}}, "captions"),
        ({"metadata": ""}, "metadata"),
        ({"fields": {"a..b": (0, 1)}}, "fields"),
        ({"fields": {"a": (2, 1)}}, "fields['a']"),
        ({"fields": {"a": (float("nan"), None)}}, "fields['a']"),
        ({"min_side": -1}, "min_side"),
        ({"max_aspect_ratio": 0.9}, "max_aspect_ratio"),
        ({"min_caption_words": -1}, "min_caption_words"),
        ({"min_caption_words": 5, "max_caption_words": 4}, "max_caption_words"),
        ({"max_caption_words": 0}, "max_caption_words"),
        ({"prefix_probability": 1.1}, "prefix_probability"),
        ({"prefix_below_words": -1}, "prefix_below_words"),
    ],
)
def test_rules_that_make_no_sense_are_named(filters: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError) as caught:
        Filters(**filters)
    assert str(caught.value).startswith(f"{named} = ")
