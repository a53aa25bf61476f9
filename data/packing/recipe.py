"""What packing does to the rows of any source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data.packing.contents import Contents, Reader, check_heldout
from data.packing.images import Images
from data.packing.rows import parts


@dataclass(frozen=True)
class Recipe:
    """How rows become samples, and which of them are held out.

    Args:
        resize: Most pixels of an image's shorter side: larger ones are made smaller and encoded as JPEG.
        quality: Encode every image as JPEG of this quality. By default what needs no resizing passes byte by byte.
        heldout: Share of the rows that goes into OUT/heldout.
        seed: Decides which rows are held out.

    Raises:
        UserError: a number outside its range.
    """

    resize: int | None = None
    quality: int | None = None
    heldout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_heldout(self.heldout)
        Images(self.resize, self.quality)

    @property
    def images(self) -> Images:
        """What is done to every image."""
        return Images(self.resize, self.quality)

    def contents(
        self,
        name: str,
        rows: int,
        read: Reader,
        *,
        origin: str,
        fingerprint: str,
        arguments: Mapping[str, Any] | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> Contents:
        """Describe a source of so many rows; `read` is given their numbers.

        Args:
            name: the kind of source.
            rows: how many it has.
            read: makes samples of them.
            origin: its address.
            fingerprint: another one, another content.
            arguments: what decides the samples besides the recipe.
            left_out: what there is besides the rows: reason and number.
        """
        return Contents(
            name=name,
            arguments={**(arguments or {}), **asdict(self)},
            splits=dict(parts(rows, self.heldout, self.seed)),
            read=read,
            about={"origin": origin},
            left_out=dict(left_out or {}),
            versions={"contents": fingerprint, **self.images.versions},
        )
