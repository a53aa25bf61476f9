"""The page, in Gradio: fields on the left, progress and images on the right, and a history to compare.

- A request that is refused is answered by the sentence of the check that refused it.
- Requests wait in one queue for the one model; events that only fill in fields do not wait.
- Everything that clients send passes t2i/serving/limits.py first.
- Nothing is loaded from or reported to anywhere else: no analytics, no fonts, no share link.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, get_args

import gradio as gr
from starlette.middleware import Middleware

from data.errors import UserError
from t2i.config.train import SamplingConfig
from t2i.pipeline import edit_settings
from t2i.serving import html
from t2i.serving.html import QUICK, History, RequestTab, history_tab, thumbnails
from t2i.serving.limits import MOST_UPLOAD, FileCache, RequestFilter
from t2i.serving.requests import EditForm, Form, Request, first_request, sizes_like
from t2i.serving.worker import MOST_IMAGES, Frame, Worker

SOLVERS = get_args(SamplingConfig.model_fields["solver"].annotation)


def build_page(worker: Worker, uploads: FileCache, name: str, facts: str) -> gr.Blocks:
    """The page of a model, with `name` as its title and `facts` below it."""
    small = min(worker.pipeline.config.data.size) < html.SMALL
    gr.set_static_paths([worker.folder, uploads.folder])  # else Gradio would copy the files
    with gr.Blocks(title=name, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(html.head(name, facts))
        history = gr.State([])
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                draw = _draw_tab(worker, small)
            edit = None
            if worker.pipeline.config.model.condition == "text":
                with gr.Tab("Edit", id="edit"):
                    edit = _edit_tab(worker, uploads, small)
            with gr.Tab("History", id="history"):
                gallery = history_tab(history, tabs, draw, edit, uploads, small)
        _connect(draw, worker.check, worker.generate, Form, history, gallery)
        if edit is not None:
            _connect(edit, worker.check_edit, worker.edit, EditForm, history, gallery)
    return page


def _draw_tab(worker: Worker, small: bool) -> RequestTab:
    config, limits = worker.pipeline.config, worker.limits
    classes, first = config.model.condition == "class", first_request(config).form
    sizes = [f"{width} × {height}" for height, width in sizes_like(config.data.size, limits)]
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            if classes:
                last = config.model.classes - 1
                prompt = gr.Textbox(label=f"Class, a number from 0 to {last}", lines=1, elem_id="prompt")
                negative = gr.Textbox(label="Class that guidance leads away from, or nothing", lines=1)
            else:
                prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt")
                negative = gr.Textbox(label="Negative prompt: what guidance leads away from, or nothing", lines=1)
            button, stop = _buttons("Draw")
            with gr.Row():
                size = gr.Dropdown(sizes, value=sizes[0], label="Size", scale=2, min_width=150)
                width = gr.Number(first.width, label="Width", min_width=80, elem_id="width")
                height = gr.Number(first.height, label="Height", min_width=80, elem_id="height")
            with gr.Row():
                pictures = gr.Number(first.pictures, label="Pictures", min_width=80, elem_id="pictures")
                steps = gr.Number(first.steps, label="Steps", min_width=80, elem_id="steps")
                guidance = gr.Number(first.guidance_scale, label="Guidance", step=0.1, min_width=80)
            seed = _seed(first.seed, "seed")
            with gr.Accordion("Solver and guidance interval", open=False):
                with gr.Row():
                    solver = gr.Dropdown(list(SOLVERS), value=first.solver, label="Solver", min_width=120)
                    adams = first.solver == "adams"
                    order = gr.Number(first.order, label="Order", visible=adams, min_width=80)
                with gr.Row():
                    low = gr.Number(first.guided_from, label="Guidance from t", step=0.05, min_width=120)
                    high = gr.Number(first.guided_to, label="Guidance to t", step=0.05, min_width=120)
        progress, gallery = _results("Describe a picture and press Draw." if not classes else "Name a class.", small)
    size.input(lambda text: [int(side) for side in text.split(" × ")], size, [width, height], **QUICK)
    solver.change(lambda name: gr.update(visible=name == "adams"), solver, order, **QUICK)
    parts = [prompt, negative, width, height, steps, guidance, low, high, solver, order, seed, pictures]
    return RequestTab(parts, button, stop, progress, gallery)


def _edit_tab(worker: Worker, uploads: FileCache, small: bool) -> RequestTab:
    config = worker.pipeline.config
    height, width = config.data.size
    first = edit_settings(config, {}, "page")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            image: Any = gr.Image(
                format="png", sources=["upload", "clipboard"], height=240, elem_id="image",
                label=f"Image; a larger one is scaled down to about {width} × {height} pixels",
            )  # fmt: skip
            # Gradio's own would open and decode whatever file the request names.
            image.preprocess = lambda upload: None if upload is None else uploads.read(upload.path)
            source = gr.Textbox(label="What it shows", lines=2, elem_id="source")
            target = gr.Textbox(label="What it is to show", lines=2, elem_id="target")
            button, stop = _buttons("Edit")
            with gr.Row():
                steps = gr.Number(first.steps, label="Steps", min_width=120)
                taken = gr.Number(first.n_max, label="Steps taken: more go farther", min_width=120)
            with gr.Row():
                of_source = gr.Number(first.source_guidance, label="Guidance of what it shows", step=0.5, min_width=120)
                of_target = gr.Number(
                    first.target_guidance, label="Guidance of what it is to show", step=0.5, min_width=120
                )
            seed = _seed(first.seed, "edit-seed")
        progress, gallery = _results("Bring an image, and say what it shows and what it is to show.", small)
    parts = [image, source, target, steps, taken, of_source, of_target, seed]
    return RequestTab(parts, button, stop, progress, gallery)


def _buttons(name: str) -> tuple[Any, Any]:
    with gr.Row():
        button = gr.Button(name, variant="primary", elem_id=name.lower(), min_width=120)
        stop = gr.Button("Stop", elem_id=f"stop-{name.lower()}", min_width=80)
    return button, stop


def _seed(value: float | None, elem_id: str) -> Any:
    with gr.Row():
        seed = gr.Number(value, label="Seed", scale=2, min_width=150, elem_id=elem_id)
        button = gr.Button("New seed", min_width=100, elem_classes="inline")
    button.click(lambda: secrets.randbelow(2**31), None, seed, **QUICK)
    return seed


def _results(instruction: str, small: bool) -> tuple[Any, Any]:
    with gr.Column(scale=7, min_width=320):
        progress = gr.HTML(html.hint(instruction), elem_classes="status")
        gallery = gr.Gallery(
            show_label=False, columns=2, height="auto", object_fit="contain", visible=False, interactive=False,
            buttons=["download", "fullscreen"], elem_classes=["pictures", *(["small"] if small else [])],
        )  # fmt: skip
    return progress, gallery


def _connect(
    tab: RequestTab,
    check: Callable[[Any], Any],
    make: Callable[[Any], Iterator[Frame]],
    form: type[Form] | type[EditForm],
    history: Any,
    gallery: Any,
) -> None:
    """Connect a tab's buttons: one makes the images that its fields ask for, the other stops."""

    def submit(earlier: History, *values: Any) -> Iterator[list[Any]]:
        with _as_notice():
            request = check(form(*values))
            count = request.pictures if isinstance(request, Request) else 1
            began, done = time.monotonic(), -1
            for frame in make(request):
                progress = html.progress(frame, count, time.monotonic() - began)
                if len(frame.generated) == done:
                    yield [progress, gr.skip(), gr.skip(), gr.skip()]
                    continue
                done = len(frame.generated)
                kept = (image for image in earlier if image.path.exists())
                images = [*reversed(frame.generated), *kept][:MOST_IMAGES]
                shown = gr.update(value=[str(image.path) for image in frame.generated], visible=done > 0)
                yield [progress, shown, images, thumbnails(images)]

    event = gr.on(
        [tab.button.click, *(field.submit for field in tab.fields if isinstance(field, gr.Textbox))],
        submit, [history, *tab.fields], [tab.progress, tab.gallery, history, gallery],
        concurrency_limit=1, concurrency_id="model", show_progress="minimal", show_progress_on=tab.progress,
        api_visibility="private",
    )  # fmt: skip
    # Shown when it has stopped: until then a click on the first button does nothing.
    tab.stop.click(None, cancels=[event]).then(lambda: html.hint("Stopped."), None, tab.progress, **QUICK)


@contextmanager
def _as_notice() -> Iterator[None]:
    """Show a user's mistake as a notice on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None


def _theme() -> gr.themes.Base:
    """Only fonts of the system: others would be loaded from elsewhere."""
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=["Arial", "sans-serif"], font_mono=["Consolas", "monospace"]
    )


def serve(page: gr.Blocks, uploads: FileCache, images: FileCache, host: str, port: int, queue: int) -> None:
    """Serve a page until interrupted; `uploads` and `images` are in one folder, and `queue` requests may wait.

    Raises:
        UserError: the port cannot be listened on.
    """
    page.queue(max_size=queue, api_open=False)
    middleware = Middleware(RequestFilter, folder=uploads.folder.parent, uploads=uploads, images=images)
    try:
        page.launch(
            server_name=host, server_port=port, share=False, show_error=False, quiet=True, ssr_mode=False, pwa=False,
            mcp_server=False, run_history=False, enable_monitoring=False, footer_links=[],
            max_file_size=MOST_UPLOAD, app_kwargs={"middleware": [middleware]}, prevent_thread_lock=True,
            css=html.CSS, theme=_theme(),
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {port}: cannot be listened on at --host {host}: give others") from error
    print(f"serving on {page.local_url} until interrupted", flush=True)
    page.block_thread()
