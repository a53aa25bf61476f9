"""Serve a page on which to try a model.

    python launch/serve.py --model runs/demo/sft/model [--host 127.0.0.1] [--port 7860]

It needs the extra `serve` (Gradio). Only this machine reaches the page unless --host says otherwise; there is no
password. Images are removed when the server ends; of uploads, the latest GiB is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import importlib.util
import ipaddress
import os
import signal
from contextlib import closing
from tempfile import TemporaryDirectory

import torch

from data.errors import UserError
from evaluation.sampling_job import fingerprint
from launch.cli import run
from launch.process import gpu_signs, quiet, warn_of_overlooked_gpu
from t2i.config.base import PathText
from t2i.config.run import RunConfig
from t2i.model_folder import WhichWeights
from t2i.pipeline import Pipeline
from t2i.serving.limits import FileCache
from t2i.serving.worker import Worker
from t2i.size_limits import USABLE, find_limits, free_bytes

MOST_UPLOADS, MOST_UPLOAD_BYTES = 1000, 2**30
"""Uploaded files and their bytes that are kept, over all visitors: the latest."""
NO_PASSWORD = """
WARNING: --host {host}: whoever reaches port {port} of this machine can draw and edit here. There is no password, and
WARNING: nothing is encrypted. To be the only one, leave --host out and come through ssh -L {port}:127.0.0.1:{port}.
"""


def serve(
    model: PathText,
    which: WhichWeights = "ema",
    text_model: PathText | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    queue: int = 8,
    max_pixels: int | None = None,
) -> None:
    """Serve a page on which to try a model.

    Args:
        model: Folder of a trained model.
        which: Which of its weights draw.
        text_model: Where its text encoder is now: a folder or hub name.
        host: Address to bind to; any but a loopback address lets the network in, without a password.
        port: Port to listen on.
        queue: Requests that may wait; more are refused.
        max_pixels: Largest height times width of an image; by default what the memory allows.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("launch/serve.py needs Gradio: pip install '.[serve]'")
    if queue < 1:
        raise UserError(f"--queue {queue}: at least one request has to have a place")
    if max_pixels is not None and max_pixels < 1:
        raise UserError(f"--max_pixels {max_pixels}: must be at least 1")
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 1 to 65535")
    quiet(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        warn_of_overlooked_gpu(gpu_signs())
    pipeline = Pipeline.load(Path(model), which, device, text_model)
    limits = find_limits(pipeline, int(USABLE * free_bytes(device)), max_pixels)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as when interrupted: images are removed
    with TemporaryDirectory(prefix="t2i-serve-") as folder:
        # Gradio reads them when it is imported.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=f"{folder}/gradio")
        from t2i.serving.page import build_page
        from t2i.serving.page import serve as serve_page

        root = Path(folder).resolve()
        uploads = FileCache(root / "uploads", MOST_UPLOADS, MOST_UPLOAD_BYTES)
        settings = {"model": pipeline.config.name, "which": which, **fingerprint(pipeline, Path(model), which)}
        with closing(Worker(pipeline, settings, limits, root / "pictures")) as worker:
            page = build_page(worker, uploads, pipeline.config.name, _facts(pipeline.config, which))
            if not _is_loopback(host):
                print(NO_PASSWORD.format(host=host, port=port), file=sys.stderr)
            serve_page(page, uploads, worker.images, host, port, queue)


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; of names, only "localhost" counts."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _facts(config: RunConfig, which: str) -> str:
    height, width = config.data.size
    of = "captions" if config.model.condition == "text" else f"{config.model.classes} classes"
    return f"{config.model.family}, drawing {of} · trained at {width} × {height} · {which} weights"


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run((serve,), args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
