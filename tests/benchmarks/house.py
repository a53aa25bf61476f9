"""How large the code is, and how it is cut into files and functions.

    python tests/benchmarks/house.py                    # of the checkout that this script is in
    python tests/benchmarks/house.py CHECKOUT
    python tests/benchmarks/house.py BEFORE AFTER       # each number of both, side by side

Prints one JSON object. Unless said otherwise a number is of the Python files in t2i/, data/, launch/ and evaluation/.

    tokens              as Python's tokenize has them (an f-string is one up to Python 3.11, several from 3.12), without
                        comments, docstrings, indents and ends of lines: longer lines are no saving
    over_450_lines      files, longest first
    function_lines      mean, from `def` to the end of the body; functions inside functions count again for themselves
    docstring_share     lines of docstrings, those of attributes too, over all lines
    tests               lines of Python in tests/ without its helpers and benchmarks, which stand beside
    html ... javascript lines of such files and of jinja2 templates, tests/ aside; what <style> and <script> hold is
                        CSS and JavaScript. `_in_python`: lines of Python with a string that has a tag, a rule of CSS,
                        or JavaScript's words in it
    markup_characters   of all those files, whose lines have any length
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOMS = ("t2i", "data", "launch", "evaluation")
LONG = 450
UNCOUNTED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
SUFFIXES = {".html": "html", ".css": "css", ".js": "javascript"}
SUFFIXES |= dict.fromkeys((".j2", ".jinja", ".jinja2"), "jinja2")
MARKUP = {
    "html": re.compile(r"</?[a-z][a-z0-9]*(\s+[a-z-]+=|\s*/?>)"),
    "css": re.compile(r"[\w.#:)\]*-]\s*\{\s*-?-?[a-z-]+:[^}]*[;}]"),
    "javascript": re.compile(r"=>\s*[{(]|\bdocument\.|\bfunction\s*\(|addEventListener"),
}


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Strings that stand alone: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def rows_of(node: ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def count_tokens(text: str, docstring_rows: set[int]) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(
        token.type not in UNCOUNTED and not (token.type == tokenize.STRING and token.start[0] in docstring_rows)
        for token in tokens
    )


def markup_rows(tree: ast.AST, docstring_rows: set[int]) -> Counter[str]:
    """Lines of strings that hold HTML, or else CSS or JavaScript; of f-strings what stands between the braces."""
    rows: dict[str, set[int]] = {kind: set() for kind in MARKUP}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            text = node.value
        else:
            continue
        kind = next((kind for kind, form in MARKUP.items() if form.search(text)), None)
        if kind is not None:
            rows[kind] |= set(rows_of(node)) - docstring_rows
    return Counter({f"{kind}_in_python": len(found) for kind, found in rows.items()})


def measure_markup(root: Path) -> Counter[str]:
    """Lines by kind of the files that are no Python."""
    found = Counter(dict.fromkeys((*SUFFIXES.values(), "markup_characters"), 0))
    for path in (path for room in ROOMS for path in (root / room).rglob("*") if path.suffix in SUFFIXES):
        text = path.read_text()
        found["markup_characters"] += len(text)
        inside = ""
        for line in text.splitlines():
            if inside and f"</{inside}" in line:
                inside = ""
            found[{"style": "css", "script": "javascript"}.get(inside, SUFFIXES[path.suffix])] += 1
            opened = (tag for tag in ("style", "script") if f"<{tag}" in line and f"</{tag}" not in line)
            inside = next(opened, inside)
    return found


def lines_of(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def measure(root: Path) -> dict[str, Any]:
    """All numbers of a checkout."""
    lines: Counter[str] = Counter()
    functions: list[int] = []
    tokens = docstring_lines = 0
    markup = measure_markup(root)
    for path in (path for room in ROOMS for path in sorted((root / room).rglob("*.py"))):
        text = path.read_text()
        tree = ast.parse(text)
        docstring_rows = {row for node in docstrings(tree) for row in rows_of(node)}
        lines[path.relative_to(root).as_posix()] = len(text.splitlines())
        defined = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        functions += [(node.end_lineno or node.lineno) - node.lineno + 1 for node in defined]
        tokens += count_tokens(text, docstring_rows)
        docstring_lines += len(docstring_rows)
        markup.update(markup_rows(tree, docstring_rows))
    if not lines:
        raise SystemExit(f"{root} is no checkout: it has no Python in {', '.join(ROOMS)}")
    apart = {name: lines_of(root / "tests" / name) for name in ("helpers", "benchmarks")}
    return {
        "files": len(lines),
        "lines": lines.total(),
        "lines_per_file": round(lines.total() / len(lines)),
        "tokens": tokens,
        "longest_file": lines.most_common(1)[0],
        f"over_{LONG}_lines": [name for name, count in lines.most_common() if count > LONG],
        "functions": len(functions),
        "function_lines": round(sum(functions) / len(functions), 1),
        "docstring_share": round(docstring_lines / lines.total(), 3),
        "tests": lines_of(root / "tests") - sum(apart.values()),
        **{f"tests_{name}": count for name, count in apart.items()},
        **dict(sorted(markup.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).resolve().parents[2])
    parser.add_argument("after", type=Path, nargs="?", help="another checkout, printed beside")
    given = parser.parse_args()
    found: dict[str, Any] = measure(given.checkout)
    if given.after is not None:
        after = measure(given.after)
        found = {name: {"before": value, "after": after.get(name)} for name, value in found.items()}
    print("{" + ",".join(f"\n {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()) + "\n}")


if __name__ == "__main__":
    main()
