"""Draws the pictures of the pages as SVG files beside this script: ``python docs/concepts/pictures.py``.

Every picture is a light card with a border, so it can be read on light and on dark pages.
"""

from __future__ import annotations

from pathlib import Path

INK, GREY, BORDER, CARD = "#1f2328", "#59636e", "#c4ccd4", "#ffffff"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#00805c"  # told apart by colour-blind readers, too
PALE = {BLUE: "#dcecf6", ORANGE: "#fbe6d8", GREEN: "#d9f0e8", GREY: "#f0f2f4"}


def text(x: float, y: float, lines: str, size: int = 15, colour: str = INK, anchor: str = "middle", bold: bool = False):
    """Lines of text whose vertical middle is ``y``."""
    parts = lines.split("\n")
    first = y - (len(parts) - 1) * size * 0.65 + size * 0.35
    weight = ' font-weight="bold"' if bold else ""
    return "".join(
        f'<text x="{x:g}" y="{first + number * size * 1.3:g}" font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}"{weight}>{part}</text>\n'
        for number, part in enumerate(parts)
    )


def box(x: float, y: float, width: float, height: float, lines: str, colour: str = GREY, size: int = 15) -> str:
    """A rounded box with text in its middle; ``x`` and ``y`` are its upper left corner."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{PALE[colour]}" '
        f'stroke="{colour}" stroke-width="1.5"/>\n'
    ) + text(x + width / 2, y + height / 2, lines, size)


def arrow(
    x1: float, y1: float, x2: float, y2: float, colour: str = GREY, width: float = 2, dashed: bool = False
) -> str:
    """An arrow from the first point to the second."""
    dashes = ' stroke-dasharray="6 5"' if dashed else ""
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"{dashes} '
        f'marker-end="url(#head-{colour[1:]})"/>\n'
    )


def attention_map(x: float, y: float, size: float, rows: list[str], colour: str) -> str:
    """A square map; each row is a string of digits, 0 for the palest cell and 9 for the darkest."""
    cell = size / len(rows)
    cells = "".join(
        f'<rect x="{x + column * cell:g}" y="{y + row * cell:g}" width="{cell:g}" height="{cell:g}" fill="{colour}" '
        f'fill-opacity="{0.06 + int(digit) / 10:.2f}"/>\n'
        for row, digits in enumerate(rows)
        for column, digit in enumerate(digits)
    )
    return cells + frame(x, y, size, size, colour)


def frame(
    x: float, y: float, width: float, height: float, colour: str, fill: str = "none", dashed: bool = False
) -> str:
    """A rectangle with sharp corners."""
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{colour}" '
        f'stroke-width="1.5"{dashes}/>\n'
    )


def picture(width: int, height: int, title: str, *parts: str) -> str:
    """The SVG document; ``title`` says in words what it shows."""
    heads = "".join(
        f'<marker id="head-{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="10" markerHeight="10" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 10 5 0 10z" fill="{colour}"/></marker>\n'
        for colour in (GREY, BLUE, ORANGE, GREEN)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">\n'
        f"<title>{title}</title>\n<defs>\n{heads}</defs>\n"
        f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="12" fill="{CARD}" stroke="{BORDER}"/>\n'
        f"{''.join(parts)}</svg>\n"
    )


MAP = ["71100", "18010", "10611", "01252", "00116"]
MAP_AUG = ["62110", "27010", "11431", "02162", "01125"]


def push_and_pull() -> str:
    parts = []
    for top, name, words, colour, rows in (
        (50, "x", "He is happy", BLUE, MAP),
        (250, "xᵃ", "He is glad", ORANGE, MAP_AUG),
    ):
        middle = top + 45
        parts += [
            text(72, middle - 14, f"view {name}", 16, colour, bold=True),
            text(72, middle + 10, f"“{words}”"),
            arrow(130, middle, 156, middle),
            box(158, top + 10, 114, 70, "embeddings\nof the words", colour),
            arrow(272, middle, 298, middle),
            box(300, top + 10, 82, 70, "blocks\n1 to 5"),
            arrow(382, middle, 408, middle),
            attention_map(412, top, 90, rows, colour),
            arrow(502, middle, 528, middle),
            box(530, top + 10, 82, 70, "blocks\n7 to 12"),
            arrow(612, middle, 638, middle),
            box(640, top + 10, 102, 70, "prediction", colour),
        ]
    parts += [
        arrow(200, 175, 200, 136, GREEN, 4),
        arrow(200, 209, 200, 254, GREEN, 4),
        text(230, 184, "push", 17, GREEN, "start", bold=True),
        text(230, 204, "apart", 14, GREEN, "start"),
        arrow(456, 146, 456, 178, GREEN, 4),
        arrow(456, 244, 456, 206, GREEN, 4),
        text(474, 184, "pull", 17, GREEN, "start", bold=True),
        text(474, 204, "together", 14, GREEN, "start"),
        arrow(691, 170, 691, 136, GREEN, 3),
        arrow(691, 218, 691, 254, GREEN, 3),
        text(691, 194, "one label for both", 14, GREEN, bold=True),
        text(457, 30, "attention of block 6", 14, GREY),
    ]
    return picture(790, 370, "Two views of a sentence in one model: push, pull, and one label for both", *parts)


def capture() -> str:
    return picture(
        770,
        430,
        "How queries and keys get from a running model into the loss",
        text(175, 30, "the model, as it is", 17, bold=True),
        box(60, 55, 230, 46, "hidden states"),
        arrow(175, 101, 175, 134),
        box(60, 136, 230, 56, "projections, rotary\nembedding, norms", BLUE),
        arrow(175, 192, 175, 254),
        text(163, 223, "Q, K, V", 15, BLUE, "end", bold=True),
        box(60, 256, 230, 56, "attention kernel\n(SDPA, FlashAttention, …)"),
        arrow(175, 312, 175, 354),
        box(60, 356, 230, 46, "output: the same bits"),
        text(575, 30, "what attach() adds", 17, bold=True),
        box(440, 196, 270, 54, "record: Q, K and the mask,\nin the graph, without a copy", ORANGE),
        arrow(183, 223, 436, 223, ORANGE, 3),
        text(310, 208, "tap", 16, ORANGE, bold=True),
        arrow(575, 250, 575, 282, ORANGE),
        box(440, 284, 270, 46, "ear.loss(): fused loss kernel", ORANGE),
        arrow(575, 330, 575, 360, ORANGE),
        box(440, 362, 270, 40, "weight · term, added to your loss", GREEN),
        arrow(575, 196, 575, 166, GREEN, 2, dashed=True),
        f'<path d="M575 166 H300" fill="none" stroke="{GREEN}" stroke-width="2" stroke-dasharray="6 5"/>\n',
        arrow(310, 166, 294, 166, GREEN),
        text(440, 148, "backward: the gradient of the loss", 14, GREEN),
    )


def kernel() -> str:
    parts = [
        text(190, 30, "plain PyTorch", 17, bold=True),
        text(580, 30, "fused kernel", 17, bold=True),
        f'<line x1="385" y1="20" x2="385" y2="335" stroke="{BORDER}"/>\n',
    ]
    large = ["71100210", "18010021", "10611100", "01252010", "00116120", "12001701", "21010162", "01200227"]
    large_aug = ["62110201", "27010111", "11431100", "02162001", "01125110", "11001611", "12010252", "10200226"]
    parts += [
        attention_map(40, 80, 130, large, BLUE),
        text(105, 64, "P of x", 15, BLUE),
        attention_map(210, 80, 130, large_aug, ORANGE),
        text(275, 64, "T of xᵃ", 15, ORANGE),
        text(190, 254, "Both matrices are stored,\nand stored again for the backward:\nL · L numbers for every head."),
        text(190, 318, "sum (P - T)²", 16, GREEN, bold=True),
    ]
    for left, rows, colour, name in ((415, large, BLUE, "P of x"), (585, large_aug, ORANGE, "T of xᵃ")):
        tile = [row[2:4] for row in rows[2:4]]
        parts += [
            frame(left, 80, 130, 130, BORDER, dashed=True),
            frame(left, 80 + 32.5, 130, 32.5, "none", PALE[colour]),
            attention_map(left + 32.5, 80 + 32.5, 32.5, tile, colour),
            arrow(left + 70, 129, left + 122, 129, colour),
            text(left + 65, 64, name, 15, colour),
        ]
    parts += [
        frame(734, 80, 12, 130, GREEN, PALE[GREEN]),
        text(740, 64, "rows", 14, GREEN),
        text(
            580,
            254,
            "One tile of both views at a time.\nA few numbers are kept for each row:\n6 · L numbers for every head.",
        ),
        text(580, 318, "sum (P - T)²", 16, GREEN, bold=True),
    ]
    return picture(770, 350, "Whole attention matrices in plain PyTorch, and tiles of them in a fused kernel", *parts)


def flow() -> str:
    steps = (
        ("model", "a forward of your model", GREY),
        ("capture", "tap → Record → Site.read → reading", BLUE),
        ("regularizers", "Regularizer.term(reading)", BLUE),
        ("functional", "checks → AttentionProblem", BLUE),
        ("ops", "Operator: backend, autograd", BLUE),
        ("csrc", "kernel: sums and row statistics", ORANGE),
        ("ops, functional", "reduction → term", BLUE),
        ("attachment", "sum of weight · term → ear.loss()", GREEN),
    )
    parts = [text(340, 30, "forward", 16, GREY, bold=True), text(466, 30, "backward", 16, GREEN, bold=True)]
    for number, (room, what, colour) in enumerate(steps):
        top = 50 + number * 62
        parts += [box(200, top, 400, 44, what, colour), text(188, top + 22, room, 15, colour, "end", bold=True)]
        if number:
            parts += [
                arrow(360, top - 18, 360, top - 2),
                arrow(440, top - 1, 440, top - 16, GREEN, 2, dashed=True),
            ]
    parts += [
        text(618, 72, "gradients of Q and K\nreach the weights", 14, GREEN, "start"),
        text(618, 320, "Operator calls the\nbackward kernel", 14, GREEN, "start"),
        text(618, 382, "row statistics\nare read again", 14, GREEN, "start"),
        text(618, 506, "loss.backward()\nstarts here", 14, GREEN, "start"),
    ]
    return picture(790, 560, "How a tensor flows from a model to a kernel, and how its gradient flows back", *parts)


PICTURES = {"push-and-pull": push_and_pull, "capture": capture, "kernel": kernel, "flow": flow}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw(), encoding="utf-8")
