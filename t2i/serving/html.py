"""The page's own HTML: style, progress with a preview, tables of settings; and the tab that compares images."""

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
from t2i.serving.worker import Frame, GeneratedImage, Pixels

SMALL = 128
"""Images with a side below this are enlarged without smoothing."""
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
.status .error{display:none}
.progress p{margin:0;font-size:14px;color:var(--quiet);font-variant-numeric:tabular-nums}
.preview{display:block;width:min(100%,512px);margin:4px auto 0;border-radius:8px}
.small img,img.small{image-rendering:pixelated}
img.preview.small{width:min(100%,360px)}
.pictures .grid-wrap,#history .grid-wrap{max-height:none!important;height:auto!important;min-height:0!important;
overflow:visible}
.pictures,#history{height:auto!important;min-height:0!important}
#history .grid-container{grid-template-columns:repeat(auto-fill,minmax(104px,1fr))!important}
#left .image-frame,#right .image-frame{width:100%}
#left img,#right img{width:100%!important;height:auto!important;max-height:420px!important;object-fit:contain}
.inline{align-self:center}
.settings{width:100%;border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
.settings th{width:36%;text-align:left;font-weight:500;color:var(--quiet)}
.settings,.settings tbody,.settings tr{border:0!important}
.settings th,.settings td{padding:5px 10px 5px 0!important;border:0!important;vertical-align:top;overflow-wrap:anywhere;
border-bottom:1px solid var(--border-color-primary)!important}
.settings .differs td{font-weight:650;color:var(--color-accent)}
"""


def head(name: str, facts: str) -> str:
    """The title and a line below it."""
    return f'<div class="head"><h1>{escape(name)}</h1><p>{escape(facts)}</p></div>'


def hint(text: str) -> str:
    """A line of instruction."""
    return f'<p class="hint">{escape(text)}</p>'


def progress(frame: Frame, count: int, seconds: float) -> str:
    """The progress of a request for `count` images, after `seconds`."""
    warnings = "".join(f"<p>{escape(warning)}</p>" for warning in frame.warnings)
    done, percent = len(frame.generated), min(100, round(100 * frame.progress))
    if done == count:
        text = f"{count} picture{'s' if count > 1 else ''} in {seconds:.1f} s"
        return f'<div class="progress"><p>{text}</p>{warnings}</div>'
    text = f"picture {done + 1} of {count}" if count > 1 else "drawing"
    image = preview(frame.preview) if frame.preview is not None else ""
    return (
        f'<div class="progress"><div class="bar" role="progressbar" aria-valuenow="{percent}">'
        f'<i style="width:{percent}%"></i></div>'
        f"<p>{text} · {percent} % · {seconds:.0f} s</p>{warnings}{image}</div>"
    )


def preview(pixels: Pixels) -> str:
    """An image (H, W, 3) inlined in the page, since a preview is seen once only."""
    image, small = Image.fromarray(pixels), min(pixels.shape[:2]) < SMALL
    image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    kind, buffer = ("png" if small else "jpeg"), io.BytesIO()
    image.save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    name = "preview small" if small else "preview"
    return f'<img class="{name}" alt="the picture as it forms" src="data:image/{kind};base64,{data}">'


def settings_table(settings: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """An image's settings; those that differ from another image's are marked."""
    if settings is None:
        return hint("Nothing chosen yet.")
    others = rows(other) if other is not None else None
    lines = []
    for name, value in rows(settings).items():
        mark = ' class="differs"' if others is not None and others.get(name) != value else ""
        lines.append(f"<tr{mark}><th>{escape(name)}</th><td>{escape(value)}</td></tr>")
    return f'<table class="settings">{"".join(lines)}</table>'


def rows(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as text, by name, flattened."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= rows(value)
        elif name == "size":
            found[name] = f"{value[1]} × {value[0]}"
        elif name != "batch_size":  # always one
            values = value if isinstance(value, list) else [value]
            found[name.replace("_", " ")] = ", ".join(_format(value) for value in values)
    return found


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value) or "–"


History = list[GeneratedImage]
"""The latest first."""
Pair = tuple[GeneratedImage | None, GeneratedImage | None]
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of events that only fill in fields."""


@dataclass(frozen=True)
class RequestTab:
    """The components of a tab that makes images."""

    fields: list[Any]
    """In the order of the form's fields."""
    button: Any
    stop: Any
    progress: Any
    gallery: Any


def thumbnails(history: History) -> list[tuple[str, str]]:
    """Files and captions, for a gallery."""
    return [(str(image.path), _caption(image)) for image in history]


def _caption(image: GeneratedImage) -> str:
    text = image.request.prompt if isinstance(image.request, Request) else image.request.target
    return text if len(text) <= 40 else text[:39] + "…"


def history_tab(
    history: Any, tabs: Any, draw: RequestTab, edit: RequestTab | None, uploads: FileCache, small: bool
) -> Any:
    """Build the tab that shows the session's images, and two of them side by side; return its gallery.

    Args:
        history: the session's state, a `History`.
        tabs: of the page.
        uploads: receives images that are to be edited again.
        small: whether images are enlarged without smoothing.
    """
    pixelated = ["small"] if small else []
    gr.HTML(hint("The latest two pictures that you click are shown side by side; what differs is set off."))
    gallery = gr.Gallery(
        show_label=False, columns=8, height="auto", object_fit="contain", allow_preview=False, interactive=False,
        buttons=[], elem_id="history", elem_classes=pixelated,
    )  # fmt: skip
    pair = gr.State((None, None))
    parts: list[Any] = []
    with gr.Row():
        for side in ("left", "right"):
            with gr.Column(min_width=300):
                image = gr.Image(
                    show_label=False, interactive=False, visible=False, buttons=["download", "fullscreen"],
                    elem_id=side, elem_classes=pixelated,
                )  # fmt: skip
                table = gr.HTML(settings_table(None, None))
                again = gr.Button("Use these settings again", visible=False, elem_id=f"again-{side}")
                parts += [image, table, again]
    gallery.select(_choose, [history, pair], [pair, *parts], **QUICK)
    targets = [tabs, *draw.fields, *(edit.fields if edit is not None else [])]
    for index, button in enumerate(parts[2::3]):
        button.click(
            lambda chosen, index=index: _fill(chosen[index], edit is not None, uploads), pair, targets, **QUICK
        )
    return gallery


def _choose(history: History, pair: Pair, event: gr.SelectData) -> list[Any]:
    """Show the image that was clicked on the left, and the one that was there on the right."""
    clicked, before = history[event.index], pair[0]
    if not clicked.path.exists():
        raise gr.Error("This picture is no longer kept: newer ones took its place.", print_exception=False)
    chosen = (clicked, before if before is not None and before.path.exists() else None)
    updates: list[Any] = [chosen]
    for image, other in zip(chosen, reversed(chosen), strict=True):
        settings, others = (None if one is None else one.settings for one in (image, other))
        path = None if image is None else str(image.path)
        updates += [gr.update(value=path, visible=image is not None), settings_table(settings, others)]
        updates.append(gr.update(visible=image is not None))
    return updates


def _fill(image: GeneratedImage, has_edit_tab: bool, uploads: FileCache) -> list[Any]:
    """Fill in the fields that asked for an image, and show their tab."""
    form = image.request.form
    values = [getattr(form, field.name) for field in fields(form)]
    values = [str(uploads.add("image.png", value)) if isinstance(value, bytes) else value for value in values]
    if isinstance(image.request, EditRequest):
        return [gr.Tabs(selected="edit"), *[gr.skip()] * len(fields(Form)), *values]
    return [gr.Tabs(selected="draw"), *values, *[gr.skip()] * (len(fields(EditForm)) if has_edit_tab else 0)]
