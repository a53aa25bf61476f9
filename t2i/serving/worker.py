"""The model behind the page: it draws what was asked for, shows it forming, and stops when told to.

- Pictures are drawn one by one, each in a batch of its own: picture n is the same however many are asked for, and each
  is shown when it is done.
- The model is used by one thread, the studio's own: one who stops a request does not wait for it, the next one does.
- A picture is a PNG that says in its text, under "settings", what it was drawn with. The latest are kept.
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
KEPT = 60
"""Pictures that a history shows, and whose files there are: the latest."""
MOST_KEPT_BYTES = 2**32
BEAT_S = 1.0
"""Whoever waits hears from the studio this often."""


class _Stopped(Exception):
    """Leaves the solver."""


@dataclass(frozen=True)
class Drawn:
    """A picture that is done."""

    path: Path
    """Its PNG."""
    settings: dict[str, Any]
    """What it was drawn with, in JSON's types."""
    request: Request | EditRequest
    """What asks for it again."""


@dataclass(frozen=True)
class Frame:
    """How far a request is."""

    share: float
    """Of the calls of the network."""
    preview: Pixels | None
    """The picture (H, W, 3) that is forming, as the latest call predicts it; None: no news of it."""
    drawn: tuple[Drawn, ...]
    """Pictures that are done."""
    cut: tuple[str, ...] = ()
    """The fields whose words are longer than what the model reads of them."""


class Worker:
    """A model with all that its page needs.

    Args:
        pipeline: the model.
        fingerprint: which model and weights, for the pictures' texts.
        limits: sizes that may be asked for.
        folder: where pictures are written, and nothing else is.
    """

    def __init__(self, pipeline: Pipeline, fingerprint: dict[str, Any], limits: Limits, folder: Path) -> None:
        self.pipeline, self.limits, self.folder = pipeline, limits, folder
        self._made_of = fingerprint
        self.pictures = FileCache(folder, KEPT, MOST_KEPT_BYTES)
        self._device = ThreadPoolExecutor(1, "studio")
        self._closing = Event()

    def close(self) -> None:
        """Stop what is being made at its next call of the network, and wait for that; then no more is made."""
        self._closing.set()
        self._device.shutdown()

    def check(self, form: Form) -> Request:
        """What a form asks for.

        Raises:
            UserError: a field that is wrong, in one sentence.
        """
        return check_form(form, self.pipeline.config, self.pipeline.conditioner, self.limits)

    def draw(self, request: Request) -> Iterator[Frame]:
        """Draw what was asked for; the last frame has all pictures. Closing the iterator stops it at the next call of
        the network.

        Raises:
            UserError: the memory was not enough after all.
        """
        wanted = [Picture(request.prompt, number, request.negative) for number in range(request.pictures)]

        def images(preview: Preview) -> Iterator[Tensor]:
            for batch in self.pipeline.draw_batches(wanted, request.sampling, request.size, preview):
                yield batch[0]

        return self._follow(request, images)

    def check_edit(self, form: EditForm) -> EditRequest:
        """What a form asks for.

        Raises:
            UserError: a field that is wrong, in one sentence.
        """
        return check_edit(form, self.pipeline.config, self.limits)

    def edit(self, request: EditRequest) -> Iterator[Frame]:
        """The same of an edit, which makes one picture."""

        def images(preview: Preview) -> Iterator[Tensor]:
            yield edit_image(self.pipeline, request.image, request.source, request.target, request.edits, preview)

        return self._follow(request, images)

    def _follow(self, request: Request | EditRequest, images: Callable[[Preview], Iterator[Tensor]]) -> Iterator[Frame]:
        """Have the studio's thread make pictures, and yield how far it is, at least every BEAT_S seconds.

        Args:
            request: what is asked for.
            images: makes its pictures, uint8 (3, H, W); the preview is shown every call of the network.
        """
        latest = Frame(0.0, None, ())  # those that nobody saw in time are not missed
        news, stop = Event(), Event()

        def is_over() -> bool:
            return stop.is_set() or self._closing.is_set()

        called, shown, drawn, cut = 0, -PREVIEW_EVERY_S, tuple[Drawn, ...](), tuple[str, ...]()

        def preview(predicted: Tensor, t: float) -> None:
            nonlocal called, shown, latest
            if is_over():
                raise _Stopped
            called += 1
            if time.monotonic() - shown >= PREVIEW_EVERY_S:
                latest = Frame(called / request.calls, to_array(to_pixels(predicted[0]).cpu()), drawn, cut)
                news.set()
                shown = time.monotonic()

        def make() -> None:
            nonlocal drawn, latest, cut
            if is_over():
                return
            conditioner = self.pipeline.conditioner
            cut = tuple(it.field for it in request.words if conditioner.cut([it.text], it.plain))
            for number, image in enumerate(images(preview)):
                settings = self._made_of | request.settings | {"number": number}
                path = self.pictures.add(f"{request.stem}_{number}.png", to_png(image, settings))
                drawn = (*drawn, Drawn(path, settings, request))
                latest = Frame(called / request.calls, None, drawn, cut)
                news.set()

        future = self._device.submit(make)
        future.add_done_callback(lambda _: news.set())
        try:
            ended = False
            while not ended:
                told = latest
                yield told
                news.wait(BEAT_S)  # then the same once more: whoever listens may want to leave
                news.clear()
                ended = future.done()
            if latest is not told:  # told twice at once, a page may show neither
                yield latest
            future.result()
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise UserError("the device's memory was not enough for this size: ask for a smaller one") from error
        finally:
            stop.set()


def to_array(image: Tensor) -> Pixels:
    """A picture, uint8 (3, H, W) on the host, as (H, W, 3)."""
    return image.permute(1, 2, 0).contiguous().numpy()


def to_png(image: Tensor, settings: dict[str, Any]) -> bytes:
    """A picture, uint8 (3, H, W), as a PNG with `settings` in its text."""
    text, file = PngInfo(), io.BytesIO()
    text.add_text("settings", json.dumps(settings))
    Image.fromarray(to_array(image)).save(file, "png", pnginfo=text)
    return file.getvalue()
