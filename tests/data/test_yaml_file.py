"""YAML that users write: nothing becomes another value than it looks like, and nothing grows without bound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import UserError
from data.yaml_file import MOST_CHARACTERS, dump_yaml, load_yaml, read_yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("-3", -3),
        ("+4", 4),
        ("0", 0),
        ("200_000", 200_000),
        ("0x1F", 31),
        ("0.5", 0.5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("01.5", 1.5),
        ("1e-4", 1e-4),
        ("1.0e5", 1e5),
        ("-2E+3", -2000.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2024-01-31", "2024-01-31"),
        ("0o17", "0o17"),
        ("0b101", "0b101"),
        ("1.2.3", "1.2.3"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("none", "none"),
        ('"010"', "010"),
        ("'1e-4'", "1e-4"),
        ("=", "="),
        ("a # b", "a"),
        ("[1, a, {b: [c]}]", [1, "a", {"b": ["c"]}]),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}),
        ("a: b\x85c\u2028d\u2029e", {"a": "b\x85c\u2028d\u2029e"}),
        ("- |\n  a\u2028b\n  c", ["a\u2028b\nc"]),
    ],
)
def test_what_a_text_means(text: str, value: Any) -> None:
    found = load_yaml(text, "here")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 2\na: 3", "here, line 3: 'a' is given twice, first in line 1"),
        ("a:\n  b: 1\n  c: 2\n  'b': 3", "here, line 4: 'b' is given twice, first in line 2"),
        ("{a: 1, a: 1}", "here: 'a' is given twice, first in line 1"),
        ("- x: {q: 1,\n  q: 2}", "here, line 2: 'q' is given twice, first in line 1"),
        ("1: a\n0x1: b", "here, line 2: '0x1' is given twice, first in line 1 as '1'"),
        ("null: a\n~: b", "here, line 2: '~' is given twice, first in line 1 as 'null'"),
        ("~: a\nb: c\nNULL: d", "here, line 3: 'NULL' is given twice, first in line 1 as '~'"),
        ("true: a\nTrue: b", "here, line 2: 'True' is given twice, first in line 1 as 'true'"),
        ("1: a\n1.0: b", "here, line 2: '1.0' is given twice, first in line 1 as '1'"),
        ("a:\n  1e3: a\n  true: b\n  1: c", "here, line 4: '1' is given twice, first in line 3 as 'true'"),
        ("a: 1\n'a': 2", "here, line 2: 'a' is given twice, first in line 1"),
        (".nan: a\n.NaN: b", "here, line 2: '.NaN' is given twice, first in line 1 as '.nan'"),
        ("!!seq a: 1", "here: not YAML"),
        ("a:\n  <<: {b: 1, b: 2}", "here, line 2: 'b' is given twice"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x", "here, line 4: '<<' is given twice, first in line 3"),
        ("a: 010", "here: 010 is octal to some and decimal to others"),
        ("a:\n- 1\n- -007", "here, line 3: -007 is octal"),
        ("09", "here: 09 is octal"),
        ("!!int '010'", "here: 010 is octal"),
        ("!!int '1:30'", "here: 1:30 is not a number"),
        ("9" * 5000, "here: 9999"),
        ("? [a]\n: b", "here, line 1: a key must be a single word"),
        ("a: [", "here: not YAML: while parsing a flow node"),
        ("a: b: c", "here: not YAML: mapping values are not allowed here"),
        ("a: 1\n--- \nb: 1", "here, line 2: not YAML: expected a single document"),
        ("a: *b", "here: not YAML: found undefined alias"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("!!timestamp 2024-01-01", "could not determine a constructor"),
        ("a: b\x0cc", "here: not YAML: unacceptable character #x000c"),
        ("&a [*a]", "here: an alias leads back to what it is part of"),
        ("a: &x {b: &y [*x]}", "here: an alias leads back"),
        ("[" * 33 + "]" * 33, "here: it is nested more than 32 deep"),
        ("[" * 300_000, "here: it is nested more than 32 deep"),
        ("a" * (MOST_CHARACTERS + 1), "here: has 1,048,577 characters, and may have 1,048,576"),
    ],
)
def test_what_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_yaml(text, "here")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "item", ["[{0},{0},{0},{0},{0},{0},{0},{0},{0}]", "{{<<: [{0},{0},{0},{0},{0},{0},{0},{0},{0}]}}"]
)
def test_an_alias_bomb_is_refused_before_it_is_built(item: str) -> None:
    lines = ["a0: &a0 {lol: lol}"] + [f"a{n}: &a{n} {item.format(f'*a{n - 1}')}" for n in range(1, 9)]
    with pytest.raises(UserError, match=r"line 7: its aliases expand to more than a file may hold"):
        load_yaml("\n".join(lines), "here")


def test_a_chain_of_aliases_is_as_deep_as_what_it_stands_for() -> None:
    chain = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 40)]
    with pytest.raises(UserError, match="aliases expand"):
        load_yaml("\n".join(chain), "here")


@pytest.mark.parametrize(
    "tree",
    ["yes", "010", "08", "1e-4", "1.5e3", "1:30", "2024-01-01", "none", "null", "~", "", "<<", "0x1f", "\u2028a\x85b",
     1e-5, 5e22, 10, True, None, [], {}, {"a": [{"on": "off"}, "a: b", "ünï # hash"]}],
)  # fmt: skip
def test_what_is_written_is_read_back(tree: Any) -> None:
    text = dump_yaml({"a": tree})
    assert load_yaml(text, "here") == {"a": tree} == yaml.safe_load(text)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.name)
def test_shipped_files_mean_what_they_do_elsewhere(path: Path) -> None:
    assert read_yaml(path) == yaml.safe_load(path.read_text())


def test_a_file_is_read_as_all_text(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes("\ufeffa: ü\r\nb: 2\r\n".encode())
    assert read_yaml(tmp_path / "bom.yaml") == {"a": "ü", "b": 2}
    (tmp_path / "latin.yaml").write_bytes("a: ü".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml: should be UTF-8, but byte 3 is 0xfc"):
        read_yaml(tmp_path / "latin.yaml")
