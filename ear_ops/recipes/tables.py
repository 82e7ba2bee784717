"""Tables as text: plain, in Markdown, and drawn by rich on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]  # of a header and rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with columns aligned by spaces: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [_aligned(header, widths), "  ".join("-" * width for width in widths)]
    return "\n".join(lines + [_aligned(row, widths) for row in rows])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def terminal_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table that rich draws where stdout is a terminal; elsewhere, as in files and pipes, a `text_table`."""
    if not sys.stdout.isatty():
        return text_table(header, rows)
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=SIMPLE_HEAD)
    for i, name in enumerate(header):
        drawn.add_column(Text(name), justify="right" if i else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))  # as `Text`, so that brackets in a cell are no markup
    console = Console()
    with console.capture() as capture:
        console.print(drawn)
    return capture.get().strip("\n")


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]).rstrip()
