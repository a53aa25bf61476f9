"""Files that the page keeps for its visitors: the latest, in bounded number and size, each at an address that nobody
can guess.

An address is `/FOLDER/TOKEN/NAME`. It says nothing of where the file lies, and is looked up in a table: no name that a
visitor sends ever reaches the file system.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from threading import Lock

from data.formats import FORMATS

TYPES = {f".{ext}": f"image/{name.lower()}" for name, it in FORMATS.items() for ext in it.extensions}
"""Of the images that are decoded, by their files' suffixes."""


class KeptFiles:
    """The latest files of one kind.

    Args:
        folder: where they lie, and nothing else does; made if need be.
        most_files: kept at most; then the oldest go.
        most_bytes: the same of their sizes in all.
    """

    def __init__(self, folder: Path, most_files: int, most_bytes: int) -> None:
        self.folder, self.most_files, self.most_bytes = folder, most_files, most_bytes
        folder.mkdir(exist_ok=True)
        self._kept: dict[str, Path] = {}  # by address, the oldest first
        self._sizes: dict[str, int] = {}
        self._lock = Lock()

    def add(self, name: str, content: bytes) -> Path:
        """Keep a file under a name of plain letters; where it is.

        Raises:
            OSError: it cannot be written.
        """
        assert re.fullmatch(r"[\w-]+\.\w+", name)
        with self._lock:
            place = self.folder / secrets.token_hex(16)
            place.mkdir()
            try:
                (place / name).write_bytes(content)
            except OSError:
                shutil.rmtree(place)
                raise
            address = f"/{self.folder.name}/{place.name}/{name}"
            self._kept[address], self._sizes[address] = place / name, len(content)
            while len(self._kept) > self.most_files or sum(self._sizes.values()) > self.most_bytes:
                oldest = next(iter(self._kept))
                del self._sizes[oldest]
                shutil.rmtree(self._kept.pop(oldest).parent)
            return place / name

    def find(self, address: object) -> Path | None:
        """The file at an address; None: none is, or no longer."""
        with self._lock:
            return self._kept.get(address) if isinstance(address, str) else None

    def read(self, path: str | Path | None) -> bytes | None:
        """What a kept file holds; None of any other path, and of what is no regular file any more."""
        with self._lock:
            known = next((it for it in self._kept.values() if str(it) == str(path)), None)
        if known is None:
            return None
        try:
            descriptor = os.open(known, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # it has gone meanwhile, or is a link
            return None
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_size > self.most_bytes:
            os.close(descriptor)
            return None
        with open(descriptor, "rb") as file:
            return file.read(self.most_bytes)
