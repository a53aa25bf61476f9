"""Files: variables in paths, text that users write, atomic and durable writes, locks between processes.

Text is UTF-8, with or without a byte-order mark. A line ends at a newline (LF, CRLF or CR) and nowhere else:
U+2028, form feed and NEL, at which `str.splitlines` also splits, are part of a line.
"""

from __future__ import annotations

import errno
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
from data.listing import LFS_POINTER, kind_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

P = TypeVar("P", str, Path)

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def expand_path(path: P) -> P:
    """A path, or a store's address, with its `~`, `~user`, `$NAME` and `${NAME}` expanded; the result contains none.

    Raises:
        UserError: a variable is not set, is empty or contains `$` or `~` itself, or a user is not known.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        content = os.environ.get(name, "")
        if not content:
            raise UserError(f"{str(path)!r}: the variable {name} is not set")
        if "$" in content or content.startswith("~"):
            raise UserError(
                f"{str(path)!r}: the variable {name} must hold a plain path, without $ or ~, not {content!r}"
            )
        return content

    filled = os.path.expanduser(_VARIABLE.sub(value, str(path)))
    if filled.startswith("~"):
        raise UserError(f"{str(path)!r}: there is no user {filled[1:].partition('/')[0]!r} whose folder it could be")
    return type(path)(filled)


def decode_text(raw: bytes, where: str) -> str:
    """The text of a file's bytes; `where` names it in the error.

    Raises:
        UserError: the bytes are not UTF-8 (the message names the file's kind, or the first wrong byte), or a Git LFS
            pointer.
    """
    refuse_lfs_pointer(raw, where)
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if kind := kind_of(raw):
            raise UserError(f"{where}: is {kind}") from error
        raise UserError(
            f"{where}: should be UTF-8, but byte {error.start} is 0x{raw[error.start]:02x}: save it as UTF-8"
        ) from error


def refuse_lfs_pointers(path: Path, where: str) -> None:
    """Raise a UserError if a file, or a file in a folder, is a Git LFS pointer.

    To be called where a library fails to load it: each library has its own message for that.
    """
    for file in [path, *sorted(path.glob("*"))]:
        if file.is_file():
            with file.open("rb") as opened:
                refuse_lfs_pointer(opened.read(64), f"{where}: {file}")


def refuse_lfs_pointer(head: bytes, where: str) -> None:
    """Raise a UserError if a file that begins with `head` is what Git leaves in place of a file it has not fetched."""
    if head.startswith(LFS_POINTER):
        raise UserError(f"{where}: is {kind_of(head)}")


def split_lines(text: str) -> list[str]:
    """Lines without their newlines; blank lines at the end are dropped, others kept."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_text(path: Path, where: str = "") -> str:
    """The text of a file; `where`, or the path if that is empty, names it in errors.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    where = where or str(path)
    with name_in_errors(where, "read"):
        return decode_text(path.read_bytes(), where)


def read_lines(path: Path, where: str = "") -> list[str]:
    """The lines of a file (`split_lines`); raises as `read_text`."""
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
    """Make a file's content, or a folder's list of names, durable: the latter where its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a new name beside `path` to write a file under; at the end the file is renamed to `path`, durably.

    After an error the file is removed. A killed process leaves it behind, for `remove_partials`.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync(path.parent)


def atomic_write(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file, in pieces or at once, durably; whatever happens, it is whole or absent."""
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
    """Rename a finished folder to its final name, durably; one that has that name already is replaced."""
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
    """Remove what killed processes left of `atomic_path` in a folder tree, which no other process may be writing to."""
    for path in folder.rglob(".*.partial"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def lock_beside(path: Path) -> Path:
    """The lock file for a file or folder that is written aside and renamed."""
    return path.with_name(f".{path.name}.lock")


class InUseError(UserError):
    """Another process holds a lock."""


class FileLock:
    """A lock on a file, which the system releases when its holder ends, on whichever machine that runs.

    The file names the holder, and is removed with the lock. A context manager.

    Args:
        path: the file; its folder is created if necessary.
        name: of what is locked, for messages.
        note: written after the holder's process and machine.
        patience_s: seconds to wait for another holder to release it.

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
            with suppress(FileExistsError):  # a file is in the way; opening will say that it is no folder
                self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return self.path.open("a+")
            except FileNotFoundError:  # the holder has just removed the folder it had created
                if self.path.is_symlink():
                    raise

    def _try(self) -> bool:
        """Lock the file unless another process has; create it again if its holder has removed it meanwhile."""
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

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock. Folders that were created for it and are empty are removed."""
        self.path.unlink(missing_ok=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # not empty
                break
        self._file.close()
