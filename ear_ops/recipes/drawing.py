"""Figures as one prints them: readable fonts, colours that colour-blind readers tell apart, as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PAGE_WIDTH = 7.0  # inches of text on a page

# Okabe and Ito's colours without yellow, which is hardly seen on white; with the markers, 56 pairs differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1,
    "lines.markersize": 3.5,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.4,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ear_ops",  # so that the same figure is the same file
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure to draw into. When the block ends, it is written as PNG, and as SVG beside it.

    Args:
        path: of the PNG.
        width, height: in inches.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        drawn.savefig(path, dpi=200, metadata={"Software": None})
        drawn.savefig(path.with_suffix(".svg"), metadata={"Creator": None, "Date": None})
