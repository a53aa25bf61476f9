"""The model behind the page: it draws what was asked for, shows it forming, and stops when told to.

- Pictures are drawn one by one, each in a batch of its own: picture n is the same however many are asked for, and each
  is shown when it is done.
- The model is used by one thread, the studio's own: one who stops a request does not wait for it, the next one does.
- A picture is a PNG that says in its text, under "settings", what it was drawn with.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import mkdtemp
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
from t2i.pipeline import Picture, Pipeline, Watch
from t2i.serving.limits import Limits
from t2i.serving.session import Form, Request, check_form

Pixels = NDArray[np.uint8]

PREVIEW_EVERY_S = 0.25
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
    request: Request | None
    """What asks for it again; None: it was not drawn but edited."""


@dataclass(frozen=True)
class Frame:
    """How far a request is."""

    share: float
    """Of the calls of the network."""
    preview: Pixels | None
    """The picture (H, W, 3) that is forming, as the latest call predicts it; None: no news of it."""
    drawn: tuple[Drawn, ...]
    """Pictures that are done."""


class Studio:
    """A model with all that its page needs.

    Args:
        pipeline: the model.
        made_of: which model and weights, for the pictures' texts.
        limits: sizes that may be asked for.
        folder: where pictures are written.
    """

    def __init__(self, pipeline: Pipeline, made_of: dict[str, Any], limits: Limits, folder: Path) -> None:
        self.pipeline, self.limits = pipeline, limits
        self._made_of, self._folder = made_of, folder
        self._device = ThreadPoolExecutor(1, "studio")

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

        def work(watch: Watch, done: Callable[[Drawn], None]) -> None:
            folder = Path(mkdtemp(dir=self._folder))
            images = self.pipeline.draw_batches(wanted, request.sampling, request.size, watch)
            for number, batch in enumerate(images):
                settings = self._made_of | request.settings | {"number": number}
                path = folder / f"{request.stem}_{number}.png"
                write_picture(path, batch[0], settings)
                done(Drawn(path, settings, request))

        return self._follow(work, request.calls)

    def _follow(self, work: Callable[[Watch, Callable[[Drawn], None]], None], calls: int) -> Iterator[Frame]:
        """Have the studio's thread do some work, and yield how far it is, at least every BEAT_S seconds.

        Args:
            work: is given the watch of its calls of the network, and whom to tell of a picture that is done.
            calls: how often it calls the network.
        """
        frames: SimpleQueue[Frame | None] = SimpleQueue()  # None: there are no more
        stop = Event()
        called, shown, drawn = 0, -PREVIEW_EVERY_S, tuple[Drawn, ...]()

        def watch(images: Tensor, t: float) -> None:
            nonlocal called, shown
            if stop.is_set():
                raise _Stopped
            called += 1
            if time.monotonic() - shown >= PREVIEW_EVERY_S:
                frames.put(Frame(called / calls, to_array(to_pixels(images[0]).cpu()), drawn))
                shown = time.monotonic()

        def done(picture: Drawn) -> None:
            nonlocal drawn
            drawn = (*drawn, picture)
            frames.put(Frame(called / calls, None, drawn))

        def run() -> None:
            try:
                if not stop.is_set():
                    work(watch, done)
            finally:
                frames.put(None)

        future = self._device.submit(run)
        latest: Frame | None = Frame(0.0, None, ())
        try:
            while latest is not None:
                yield latest
                try:
                    latest = frames.get(timeout=BEAT_S)
                except Empty:
                    pass  # the same once more: whoever listens may want to leave
            future.result()
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise UserError("the device's memory was not enough for this size: ask for a smaller one") from error
        finally:
            stop.set()


def to_array(image: Tensor) -> Pixels:
    """A picture, uint8 (3, H, W) on the host, as (H, W, 3)."""
    return image.permute(1, 2, 0).contiguous().numpy()


def write_picture(path: Path, image: Tensor, settings: dict[str, Any]) -> None:
    """Write a picture, uint8 (3, H, W), as a PNG with `settings` in its text."""
    text = PngInfo()
    text.add_text("settings", json.dumps(settings))
    Image.fromarray(to_array(image)).save(path, pnginfo=text)
