"""Files that users name and write: paths filled in, text in one encoding, lines by one rule.

Text is UTF-8, with or without a byte-order mark. A line ends at a newline (LF, CRLF or CR) and nowhere else:
U+2028, form feed and NEL, at which `str.splitlines` also splits, are part of a line.
"""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path
from typing import TypeVar

from data.errors import UserError

P = TypeVar("P", str, Path)

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def expand_path(path: P) -> P:
    """A path, or the address of a store, with its `~`, `~user`, `$NAME` and `${NAME}` filled in.

    What comes of it has none, so that it may be expanded again.

    Raises:
        UserError: a variable that is not set, is empty or holds a `$` or `~` itself, or a user that is not known.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        held = os.environ.get(name, "")
        if not held:
            raise UserError(f"{str(path)!r}: the variable {name} is not set")
        if "$" in held or held.startswith("~"):
            raise UserError(f"{str(path)!r}: the variable {name} should hold a path as it is, not {held!r}")
        return held

    filled = os.path.expanduser(_VARIABLE.sub(value, str(path)))
    if filled.startswith("~"):
        raise UserError(f"{str(path)!r}: there is no user {filled[1:].partition('/')[0]!r} whose folder it could be")
    return type(path)(filled)


def decode_text(raw: bytes, where: str) -> str:
    """The text of a file; `where` names it in the error.

    Raises:
        UserError: the bytes are not UTF-8 (the sentence names the first byte that is not), or a Git LFS pointer.
    """
    refuse_lfs_pointer(raw, where)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{where}: is UTF-16, and should be UTF-8")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: should be UTF-8, but byte {error.start} is 0x{raw[error.start]:02x}: save it as UTF-8"
        ) from error


def refuse_lfs_pointer(head: bytes, where: str) -> None:
    """Refuse what Git leaves in the place of a large file that it has not fetched; `head` is how the file begins.

    Raises:
        UserError: it is such a pointer.
    """
    if head.startswith(b"version https://git-lfs.github.com/"):
        raise UserError(f"{where}: is a Git LFS pointer, not the file itself: fetch it by `git lfs pull`")


def split_lines(text: str) -> list[str]:
    """Lines without their newlines; blank lines at the end are dropped, others kept."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_text(path: Path, where: str = "") -> str:
    """The text of a file; `where` names it in errors, and is the path itself if empty.

    Raises:
        UserError: it cannot be opened (missing, a folder, no permission), or is not UTF-8.
    """
    where = where or str(path)
    try:
        return decode_text(path.read_bytes(), where)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error


def read_lines(path: Path, where: str = "") -> list[str]:
    """The lines of a file (`split_lines`).

    Raises:
        UserError: as `read_text`.
    """
    return split_lines(read_text(path, where))
