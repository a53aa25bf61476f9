"""The page, in Gradio: what may be asked on the left, what comes of it on the right, and a history to compare.

- What is wrong with a request is said in the words of the check that refused it.
- Requests wait in one queue for the one model; what only fills in fields does not.
- What comes from outside passes t2i/serving/limits.py first.
- Nothing is loaded from anywhere else, and nothing is told to anyone: no analytics, no fonts, no share link.
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
from t2i.serving.html import AskTab, History, history_tab, thumbnails
from t2i.serving.limits import MOST_UPLOAD, Gate, FileCache
from t2i.serving.requests import EditForm, Form, Request, first_request, sizes_like
from t2i.serving.worker import KEPT, Frame, Worker

SOLVERS = get_args(SamplingConfig.model_fields["solver"].annotation)


def build_page(studio: Worker, uploads: FileCache, name: str, facts: str) -> gr.Blocks:
    """The page of a model.

    Args:
        studio: the model.
        uploads: what visitors bring.
        name: its title.
        facts: a line about it.
    """
    small = min(studio.pipeline.config.data.size) < html.SMALL
    gr.set_static_paths([studio.folder, uploads.folder])  # taken as they are: of others Gradio makes copies
    with gr.Blocks(title=name, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(html.head(name, facts))
        history = gr.State([])
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                draws = _draw_tab(studio, small)
            edits = None
            if studio.pipeline.config.model.condition == "text":
                with gr.Tab("Edit", id="edit"):
                    edits = _edit_tab(studio, uploads, small)
            with gr.Tab("History", id="history"):
                shown = history_tab(history, tabs, draws, edits, uploads, small)
        length = studio.pipeline.config.text.length
        _connect(draws, studio.check, studio.draw, Form, history, shown, length)
        if edits is not None:
            _connect(edits, studio.check_edit, studio.edit, EditForm, history, shown, length)
    return page


def _draw_tab(studio: Worker, small: bool) -> AskTab:
    config, limits = studio.pipeline.config, studio.limits
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
            seed, new_seed = _seed(first.seed, "seed")
            with gr.Accordion("Solver and guidance interval", open=False):
                with gr.Row():
                    solver = gr.Dropdown(list(SOLVERS), value=first.solver, label="Solver", min_width=120)
                    adams = first.solver == "adams"
                    order = gr.Number(first.order, label="Order", visible=adams, min_width=80)
                with gr.Row():
                    low = gr.Number(first.guided_from, label="Guidance from t", step=0.05, min_width=120)
                    high = gr.Number(first.guided_to, label="Guidance to t", step=0.05, min_width=120)
        progress, gallery = _results("Describe a picture and press Draw." if not classes else "Name a class.", small)
    size.input(_sides, size, [width, height], queue=False, show_progress="hidden", api_visibility="private")
    solver.change(
        lambda name: gr.update(visible=name == "adams"),
        solver, order, queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    _on_new_seed(new_seed, seed)
    parts = [prompt, negative, width, height, steps, guidance, low, high, solver, order, seed, pictures]
    return AskTab(parts, button, stop, progress, gallery)


def _edit_tab(studio: Worker, uploads: FileCache, small: bool) -> AskTab:
    config = studio.pipeline.config
    height, width = config.data.size
    first = edit_settings(config, {}, "page")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            image: Any = gr.Image(
                format="png", sources=["upload", "clipboard"], height=240, elem_id="image",
                label=f"Image; a larger one is scaled down to about {width} × {height} pixels",
            )  # fmt: skip
            # Its own opens whatever file it is told of, and decodes it.
            image.preprocess = lambda brought: None if brought is None else uploads.read(brought.path)
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
            seed, new_seed = _seed(first.seed, "edit-seed")
        progress, gallery = _results("Bring an image, and say what it shows and what it is to show.", small)
    _on_new_seed(new_seed, seed)
    parts = [image, source, target, steps, taken, of_source, of_target, seed]
    return AskTab(parts, button, stop, progress, gallery)


def _buttons(name: str) -> tuple[Any, Any]:
    with gr.Row():
        button = gr.Button(name, variant="primary", elem_id=name.lower(), min_width=120)
        stop = gr.Button("Stop", elem_id=f"stop-{name.lower()}", min_width=80)
    return button, stop


def _seed(value: float | None, name: str) -> tuple[Any, Any]:
    with gr.Row():
        seed = gr.Number(value, label="Seed", scale=2, min_width=150, elem_id=name)
        button = gr.Button("New seed", min_width=100, elem_classes="beside")
    return seed, button


def _on_new_seed(button: Any, seed: Any) -> None:
    button.click(
        lambda: secrets.randbelow(2**31),
        None, seed, queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip


def _results(words: str, small: bool) -> tuple[Any, Any]:
    with gr.Column(scale=7, min_width=320):
        progress = gr.HTML(html.hint(words), elem_classes="told")
        gallery = gr.Gallery(
            show_label=False, columns=2, height="auto", object_fit="contain", visible=False, interactive=False,
            buttons=["download", "fullscreen"], elem_classes=["pictures", *(["small"] if small else [])],
        )  # fmt: skip
    return progress, gallery


def _sides(size: str) -> list[int]:
    return [int(side) for side in size.split(" × ")]


def _connect(
    tab: AskTab,
    check: Callable[[Any], Any],
    draw: Callable[[Any], Iterator[Frame]],
    form: type[Form] | type[EditForm],
    history: Any,
    shown: Any,
    length: int,
) -> None:
    """Have a tab's button ask for pictures, and its other one stop them; of words the model reads `length` tokens."""

    def ask(drawn_before: History, *values: Any) -> Iterator[list[Any]]:
        with _in_words():
            request = check(form(*values))
            count = request.pictures if isinstance(request, Request) else 1
            began, done = time.monotonic(), -1
            for frame in draw(request):
                told = html.progress(frame, count, time.monotonic() - began, length)
                if len(frame.drawn) == done:
                    yield [told, gr.skip(), gr.skip(), gr.skip()]
                    continue
                done = len(frame.drawn)
                kept = (it for it in drawn_before if it.path.exists())
                known = [*reversed(frame.drawn), *kept][:KEPT]
                gallery = gr.update(value=[str(it.path) for it in frame.drawn], visible=done > 0)
                yield [told, gallery, known, thumbnails(known)]

    asked = gr.on(
        [tab.button.click, *(it.submit for it in tab.fields if isinstance(it, gr.Textbox))],
        ask, [history, *tab.fields], [tab.progress, tab.gallery, history, shown],
        concurrency_limit=1, concurrency_id="model", show_progress="minimal", show_progress_on=tab.progress,
        api_visibility="private",
    )  # fmt: skip
    # Said when it has stopped: a click on the first button does nothing before.
    tab.stop.click(None, cancels=[asked]).then(
        lambda: html.hint("Stopped."), None, tab.progress,
        queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip


@contextmanager
def _in_words() -> Iterator[None]:
    """What a user did wrong, as a notice on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None


def _theme() -> gr.themes.Base:
    """Fonts of the system alone: others would be loaded."""
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=["Arial", "sans-serif"], font_mono=["Consolas", "monospace"]
    )


def serve(page: gr.Blocks, uploads: FileCache, pictures: FileCache, host: str, port: int, queue: int) -> None:
    """Serve a page until interrupted.

    Args:
        page: what `build_page` returned.
        uploads: what visitors bring.
        pictures: what they are shown; in the same folder.
        host: address that the server binds to.
        port: it listens on.
        queue: requests that may wait, at most.

    Raises:
        UserError: the address cannot be had.
    """
    page.queue(max_size=queue, api_open=False)
    gate = Middleware(Gate, folder=uploads.folder.parent, uploads=uploads, pictures=pictures)
    try:
        page.launch(
            server_name=host, server_port=port, share=False, show_error=False, quiet=True, ssr_mode=False, pwa=False,
            mcp_server=False, run_history=False, enable_monitoring=False, footer_links=[],
            max_file_size=MOST_UPLOAD, app_kwargs={"middleware": [gate]}, prevent_thread_lock=True,
            css=html.CSS, theme=_theme(),
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {port}: cannot be listened on at --host {host}: give others") from error
    print(f"serving on {page.local_url} until interrupted", flush=True)
    page.block_thread()
