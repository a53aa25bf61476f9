"""The table of image formats is the decoder's: what it lists is decoded, under every name, and nothing else is."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import data.decode
from data.decode import decode, image_size
from data.errors import BadSample
from data.filters import Filters
from data.listing import FORMATS, IMAGE_EXTENSIONS, UNDECODED_EXTENSIONS, format_of, is_image, why_not_decoded
from t2i.config.data import SourceConfig

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_listed_is_decoded(form: str) -> None:
    content = encoded(form)
    assert format_of(content) is FORMATS[form]
    assert image_size(content) == (24, 40) and decode(content, (24, 40)).shape == (3, 24, 40)
    if form in ("PNG", "BMP", "TIFF"):
        assert (decode(content, (24, 40)) == PIXELS.transpose(2, 0, 1)).all()


def test_stray_bytes_behind_a_jpegs_first_marker_are_none_of_its_format() -> None:
    content = encoded("JPEG")
    odd = content[:2] + b"\0\0" + content[2:]
    assert format_of(odd) is FORMATS["JPEG"]
    assert (decode(odd, (24, 40)) == decode(content, (24, 40))).all()


def test_the_decoder_knows_no_other() -> None:
    assert {"JPEG", *data.decode._PILLOW_FORMATS} == set(FORMATS)
    assert format_of(encoded("ICO")) is format_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic") is format_of(b"") is None
    with pytest.raises(BadSample, match="undecodable_image"):
        decode(encoded("ICO"), 8)


def test_every_extension_counts_everywhere_in_any_case() -> None:
    for extension in ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"):
        assert is_image(f"a.b/c.{extension.upper()}") and extension in IMAGE_EXTENSIONS
    registered = {extension: form for extension, form in Image.registered_extensions().items() if form in FORMATS}
    assert {f".{extension}" for extension in IMAGE_EXTENSIONS} >= registered.keys()
    assert not any(map(is_image, ("jpg", ".jpg", "a.jpg/b", "a.jpg.txt", "a.heic")))
    assert Filters().images == SourceConfig(name="s", url="u").filters.images == IMAGE_EXTENSIONS
    assert IMAGE_EXTENSIONS[:4] == ("jpg", "jpeg", "png", "webp"), "of several the usual one is taken"
    assert why_not_decoded("d/a.HEIC") == "images of a format that is not decoded (.heic)"
    assert not {*IMAGE_EXTENSIONS} & {*UNDECODED_EXTENSIONS} and why_not_decoded("a.txt") is None
