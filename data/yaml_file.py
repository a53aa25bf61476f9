"""YAML that users write, read so that no value becomes another than it looks like.

Mappings, lists, strings, numbers, booleans and null; anchors, aliases and merges (`<<`). The differences to YAML 1.1,
which PyYAML reads:

- a key given twice is an error, however it is spelled (`1` and `0x1`), also in a mapping that is merged into another;
- yes, no, on and off are strings, `1:30` and dates are strings, and `010` (8 in YAML 1.1, 10 in 1.2) is an error;
- `1e-4` is a number;
- a line ends only at a newline (data/files.py);
- length, depth and the expansion of aliases are limited, before anything is built.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from data.errors import UserError
from data.files import read_text

MOST_CHARACTERS = 2**20
"""Limit of a text, and of what its aliases expand to."""
MOST_DEPTH = 32
_TAG = "tag:yaml.org,2002:"
_KEYS = {_TAG + name for name in ("null", "bool", "int", "float", "str")}
_FLOAT = re.compile(r"[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)\Z", re.ASCII)
_PLAIN = (
    ("merge", re.compile(r"<<\Z"), "<"),
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF"),
    ("int", re.compile(r"[-+]?(?:\d[\d_]*|0x[\da-fA-F]+)\Z", re.ASCII), "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("float", re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"), "-+."),
)
"""Tag, form and first characters of unquoted scalars; any other is a string."""
_ZERO_LED = re.compile(r"[-+]?0[\d_]+\Z", re.ASCII)
# PyYAML ends lines at these characters, too: it gets private ones in their place.
_HIDE = str.maketrans("\x85\u2028\u2029", "\U0010f785\U0010f828\U0010f829")
_SHOW = {hidden: plain for plain, hidden in _HIDE.items()}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = dict[str, Any]()  # noqa: RUF012, as PyYAML has it
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag and _TAG + tag: yaml.SafeLoader.yaml_constructors[tag and _TAG + tag]
        for tag in ("null", "bool", "int", "float", "str", "seq", "map", None)
    }

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text.translate(_HIDE))
        self._text, self._where, self._depth = text, where, 0
        self._extents = dict[Node, tuple[int, int]]()  # characters and depth of composed nodes, aliases expanded

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            node = super().compose_node(parent, index)
            if node not in self._extents:
                self._refuse(mark, "an alias leads back to what it is part of")
            return node
        self._depth += 1
        if self._depth > MOST_DEPTH:
            self._refuse(self.peek_event().start_mark, f"it is nested more than {MOST_DEPTH} deep")
        node = cast(Node, super().compose_node(parent, index))
        self._depth -= 1
        if isinstance(node, ScalarNode):
            size, depth = 1 + len(node.value), 1
        else:
            pairs = isinstance(node, MappingNode)
            parts = [self._extents[child] for part in node.value for child in (part if pairs else (part,))]
            size, depth = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
        if size > MOST_CHARACTERS or depth > MOST_DEPTH:
            self._refuse(node.start_mark, "its aliases expand to more than a file may hold")
        self._extents[node] = size, depth
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        mapping = super().compose_mapping_node(anchor)
        firsts = dict[Any, ScalarNode]()
        for key, _ in mapping.value:
            if not isinstance(key, ScalarNode):
                self._refuse(key.start_mark, "a key must be a single word")
            first = firsts.setdefault(self._value(key), key)
            if first is not key:
                spelled = "" if first.value == key.value else f" as {first.value!r}"
                words = f"{key.value!r} is given twice, first in line {first.start_mark.line + 1}{spelled}"
                self._refuse(key.start_mark, words)
        return mapping

    def _value(self, key: ScalarNode) -> Any:
        """A key as a dict compares it: 1, 1.0 and true are equal, and here NaN equals itself."""
        if key.tag not in _KEYS:  # a merge, or an error later on
            return key.tag, key.value
        value = self.construct_object(key)
        return value if value == value else (key.tag, "nan")

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        return value.translate(_SHOW) if isinstance(value, str) else value

    def construct_number(self, node: Any) -> int | float:
        value = self.construct_scalar(node)
        if _ZERO_LED.match(value):
            self._refuse(
                node.start_mark,
                f"{value} is octal to some and decimal to others: write it without leading zeros, or in quotes as text",
            )
        try:
            digits = value.lower().replace("_", "")
            return int(digits, 0) if node.tag == _TAG + "int" else float(re.sub(r"\.(?=inf|nan)", "", digits))
        except ValueError:
            self._refuse(node.start_mark, f"{value:.40} is not a number")

    def _refuse(self, mark: yaml.Mark, words: str) -> NoReturn:
        raise UserError(f"{self._where}{_line(mark, self._text)}: {words}")


def _line(mark: yaml.Mark | None, text: str) -> str:
    """Where a mark is, for a message about a text of several lines."""
    return f", line {mark.line + 1}" if mark is not None and "\n" in text else ""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that this module or YAML 1.1 would read as another type."""


for _name, _form, _first in _PLAIN:
    _Loader.add_implicit_resolver(_TAG + _name, _form, list(_first))
    _Dumper.add_implicit_resolver(_TAG + _name, _form, list(_first))
for _name in ("int", "float"):
    _Loader.add_constructor(_TAG + _name, _Loader.construct_number)


def load_yaml(text: str, where: str) -> Any:
    """The content of one YAML document, None if it is empty; `where` names it in errors.

    Raises:
        UserError: it is not YAML, or not accepted here; the message names the line.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{where}: has {len(text):,} characters, and may have {MOST_CHARACTERS:,}")
    try:
        return _Loader(text, where).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = _line(error.problem_mark or error.context_mark, text)
        words = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{where}{line}: not YAML: {words}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path, where: str = "") -> Any:
    """The content of a YAML file; raises UserError as `load_yaml`, or if it cannot be read."""
    return load_yaml(read_text(path, where), where or str(path))


def dump_yaml(tree: Any) -> str:
    """YAML that `load_yaml` and other readers parse to the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=100)
