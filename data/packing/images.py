"""What packing does to an image: its bytes pass through, or it is made smaller and encoded as JPEG again."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from data.errors import BadSample
from data.formats import FORMATS, format_of
from data.listing import kind_of
from data.packing.contents import JPEG_QUALITY, check


@dataclass(frozen=True)
class Images:
    """What to do with every image.

    Attributes:
        resize: most pixels of the shorter side; a smaller image stays as it is. None leaves every image its size.
        quality: of the JPEGs, 1 to 100, which every image becomes. None lets what need not be made smaller pass
            through, byte by byte.

    Raises:
        UserError: a number outside its range.
    """

    resize: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.resize is not None:
            check(8 <= self.resize <= 16384, "resize", self.resize, "a number of pixels between 8 and 16384")
        if self.quality is not None:
            check(1 <= self.quality <= 100, "quality", self.quality, "between 1 and 100")

    @property
    def versions(self) -> dict[str, str]:
        """The packages that decide the bytes."""
        if self.resize is None and self.quality is None:
            return {}
        return {name: version(name) for name in ("pillow", "simplejpeg", "torch")}

    def __call__(self, content: bytes) -> tuple[str, bytes]:
        """Return the member's extension, which is that of the content whatever its file was called, and its bytes.

        Raises:
            BadSample: ("other_format") of a format that is not decoded; ("undecodable_image", "too_many_pixels") to be
                encoded again.
        """
        if (format_ := format_of(content)) is None:
            kind = kind_of(content)
            raise BadSample("other_format", kind or f"not {', '.join(it.name for it in FORMATS.values())}")
        if self.resize is None and self.quality is None:
            return format_.extensions[0], content
        # Imported here: only who encodes again needs the decoder, whose torch takes seconds.
        from data.decode import image_size

        height, width = image_size(content)
        scale = min(1.0, (self.resize or min(height, width)) / min(height, width))
        if scale == 1 and self.quality is None:
            return format_.extensions[0], content
        return "jpg", _encode(content, (round(height * scale), round(width * scale)), self.quality or JPEG_QUALITY)


def _encode(content: bytes, size: tuple[int, int], quality: int) -> bytes:
    import simplejpeg

    from data.decode import decode

    # The size has the image's own aspect ratio, so that no more than a rounded pixel is cropped.
    pixels_chw = decode(content, size, small_images="upscale")
    pixels_hwc = pixels_chw.transpose(1, 2, 0).copy()
    return bytes(simplejpeg.encode_jpeg(pixels_hwc, quality, "RGB", "444"))
