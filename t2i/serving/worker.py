"""The model behind the page: it generates or edits, shows the image as it forms, and stops on request.

- Images are generated one by one, each in a batch of its own: image n is the same however many are asked for, and is
  shown when it is done.
- One thread uses the model. Whoever stops a request does not wait for it; the next request does.
- An image is a PNG file whose text chunk "settings" holds the request as JSON. The latest files are kept.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from data.errors import UserError
from t2i.diffusion.flow import to_pixels
from t2i.pipeline import Picture, Pipeline, Preview, edit_image
from t2i.serving.limits import FileCache
from t2i.serving.requests import EditForm, EditRequest, Form, Request, check_edit, check_form
from t2i.size_limits import Limits

Pixels = NDArray[np.uint8]

PREVIEW_EVERY_S = 0.25
MOST_IMAGES = 60
"""Images that are kept, and that a history shows: the latest."""
MOST_IMAGE_BYTES = 2**32
HEARTBEAT_S = 1.0
"""A waiting listener gets a frame at least this often."""


class _Stopped(Exception):
    """Raised in the solver to stop it."""


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image."""

    path: Path
    """Its PNG file."""
    settings: dict[str, Any]
    """What it was generated with, in JSON's types."""
    request: Request | EditRequest


@dataclass(frozen=True)
class Frame:
    """The progress of a request."""

    progress: float
    """Share of the network's calls that are done."""
    preview: Pixels | None
    """The image (H, W, 3) that is forming, as the latest call predicts it, if that is new."""
    generated: tuple[GeneratedImage, ...]
    warnings: tuple[str, ...] = ()
    """One sentence for each text that is longer than the model reads."""


class Worker:
    """Serves requests with a model; images are written to `folder`, which holds nothing else.

    `fingerprint` says which model and weights these are, for the images' settings.
    """

    def __init__(self, pipeline: Pipeline, fingerprint: dict[str, Any], limits: Limits, folder: Path) -> None:
        self.pipeline, self.limits, self.folder = pipeline, limits, folder
        self._fingerprint = fingerprint
        self.images = FileCache(folder, MOST_IMAGES, MOST_IMAGE_BYTES)
        self._thread = ThreadPoolExecutor(1, "worker")
        self._closing = Event()

    def close(self) -> None:
        """Stop the current request at its next call of the network, wait for that, and accept no more."""
        self._closing.set()
        self._thread.shutdown()

    def check(self, form: Form) -> Request:
        """As `check_form`."""
        return check_form(form, self.pipeline.config, self.pipeline.conditioner, self.limits)

    def check_edit(self, form: EditForm) -> EditRequest:
        """As `requests.check_edit`."""
        return check_edit(form, self.pipeline.config, self.limits)

    def generate(self, request: Request) -> Iterator[Frame]:
        """Generate images; the last frame has all of them. Closing the iterator stops at the network's next call.

        Raises:
            UserError: the device ran out of memory.
        """
        wanted = [Picture(request.prompt, number, request.negative) for number in range(request.pictures)]

        def images(preview: Preview) -> Iterator[Tensor]:
            for batch in self.pipeline.draw_batches(wanted, request.sampling, request.size, preview):
                yield batch[0]

        return self._follow(request, images)

    def edit(self, request: EditRequest) -> Iterator[Frame]:
        """As `generate`, for an edit, which makes one image."""

        def images(preview: Preview) -> Iterator[Tensor]:
            yield edit_image(self.pipeline, request.image, request.source, request.target, request.edits, preview)

        return self._follow(request, images)

    def _follow(self, request: Request | EditRequest, images: Callable[[Preview], Iterator[Tensor]]) -> Iterator[Frame]:
        """Make images (uint8 (3, H, W)) in the worker's thread, and yield frames, at least every HEARTBEAT_S seconds.

        `images` calls its preview at every call of the network.
        """
        latest = Frame(0.0, None, ())  # the listener may miss frames, but never the last one
        changed, stop = Event(), Event()
        calls, previewed_at = 0, -PREVIEW_EVERY_S
        generated, warnings = tuple[GeneratedImage, ...](), tuple[str, ...]()

        def is_over() -> bool:
            return stop.is_set() or self._closing.is_set()

        def preview(predicted: Tensor, t: float) -> None:
            nonlocal calls, previewed_at, latest
            if is_over():
                raise _Stopped
            calls += 1
            if time.monotonic() - previewed_at >= PREVIEW_EVERY_S:
                pixels = to_array(to_pixels(predicted[0]).cpu())
                latest = Frame(calls / request.calls, pixels, generated, warnings)
                changed.set()
                previewed_at = time.monotonic()

        def make() -> None:
            nonlocal generated, latest, warnings
            if is_over():
                return
            warnings = self._warnings(request)
            for number, image in enumerate(images(preview)):
                settings = self._fingerprint | request.settings | {"number": number}
                path = self.images.add(f"{request.stem}_{number}.png", to_png(image, settings))
                generated = (*generated, GeneratedImage(path, settings, request))
                latest = Frame(calls / request.calls, None, generated, warnings)
                changed.set()

        future = self._thread.submit(make)
        future.add_done_callback(lambda _: changed.set())
        try:
            ended = False
            while not ended:
                sent = latest
                yield sent
                changed.wait(HEARTBEAT_S)  # then the same frame again: the listener may want to leave
                changed.clear()
                ended = future.done()
            if latest is not sent:  # a page may show neither of two equal frames that follow at once
                yield latest
            future.result()
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise UserError("the device's memory was not enough for this size: ask for a smaller one") from error
        finally:
            stop.set()

    def _warnings(self, request: Request | EditRequest) -> tuple[str, ...]:
        is_cut, length = self.pipeline.conditioner.cut, self.pipeline.config.text.length
        return tuple(
            f"{field}: is longer than text.length {length} tokens and is cut"
            for field, text, plain in request.texts
            if is_cut([text], plain)
        )


def to_array(image: Tensor) -> Pixels:
    """An image, uint8 (3, H, W) on the host, as (H, W, 3)."""
    return image.permute(1, 2, 0).contiguous().numpy()


def to_png(image: Tensor, settings: dict[str, Any]) -> bytes:
    """An image, uint8 (3, H, W), as a PNG file with `settings` in its text."""
    text, file = PngInfo(), io.BytesIO()
    text.add_text("settings", json.dumps(settings))
    Image.fromarray(to_array(image)).save(file, "png", pnginfo=text)
    return file.getvalue()
