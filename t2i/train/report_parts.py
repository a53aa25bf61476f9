"""What pages about runs are made of: numbers as text, tables, pictures, smoothed curves, and the page around them."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from data.files import atomic_write
from t2i.train.report_charts import Array, Piece


def number(value: float) -> str:
    """As text of four or so digits."""
    for size, unit in ((1e9, " B"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """In hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def absent(sentence: str) -> str:
    """HTML that stands where there is nothing to show."""
    return f'<p class="absent">{sentence}</p>'


def cards(rows: Sequence[tuple[str, str, str]]) -> str:
    """HTML of labels, values and notes, all of them text."""
    return "".join(
        f"<div><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for label, value, note in rows
    )


def table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """HTML. Cells are text; columns after `text_columns` are numbers and align right."""

    def row(cells: list[str], tag: str) -> str:
        tags = [tag if column < text_columns else f"{tag} class=n" for column in range(len(cells))]
        return "".join(f"<{opening}>{escape(cell)}</{tag}>" for opening, cell in zip(tags, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{row(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(image: Image.Image, side: int, caption: str) -> str:
    """HTML of a picture, its sides at most `side` pixels, the caption text."""
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    size, caption = f'width="{image.width}" height="{image.height}"', escape(caption)
    picture = f'<img {size} alt="{caption}" loading=lazy src="{source}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def smooth(values: Array, half_width: int) -> Array:
    """Centred moving average, twice: a steep start is not shifted. The window is cut off at the ends."""
    index = np.arange(len(values))
    low, high = np.maximum(index - half_width, 0), np.minimum(index + half_width + 1, len(values))
    for _ in range(2):
        total = np.concatenate([[0.0], np.cumsum(values)])
        values = (total[high] - total[low]) / (high - low)
    return values


def smooth_pieces(pieces: list[Piece]) -> list[Piece]:
    """A noisy curve's pieces, smoothed over about a fiftieth of its points."""
    half_width = sum(len(x) for x, _ in pieces) // 100
    return [(x, smooth(values, half_width)) for x, values in pieces]


def write_page(
    path: Path, title: str, kind: str, subtitle: str, cards: str, notes: list[str], sections: dict[str, str]
) -> Path:
    """Write a page, in place of an old one atomically, and return its path.

    Args:
        path: the file.
        title: text of the headline.
        kind: text; what page it is, for the browser's tab.
        subtitle: text below the headline.
        cards: HTML.
        notes: HTML of what has to be said first.
        sections: HTML by title.
    """
    anchors = [(name, name.lower().replace(" ", "-")) for name in sections]
    template = files("t2i.train").joinpath("report_page.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=escape(title),
        kind=escape(kind),
        subtitle=escape(subtitle),
        cards=cards,
        notes="".join(f'<aside role="note">{html}</aside>' for html in notes),
        links="".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors),
        sections="".join(f'<section id="{a}"><h2>{name}</h2>{sections[name]}</section>' for name, a in anchors),
        footer=time.strftime("Written %Y-%m-%d %H:%M UTC.", time.gmtime()),
    )
    atomic_write(path, page.encode())
    return path
