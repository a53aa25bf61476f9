"""What the page shows in HTML of its own: progress with the forming picture, settings side by side; and its style.

The page's tab of what a session has made: two pictures side by side, and their settings used again.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, fields
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from t2i.serving.limits import FileCache
from t2i.serving.requests import EditForm, EditRequest, Form, Request
from t2i.serving.worker import Drawn, Frame, Pixels

SMALL = 128
"""Pictures with shorter sides are shown by their pixels."""
_PREVIEW_SIDE = 512

CSS = """
.gradio-container{--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif;
--quiet:#5d6673;font-family:var(--font)!important}
.dark .gradio-container,.dark{--quiet:#a4adba}
.gradio-container main{width:100%;max-width:1200px!important;margin:0 auto!important;box-sizing:border-box}
.head h1{font-size:26px;letter-spacing:-.02em;margin:8px 0 2px;font-weight:650}
.head p,.hint{margin:0;color:var(--quiet);font-size:14px;overflow-wrap:anywhere}
.progress{display:grid;gap:8px}
.bar{height:8px;border-radius:4px;background:var(--border-color-primary);overflow:hidden}
.bar i{display:block;height:100%;background:var(--color-accent)}
.told .error{display:none}
.progress p{margin:0;font-size:14px;color:var(--quiet);font-variant-numeric:tabular-nums}
.forming{display:block;width:min(100%,512px);margin:4px auto 0;border-radius:8px}
.small img,img.small{image-rendering:pixelated}
img.forming.small{width:min(100%,360px)}
.pictures .grid-wrap,#history .grid-wrap{max-height:none!important;height:auto!important;min-height:0!important;
overflow:visible}
.pictures,#history{height:auto!important;min-height:0!important}
#history .grid-container{grid-template-columns:repeat(auto-fill,minmax(104px,1fr))!important}
#left .image-frame,#right .image-frame{width:100%}
#left img,#right img{width:100%!important;height:auto!important;max-height:420px!important;object-fit:contain}
.beside{align-self:center}
.settings{width:100%;border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
.settings th{width:36%;text-align:left;font-weight:500;color:var(--quiet)}
.settings,.settings tbody,.settings tr{border:0!important}
.settings th,.settings td{padding:5px 10px 5px 0!important;border:0!important;vertical-align:top;overflow-wrap:anywhere;
border-bottom:1px solid var(--border-color-primary)!important}
.settings .other td{font-weight:650;color:var(--color-accent)}
"""


def head(name: str, facts: str) -> str:
    """The page's first lines."""
    return f'<div class="head"><h1>{escape(name)}</h1><p>{escape(facts)}</p></div>'


def hint(words: str) -> str:
    """A line that says what to do."""
    return f'<p class="hint">{escape(words)}</p>'


def progress(frame: Frame, count: int, seconds: float, length: int) -> str:
    """How far a request for `count` pictures is, after so many seconds; of texts that are cut, that the model reads
    `length` tokens."""
    cut = "".join(f"<p>{escape(it)}: is longer than text.length {length} tokens and is cut</p>" for it in frame.cut)
    done, percent = len(frame.drawn), min(100, round(100 * frame.share))
    if done == count:
        words = f"{count} picture{'s' if count > 1 else ''} in {seconds:.1f} s"
        return f'<div class="progress"><p>{words}</p>{cut}</div>'
    words = f"picture {done + 1} of {count}" if count > 1 else "drawing"
    image = forming(frame.preview) if frame.preview is not None else ""
    return (
        f'<div class="progress"><div class="bar" role="progressbar" aria-valuenow="{percent}">'
        f'<i style="width:{percent}%"></i></div>'
        f"<p>{words} · {percent} % · {seconds:.0f} s</p>{cut}{image}</div>"
    )


def forming(pixels: Pixels) -> str:
    """A picture (H, W, 3) within the page itself: a preview is seen once, and worth no file."""
    image, small = Image.fromarray(pixels), min(pixels.shape[:2]) < SMALL
    image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    kind, buffer = ("png" if small else "jpeg"), io.BytesIO()
    image.save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    name = "forming small" if small else "forming"
    return f'<img class="{name}" alt="the picture as it forms" src="data:image/{kind};base64,{data}">'


def settings_table(settings: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """What a picture was drawn with, what differs from another's set off."""
    if settings is None:
        return hint("Nothing chosen yet.")
    mine, theirs = rows(settings), rows(other) if other is not None else None
    return (
        '<table class="settings">'
        + "".join(
            f"<tr{_mark(theirs is not None and theirs.get(name) != value)}><th>{escape(name)}</th>"
            f"<td>{escape(value)}</td></tr>"
            for name, value in mine.items()
        )
        + "</table>"
    )


def _mark(differs: bool) -> str:
    return ' class="other"' if differs else ""


def rows(settings: dict[str, Any]) -> dict[str, str]:
    """Settings in words, by name, without levels."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= rows(value)
        elif name == "size":
            found[name] = f"{value[1]} × {value[0]}"
        elif name != "batch_size":  # always one
            values = value if isinstance(value, list) else [value]
            found[name.replace("_", " ")] = ", ".join(_in_words(it) for it in values)
    return found


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value) or "–"


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


def history_tab(history: Any, tabs: Any, draws: AskTab, edits: AskTab | None, uploads: FileCache, small: bool) -> Any:
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
    gr.HTML(hint("The latest two pictures that you click are shown side by side; what differs is set off."))
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
                table = gr.HTML(settings_table(None, None))
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
        found += [gr.update(value=path, visible=it is not None), settings_table(settings, theirs)]
        found.append(gr.update(visible=it is not None))
    return found


def _fill(drawn: Drawn, edits: bool, uploads: FileCache) -> list[Any]:
    """Fill in the fields that asked for a picture, and show their tab."""
    is_edit = isinstance(drawn.request, EditRequest)
    values = [getattr(drawn.request.form, field.name) for field in fields(drawn.request.form)]
    values = [str(uploads.add("image.png", it)) if isinstance(it, bytes) else it for it in values]
    of_draw, of_edit = len(fields(Form)), len(fields(EditForm)) if edits else 0
    skips = [gr.skip()] * (of_draw if is_edit else of_edit)
    return [gr.Tabs(selected="edit" if is_edit else "draw"), *(skips + values if is_edit else values + skips)]
