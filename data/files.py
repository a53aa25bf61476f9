"""Files: paths filled in, text that users write, durable writes that are whole or absent, locks between processes.

Text is UTF-8, with or without a byte-order mark. A line ends at a newline (LF, CRLF or CR) and nowhere else:
U+2028, form feed and NEL, at which `str.splitlines` also splits, are part of a line.
"""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from data.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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


def refuse_lfs_pointers(path: Path, where: str) -> None:
    """`refuse_lfs_pointer` for a file, or for all files of a folder, such as a model's.

    Each library has its own words for what it cannot read, so this belongs where loading fails.

    Raises:
        UserError: there is such a pointer.
    """
    for file in [path, *sorted(path.glob("*"))]:
        if file.is_file():
            with file.open("rb") as opened:
                refuse_lfs_pointer(opened.read(64), f"{where}: {file}")


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


@contextmanager
def name_in_errors(where: str, verb: str = "written") -> Iterator[None]:
    """Turn an OSError into a UserError that begins with the option, field or file at fault."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where}: cannot be {verb}: {error.strerror or error}") from error


def refuse_existing(path: Path, where: str) -> None:
    """Raise a UserError if there is a file or folder at `path`, which the option or field `where` names."""
    if os.path.lexists(path):
        raise UserError(f"{where}: {path} exists: remove it, or give another name")


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under, no other process's; at the end the file is `path`, durably.

    After an error it is removed. A killed process leaves it behind, for `remove_partials`.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):  # of a full disk, which names none
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync(path.parent)


def atomic_write(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file, in pieces or at once, that is whole or absent whatever happens, durably."""
    with atomic_path(path) as partial, partial.open("xb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)


def write_json(path: Path, tree: Any) -> None:
    """Write JSON's types to a file that is whole or absent."""
    atomic_write(path, (json.dumps(tree, indent=1) + "\n").encode())


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image, uint8 (H, W, 3), as a PNG file that is whole or absent."""
    from PIL import Image  # here: this module is imported before any library is loaded

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())


def commit(aside: Path, final: Path) -> None:
    """Give a finished folder its name, in place of a damaged or superseded one that may have it, durably."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    try:
        aside.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left of `atomic_path` in a folder and all below, which no other process writes."""
    for path in folder.rglob(".*.partial"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def lock_beside(path: Path) -> Path:
    """The lock's file of a file or folder that is to appear at once."""
    return path.with_name(f".{path.name}.lock")


class InUseError(UserError):
    """Another process holds a lock."""


class FileLock:
    """A lock on a file, which the system drops with the process that holds it, on whichever machine that runs.

    The file says who holds it, and goes with the lock. A context, at whose end it is released.

    Args:
        path: the file; its folder is made if need be.
        name: of what is locked, for messages.
        note: written beside the holder's process and machine.
        patience_s: seconds to wait for another holder to leave.

    Raises:
        InUseError: another process still holds it after that; the message names it.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, name: str, note: str = "", patience_s: float = 0.0) -> None:
        self.path = path
        self._made = [folder for folder in path.parents if not folder.exists()]
        self._file = self._open()
        deadline = time.monotonic() + patience_s
        said = False
        while not self._try():
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            if time.monotonic() > deadline:
                self._file.close()
                raise InUseError(f"{name} is in use by {holder}: stop it, or give another name")
            if not said:
                print(f"{name} is in use by {holder}; waiting for it to leave", file=sys.stderr)
                said = True
            time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} {note}".strip())
        self._file.flush()
        os.fsync(self._file.fileno())  # else a network file system may keep it from other machines

    def _open(self) -> IO[str]:
        while True:
            with suppress(FileExistsError):  # a file in the way, of which opening says that it is no folder
                self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return self.path.open("a+")
            except FileNotFoundError:  # its holder has just removed the folder that it had made
                if self.path.is_symlink():
                    raise

    def _try(self) -> bool:
        """Lock the file, unless another process has; one that its holder has removed meanwhile is made anew."""
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            try:
                if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                    return True
            except FileNotFoundError:
                pass
            self._file.close()
            self._file = self._open()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *given: object) -> None:
        self.release()

    def release(self) -> None:
        """Let another process have it. Folders that were made for the lock and hold nothing else go again."""
        self.path.unlink(missing_ok=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # it holds something
                break
        self._file.close()
