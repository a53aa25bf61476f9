"""Tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Container, Sequence


def format_table(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """Rows of equally many cells, the head first, as lines; the columns in `left` align left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
