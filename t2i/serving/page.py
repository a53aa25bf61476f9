"""The page, in Gradio: what may be asked on the left, what comes of it on the right, and a history to compare.

- What is wrong with a request is said in the words of the check that refused it.
- Requests wait in one queue for the one model; what only fills in fields does not.
- Nothing is loaded from anywhere else, and nothing is told to anyone: no analytics, no fonts, no share link.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from html import escape
from typing import Any, TypeVar, get_args

import gradio as gr

from data.errors import UserError
from t2i.config_sampling import SamplingConfig
from t2i.serving import look
from t2i.serving.edits import EditForm, EditRequest, first_edits
from t2i.serving.session import Form, Request, first_request, sizes_like
from t2i.serving.studio import Drawn, Frame, Studio

SOLVERS = get_args(SamplingConfig.model_fields["solver"].annotation)
KEPT = 60
"""Pictures that a session's history holds, the latest."""

T = TypeVar("T")
History = list[Drawn]
Pair = tuple[Drawn | None, Drawn | None]


@dataclass(frozen=True)
class Draws:
    """The parts of a tab that asks for pictures."""

    fields: list[Any]
    """Components, in the order of the form's fields."""
    button: Any
    stop: Any
    progress: Any
    gallery: Any


def build_page(studio: Studio, name: str, facts: str) -> gr.Blocks:
    """The page of a model.

    Args:
        studio: the model.
        name: its title.
        facts: a line about it.
    """
    small = min(studio.pipeline.config.data.size) < look.SMALL
    with gr.Blocks(title=name, analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML(look.head(name, facts))
        history = gr.State([])
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                draws = _draw_tab(studio, small)
            edits = None
            if studio.pipeline.config.model.condition == "text":
                with gr.Tab("Edit", id="edit"):
                    edits = _edit_tab(studio, small)
            with gr.Tab("History", id="history"):
                shown = _history_tab(history, tabs, draws, edits, small)
        _connect(draws, studio.check, studio.draw, Form, history, shown)
        if edits is not None:
            _connect(edits, studio.check_edit, studio.edit, EditForm, history, shown)
    return page


def _draw_tab(studio: Studio, small: bool) -> Draws:
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
            seed, new_seed = _seed(first.seed)
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
    return Draws(parts, button, stop, progress, gallery)


def _edit_tab(studio: Studio, small: bool) -> Draws:
    config = studio.pipeline.config
    height, width = config.data.size
    first = first_edits(config)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            image = gr.Image(
                type="pil", image_mode="RGB", sources=["upload", "clipboard"], height=240, elem_id="image",
                label=f"Image; a larger one is scaled down to about {width} × {height} pixels",
            )  # fmt: skip
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
            seed, new_seed = _seed(first.seed)
        progress, gallery = _results("Bring an image, and say what it shows and what it is to show.", small)
    _on_new_seed(new_seed, seed)
    parts = [image, source, target, steps, taken, of_source, of_target, seed]
    return Draws(parts, button, stop, progress, gallery)


def _buttons(name: str) -> tuple[Any, Any]:
    with gr.Row():
        button = gr.Button(name, variant="primary", elem_id=name.lower(), min_width=120)
        stop = gr.Button("Stop", elem_id=f"stop-{name.lower()}", min_width=80)
    return button, stop


def _seed(value: float | None) -> tuple[Any, Any]:
    with gr.Row():
        seed = gr.Number(value, label="Seed", scale=2, min_width=150, elem_classes="seed")
        button = gr.Button("New seed", min_width=100, elem_classes="beside")
    return seed, button


def _on_new_seed(button: Any, seed: Any) -> None:
    button.click(
        lambda: secrets.randbelow(2**31),
        None, seed, queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip


def _results(words: str, small: bool) -> tuple[Any, Any]:
    with gr.Column(scale=7, min_width=320):
        progress = gr.HTML(look.hint(words), elem_classes="told")
        gallery = gr.Gallery(
            show_label=False, columns=2, height="auto", object_fit="contain", visible=False, interactive=False,
            buttons=["download", "fullscreen"], elem_classes=["pictures", *(["small"] if small else [])],
        )  # fmt: skip
    return progress, gallery


def _sides(size: str) -> list[int]:
    return [int(side) for side in size.split(" × ")]


def _connect(
    tab: Draws,
    check: Callable[[Any], Any],
    draw: Callable[[Any], Iterator[Frame]],
    form: type[Form] | type[EditForm],
    history: Any,
    shown: Any,
) -> None:
    """Have a tab's button ask for pictures, and its other one stop them."""

    def ask(drawn_before: History, *values: Any) -> Iterator[list[Any]]:
        with _in_words():
            request = check(form(*values))
            count = request.pictures if isinstance(request, Request) else 1
            began, done = time.monotonic(), -1
            for frame in draw(request):
                told = look.progress(frame, count, time.monotonic() - began)
                if len(frame.drawn) == done:
                    yield [told, gr.skip(), gr.skip(), gr.skip()]
                    continue
                done = len(frame.drawn)
                known = [*reversed(frame.drawn), *drawn_before][:KEPT]
                gallery = gr.update(value=[str(it.path) for it in frame.drawn], visible=done > 0)
                yield [told, gallery, known, _thumbnails(known)]

    asked = gr.on(
        [tab.button.click, *(it.submit for it in tab.fields if isinstance(it, gr.Textbox))],
        ask, [history, *tab.fields], [tab.progress, tab.gallery, history, shown],
        concurrency_limit=1, concurrency_id="model", show_progress="minimal", show_progress_on=tab.progress,
        api_visibility="private",
    )  # fmt: skip
    tab.stop.click(
        lambda: look.hint("Stopped."), None, tab.progress,
        cancels=[asked], queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip


class _in_words:
    """What a user did wrong, as a notice on the page."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, UserError):
            raise gr.Error(escape(str(error)), print_exception=False) from None


def _thumbnails(history: History) -> list[tuple[str, str]]:
    return [(str(it.path), _caption(it)) for it in history]


def _caption(drawn: Drawn) -> str:
    words = drawn.request.prompt if isinstance(drawn.request, Request) else drawn.request.target
    return words if len(words) <= 40 else words[:39] + "…"


def _history_tab(history: Any, tabs: Any, draws: Draws, edits: Draws | None, small: bool) -> Any:
    """The history's pictures; two of them are shown beside each other."""
    pixelated = ["small"] if small else []
    gr.HTML(look.hint("The latest two pictures that you click are shown side by side; what differs is set off."))
    shown = gr.Gallery(
        show_label=False, columns=8, height="auto", object_fit="contain", allow_preview=False, interactive=False,
        buttons=[], elem_id="history", elem_classes=pixelated,
    )  # fmt: skip
    pair = gr.State((None, None))
    places = []
    with gr.Row():
        for side in ("left", "right"):
            with gr.Column(min_width=300):
                image = gr.Image(
                    show_label=False, interactive=False, visible=False, buttons=["download", "fullscreen"],
                    elem_id=side, elem_classes=pixelated,
                )  # fmt: skip
                table = gr.HTML(look.settings_table(None, None))
                again = gr.Button("Use these settings again", visible=False, elem_id=f"again-{side}")
                places += [image, table, again]
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    shown.select(_choose, [history, pair], [pair, *places], **quick)
    targets = [tabs, *draws.fields, *(edits.fields if edits is not None else [])]
    for index, again in enumerate(places[2::3]):
        again.click(lambda chosen, index=index: _fill(chosen[index], edits is not None), pair, targets, **quick)
    return shown


def _choose(history: History, pair: Pair, picked: gr.SelectData) -> list[Any]:
    """Put the picture that was clicked on the left, and what was there on the right."""
    chosen = (history[picked.index], pair[0])
    found: list[Any] = [chosen]
    for it, other in zip(chosen, reversed(chosen), strict=True):
        settings, theirs = (None if one is None else one.settings for one in (it, other))
        path = None if it is None else str(it.path)
        found += [gr.update(value=path, visible=it is not None), look.settings_table(settings, theirs)]
        found.append(gr.update(visible=it is not None))
    return found


def _fill(drawn: Drawn, edits: bool) -> list[Any]:
    """Fill in the fields that asked for a picture, and show their tab."""
    is_edit = isinstance(drawn.request, EditRequest)
    values = [getattr(drawn.request.form, field.name) for field in fields(drawn.request.form)]
    of_draw, of_edit = len(fields(Form)), len(fields(EditForm)) if edits else 0
    skips = [gr.skip()] * (of_draw if is_edit else of_edit)
    return [gr.Tabs(selected="edit" if is_edit else "draw"), *(skips + values if is_edit else values + skips)]


def _theme() -> gr.themes.Base:
    """Fonts of the system alone: others would be loaded."""
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=["Arial", "sans-serif"], font_mono=["Consolas", "monospace"]
    )


def serve(page: gr.Blocks, host: str, port: int, queue: int) -> None:
    """Serve a page until interrupted.

    Args:
        page: what `build_page` returned.
        host: address that the server binds to.
        port: it listens on.
        queue: requests that may wait, at most.

    Raises:
        UserError: the address cannot be had.
    """
    page.queue(max_size=queue, api_open=False)
    try:
        page.launch(
            server_name=host, server_port=port, share=False, show_error=False, quiet=True, ssr_mode=False, pwa=False,
            mcp_server=False, run_history=False, enable_monitoring=False, footer_links=[], max_file_size="32mb",
            prevent_thread_lock=True, css=look.CSS, theme=_theme(),
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {port}: cannot be listened on at --host {host}: give others") from error
    print(f"serving on {page.local_url} until interrupted", flush=True)
    page.block_thread()
