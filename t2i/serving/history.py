"""The page's tab of what a session has made: two pictures side by side, and their settings used again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from t2i.serving import look
from t2i.serving.edits import EditForm, EditRequest
from t2i.serving.kept import KeptFiles
from t2i.serving.session import Form, Request
from t2i.serving.studio import Drawn

History = list[Drawn]
"""The latest first."""
Pair = tuple[Drawn | None, Drawn | None]


@dataclass(frozen=True)
class AskTab:
    """The parts of a tab that asks for pictures."""

    fields: list[Any]
    """Components, in the order of the form's fields."""
    button: Any
    stop: Any
    progress: Any
    gallery: Any


def thumbnails(history: History) -> list[tuple[str, str]]:
    """Files and captions, for a gallery."""
    return [(str(it.path), _caption(it)) for it in history]


def _caption(drawn: Drawn) -> str:
    words = drawn.request.prompt if isinstance(drawn.request, Request) else drawn.request.target
    return words if len(words) <= 40 else words[:39] + "…"


def history_tab(history: Any, tabs: Any, draws: AskTab, edits: AskTab | None, uploads: KeptFiles, small: bool) -> Any:
    """The history's pictures, which it returns; two of them are shown beside each other.

    Args:
        history: the session's state, a `History`.
        tabs: of the page.
        draws: the tab that draws.
        edits: the tab that edits, if there is one.
        uploads: what visitors bring, and with them images that are to be edited again.
        small: whether pictures are shown by their pixels.
    """
    pixelated = ["small"] if small else []
    gr.HTML(look.hint("The latest two pictures that you click are shown side by side; what differs is set off."))
    shown = gr.Gallery(
        show_label=False, columns=8, height="auto", object_fit="contain", allow_preview=False, interactive=False,
        buttons=[], elem_id="history", elem_classes=pixelated,
    )  # fmt: skip
    pair = gr.State((None, None))
    places: list[Any] = []
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
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    shown.select(_choose, [history, pair], [pair, *places], **quick)
    targets = [tabs, *draws.fields, *(edits.fields if edits is not None else [])]
    for index, button in enumerate(places[2::3]):
        button.click(
            lambda chosen, index=index: _fill(chosen[index], edits is not None, uploads), pair, targets, **quick
        )
    return shown


def _choose(history: History, pair: Pair, picked: gr.SelectData) -> list[Any]:
    """Put the picture that was clicked on the left, and what was there on the right."""
    clicked, before = history[picked.index], pair[0]
    if not clicked.path.exists():
        raise gr.Error("This picture is no longer kept: others have drawn since.", print_exception=False)
    chosen = (clicked, before if before is not None and before.path.exists() else None)
    found: list[Any] = [chosen]
    for it, other in zip(chosen, reversed(chosen), strict=True):
        settings, theirs = (None if one is None else one.settings for one in (it, other))
        path = None if it is None else str(it.path)
        found += [gr.update(value=path, visible=it is not None), look.settings_table(settings, theirs)]
        found.append(gr.update(visible=it is not None))
    return found


def _fill(drawn: Drawn, edits: bool, uploads: KeptFiles) -> list[Any]:
    """Fill in the fields that asked for a picture, and show their tab."""
    is_edit = isinstance(drawn.request, EditRequest)
    values = [getattr(drawn.request.form, field.name) for field in fields(drawn.request.form)]
    values = [str(uploads.add("image.png", it)) if isinstance(it, bytes) else it for it in values]
    of_draw, of_edit = len(fields(Form)), len(fields(EditForm)) if edits else 0
    skips = [gr.skip()] * (of_draw if is_edit else of_edit)
    return [gr.Tabs(selected="edit" if is_edit else "draw"), *(skips + values if is_edit else values + skips)]
