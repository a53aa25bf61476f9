"""The findings of `scan.py` as text for a terminal and as an HTML page.

- Both show the same tables; the page adds thumbnails and histograms.
- The page is one file: thumbnails are data URIs, bars are inline SVG, and its policy forbids loading anything.
- Ids, captions and details are foreign text: escaped on the page, and without control characters on a terminal.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template

import numpy as np

from data.errors import shortened
from data.inspect.scan import ASPECT_RATIOS, Findings, Reasons, Tally, Tile
from data.listing import format_counts
from data.pages import cards, linked_sections, written_at
from data.shards.index import SourceIndex

TOKENS_A_WORD = 1.3
"""An estimate for English text and the usual tokenizers; the page says so."""

_SHARES = {"least": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "most": 1.0}
_SIDES = (256, 512, 1024)
_CONTENTS = ("Members", "Formats", "Aspect ratios")
_NAMED_MEMBERS, _NAMED_SHARDS, _MOST_DETAIL = 12, 20, 160

_PIXELS = (0, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_WORDS = (0, 1, 3, 5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300)
_KILOBYTES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)

_LEFT, _RIGHT, _TOP, _BOTTOM = 6, 334, 22, 140  # the bars in a view of 340 x 160
_FEWEST_BARS = 6


@dataclass(frozen=True)
class Row:
    """A table's row; `below` holds lines of detail."""

    cells: tuple[str, ...]
    below: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of text cells; the first column is words, the others are numbers. `note` stands above it."""

    title: str
    head: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Findings in words.

    Attributes:
        conditions: a sentence on the filters and sizes that applied.
        token_limit: tokens that training uses of a caption.
        left_out: what the source holds that is in no sample, by reason.
    """

    index: SourceIndex
    findings: Findings
    conditions: str
    token_limit: int = 128
    left_out: Mapping[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """Text for a terminal."""
        totals = [f"{label.lower()}: {value}, {note}" for label, value, note in self._cards()]
        parts = [f"{printable(self.index.name)}: {printable(self.index.store.url)}", *totals, self.conditions]
        return "\n".join(parts + [_table_text(table) for table in self.tables()])

    def page(self) -> str:
        """The HTML page."""
        by_title = {table.title: _table_html(table) for table in self.tables()}
        histograms = f'<div class="charts">{"".join(self._histograms())}</div>'
        contents = (f"<div><h3>{title}</h3>{by_title.pop(title)}</div>" for title in _CONTENTS)
        sections = {
            "Samples": _sheet(self.findings.sheet),
            "Sizes and captions": histograms + by_title.pop("Sizes and captions") + by_title.pop("Limits"),
            "Contents": f'<div class="contents">{"".join(contents)}</div>',
            **by_title,
        }
        links, body = linked_sections(sections)
        template = files("data.inspect").joinpath("page.html").read_text(encoding="utf-8")
        return Template(template).substitute(
            name=escape(printable(self.index.name)),
            url=escape(printable(self.index.store.url)),
            conditions=escape(self.conditions),
            cards=cards(self._cards()),
            links=links,
            sections=body,
            footer=written_at(),
        )

    def tables(self) -> list[Table]:
        found = self.findings
        formats, aspects = self._counted("Formats", found.formats), self._counted("Aspect ratios", found.aspect_ratios)
        judged = [self._bad(), self._filtered()]
        return [self._sizes(), self._limits(), *judged, self._members(), formats, aspects, self._shards()]

    def _cards(self) -> list[tuple[str, str, str]]:
        index, found = self.index, self.findings
        total, size = int(index.counts.sum()), int(index.sizes.sum())
        return [
            ("Samples", count(total), f"{size_of(index.mean_bytes)} each"),
            ("Shards", count(len(index.names)), f"{size_of(size)} in all"),
            ("Looked at", count(found.read), f"{count(found.decoded)} of them decoded in full"),
            ("Usable", share(found.usable, found.decoded), "of those decoded"),
        ]

    def _sizes(self) -> Table:
        found = self.findings
        measured: list[tuple[str, Tally, Callable[[int], str]]] = [
            ("shorter side, px", found.shorter, count),
            ("longer side, px", found.longer, count),
            ("longer : shorter side", found.elongation, lambda value: f"{value / 100:.2f}"),
            ("image file", found.image_bytes, size_of),
            ("caption, words", found.words, count),
        ]
        rows = [
            Row((name, *(show(tally.quantile(at)) for at in _SHARES.values())))
            for name, tally, show in measured
            if tally.total
        ]
        return Table("Sizes and captions", ("", *_SHARES), rows)

    def _limits(self) -> Table:
        found, words = self.findings, self.findings.words
        rows = [
            Row((f"shorter side below {side} px", count(found.shorter.below(side)), _of(found.shorter, side)))
            for side in _SIDES
            if found.shorter.total
        ]
        most = math.floor(self.token_limit / TOKENS_A_WORD) + 1
        over = words.total - words.below(most)
        long = f"caption over {self.token_limit} tokens (estimate: {TOKENS_A_WORD} a word)"
        if words.total:
            rows.append(Row(("caption empty", count(words.below(1)), _of(words, 1))))
            rows.append(Row((long, count(over), share(over, words.total))))
        return Table("Limits", ("", "samples", "share"), rows)

    def _bad(self) -> Table:
        found = self.findings
        note = "Content that cannot be used; training skips it and lists it."
        if not found.bad and found.decoded < self.index.counts.sum():
            most = math.ceil(3000 / found.decoded) / 10  # the rule of three, rounded up
            note += f" None was found: with 95 % confidence their share is below {most:g} %."
        elif not found.bad:
            note += " There is none."
        return Table("Bad samples", *self._reasons(found.bad), note)

    def _filtered(self) -> Table:
        none = "" if self.findings.filtered else " They leave out none."
        return Table(
            "Filtered", *self._reasons(self.findings.filtered), f"Good samples that the filters leave out.{none}"
        )

    def _reasons(self, reasons: Reasons) -> tuple[tuple[str, ...], list[Row]]:
        found, rows = self.findings, []
        for (name, in_full), reason in sorted(reasons.items(), key=lambda item: -item[1].count):
            of, how = (found.decoded, "decoded") if in_full else (found.read, "read")
            examples = (f"{id_}: {detail}" if detail else id_ for id_, detail in reason.first)
            below = tuple(shortened(printable(line), _MOST_DETAIL) for line in examples)
            words = printable(name.replace("_", " "))
            rows.append(Row((words, count(reason.count), share(reason.count, of), f"{count(of)} {how}"), below))
        return ("reason", "samples", "share", "of"), rows

    def _members(self) -> Table:
        found = self.findings
        rows = [
            Row((printable(name), count(n), share(n, found.read), size_of(found.member_bytes[name] / n)))
            for name, n in found.members.most_common(_NAMED_MEMBERS)
        ]
        if (more := len(found.members) - _NAMED_MEMBERS) > 0:
            rows.append(Row((f"{count(more)} more, rarer", "", "", "")))
        return Table("Members", ("", "samples", "share", "bytes each"), rows)

    def _counted(self, title: str, counts: Mapping[str, int]) -> Table:
        """Samples by a property of their images, most frequent first."""
        by_count = sorted(counts.items(), key=lambda item: -item[1])
        return Table(
            title,
            ("", "samples", "share"),
            [Row((name, count(n), share(n, self.findings.read))) for name, n in by_count],
        )

    def _shards(self) -> Table:
        index = self.index
        measured = [("samples in a shard", index.counts, count), ("a shard's size", index.sizes, size_of)]
        rows = [
            Row((name, *(show(np.quantile(values, at, method="inverted_cdf").item()) for at in _SHARES.values())))
            for name, values, show in measured
        ]
        note = "No shard is corrupt."
        if index.corruption:
            note = f"{count(len(index.corruption))} corrupt; what they hold before the fault is read:"
            lines = [
                f"{index.names[shard]}: {words}; {index.counts[shard]} samples kept"
                for shard, words in sorted(index.corruption.items())[:_NAMED_SHARDS]
            ]
            if len(index.corruption) > _NAMED_SHARDS:
                lines.append(f"and {count(len(index.corruption) - _NAMED_SHARDS)} more")
            blank = ("",) * len(_SHARES)
            rows.append(Row(("corrupt", *blank), tuple(shortened(printable(line), _MOST_DETAIL) for line in lines)))
        if self.left_out:
            note = f"Left out: {printable(format_counts(self.left_out))}. {note}"
        return Table("Shards", ("", *_SHARES), rows, note)

    def _histograms(self) -> list[str]:
        found = self.findings
        aspects = _Bars(list(ASPECT_RATIOS), [found.aspect_ratios[name] for name in ASPECT_RATIOS], centred=True)
        charts = [
            ("Shorter side", "Pixels, of the image as it is stored.", _bins(found.shorter, _PIXELS)),
            ("Aspect ratio", "Width to height, the nearest of these.", aspects),
            ("Caption length", "Words, before any filter.", _bins(found.words, _WORDS)),
            ("Image file", "Kilobytes as encoded.", _bins(found.image_bytes, _KILOBYTES, 1000)),
        ]
        return [_histogram(title, note, bars) for title, note, bars in charts if sum(bars.counts)]


# --- words ---


def count(n: float) -> str:
    return f"{n:,.0f}"


def share(n: int, of: int) -> str:
    """A share in percent; never shown as 0 or 100 unless it is exactly that."""
    if not of:
        return "–"
    percent = 100 * n / of
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"


def size_of(n: float) -> str:
    """A number of bytes, in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 999.5 or unit == "TB":
            break
        n /= 1000
    return f"{n:,.0f} {unit}" if unit == "B" or n >= 99.95 else f"{n:.3g} {unit}"


def printable(text: str) -> str:
    """Foreign text with control characters escaped, so that it cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _of(tally: Tally, limit: int) -> str:
    return share(tally.below(limit), tally.total)


def _table_text(table: Table) -> str:
    lines = ["", table.title, *([f"  {table.note}"] if table.note else [])]
    rows = [row for row in table.rows if any(row.cells[1:])]
    if rows:
        widths = [
            max(len(cells[i]) for cells in (table.head, *(r.cells for r in rows))) for i in range(len(table.head))
        ]
        for row in [Row(table.head), *table.rows]:
            cells = [row.cells[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row.cells[1:], widths[1:], strict=True)]
            lines.append(("  " + "  ".join(cells)).rstrip())
            lines += [f"      {line}" for line in row.below]
    return "\n".join(lines)


# --- the page ---


def _table_html(table: Table) -> str:
    note = f'<p class="lead">{escape(table.note)}</p>' if table.note else ""
    if not table.rows:
        return note
    head = "".join(f"<th{_number(i)}>{escape(cell)}</th>" for i, cell in enumerate(table.head))
    body = []
    for row in table.rows:
        cells = "".join(f"<td{_number(i)}>{escape(cell)}</td>" for i, cell in enumerate(row.cells))
        body.append(f"<tr{' class=above' if row.below else ''}>{cells}</tr>")
        if row.below:
            lines = "".join(f"<li>{escape(line)}</li>" for line in row.below)
            body.append(f'<tr class="below"><td colspan="{len(table.head)}"><ul>{lines}</ul></td></tr>')
    rows = "".join(body)
    return f'{note}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _number(column: int) -> str:
    return " class=n" if column else ""


def _sheet(tiles: Sequence[Tile]) -> str:
    if not tiles:
        return '<p class="lead">None of the samples that were decoded is usable.</p>'
    lead = "Usable samples drawn at random from the whole source: the whole image, and the caption as trained."
    return f'<p class="lead">{lead}</p><div class="sheet">{"".join(map(_tile, tiles))}</div>'


def _tile(tile: Tile) -> str:
    picture = base64.b64encode(tile.jpeg).decode()
    return (
        f'<button><img alt="" decoding="async" src="data:image/jpeg;base64,{picture}">'
        f'<span class="caption" dir="auto">{escape(tile.caption)}</span>'
        f'<span class="id">{escape(printable(tile.id))}</span>'
        f'<span class="size">{tile.width} × {tile.height}</span></button>'
    )


@dataclass(frozen=True)
class _Bars:
    """A histogram; labels stand at the left edges of the bars or, if `centred`, below their middles."""

    labels: list[str]
    counts: list[int]
    centred: bool = False


def _bins(tally: Tally, edges: Sequence[int], unit: int = 1) -> _Bars:
    """Count the numbers from each edge to the next; empty bins at the ends are dropped, except for a margin."""
    below = [tally.below(edge * unit) for edge in edges]
    counts = [stop - start for start, stop in zip(below, [*below[1:], tally.total], strict=True)]
    filled = [i for i, n in enumerate(counts) if n] or [0]
    first, last = max(0, filled[0] - 1), min(len(counts) - 1, filled[-1] + 1)
    while last - first + 1 < _FEWEST_BARS:
        first, last = max(0, first - 1), min(len(counts) - 1, last + 1)
    labels = [f"{edge // 1000}k" if edge >= 10_000 else str(edge) for edge in edges]
    return _Bars(labels[first : last + 1], counts[first : last + 1])


def _histogram(title: str, note: str, bars: _Bars) -> str:
    total, highest = sum(bars.counts), max(bars.counts)
    width = (_RIGHT - _LEFT) / len(bars.counts)
    parts = []
    for i, (label, n) in enumerate(zip(bars.labels, bars.counts, strict=True)):
        x, height = _LEFT + i * width, n / highest * (_BOTTOM - _TOP)
        middle = x + width / 2
        if n:
            said = label if bars.centred else f"{label} to {bars.labels[i + 1]}" if i + 1 < len(bars.labels) else label
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{_BOTTOM - max(height, 1):.1f}" width="{width - 2:.1f}" '
                f'height="{max(height, 1):.1f}" rx="2"><title>{said}: {count(n)}, {share(n, total)}</title></rect>'
            )
        if n >= 0.005 * total:
            y = _BOTTOM - height - 4
            parts.append(f'<text class="v" x="{middle:.1f}" y="{y:.1f}">{round(100 * n / total)}</text>')
        parts.append(f'<text x="{middle if bars.centred else x:.1f}" y="{_BOTTOM + 11}">{label}</text>')
    parts.append(f'<path d="M{_LEFT},{_BOTTOM}H{_RIGHT}"/>')
    svg = f'<svg viewBox="0 0 340 156" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    note = f"{note} Above each bar: percent."
    return f'<figure class="chart"><h3>{title}</h3>{svg}<figcaption>{note}</figcaption></figure>'
