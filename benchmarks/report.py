"""Make tables and plots of committed results.

    ear-ops bench report benchmarks/results/NAME.json [--plot benchmarks/results/NAME.png]

The script prints Markdown tables, with a row for each case of the losses and for each way to make a training step. It
also prints the straight line that fits the memory of `qk_attention_mse` over L. The plot shows its time and memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from presets import PRESETS

from ear_ops.recipes.drawing import COLOURS, MARKERS, PAGE_WIDTH, figure

ORDER = ("fused", "eager", "compile")


def cases(rows: list[dict]) -> dict[tuple[str, ...], dict[str, dict]]:
    """Group the rows by (op, preset, dtype, mode), and then by provider."""
    grouped: dict[tuple[str, ...], dict[str, dict]] = defaultdict(dict)
    for row in rows:
        grouped[row["op"], row["preset"], row["dtype"], row["mode"]][row["provider"]] = row
    return grouped


def cell(row: dict | None) -> str:
    return "-" if row is None else f"{row['median_ms']:.3g} ms {'✓' if row['correct'] else '✗'}"


def markdown(rows: list[dict]) -> str:
    lines = [
        "| op | preset | dtype | what | fused | eager | `torch.compile` | eager ÷ fused | compile ÷ fused | memory | "
        "of the limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (op, preset, dtype, mode), by in cases(rows).items():
        fused = by["fused"]
        ratios = [
            f"{by[name]['median_ms'] / fused['median_ms']:.1f}x" if name in by else "-" for name in ("eager", "compile")
        ]
        memory = f"{fused['extra_bytes'] / 2**20:.3g} MiB"
        if "eager" in by:
            memory += f" (eager {by['eager']['extra_bytes'] / 2**20:.0f})"
        share = f"{fused['fraction_of_limit']:.2f} ({fused['bound_by']})"
        cells = [op, preset, dtype, mode, *(cell(by.get(name)) for name in ORDER), *ratios, memory, share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_markdown(rows: list[dict]) -> str:
    lines = ["| training step on | dtype | way | median | of `ear` | memory |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["data"], row["dtype"], row["provider"], f"{row['median_ms']:.0f} ms"]
        cells += [f"{row['this_over_ear']:.2f}x", f"{row['extra_bytes'] / 2**20:.0f} MiB"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_length(rows: list[dict]) -> dict[tuple[str, str], list[tuple[int, float, float]]]:
    """Return (L, ms, MiB) of `qk_attention_mse` with backward, by (dtype, provider), in ascending order of L."""
    points: dict[tuple[str, str], list[tuple[int, float, float]]] = defaultdict(list)
    for row in rows:
        if row["op"] == "qk_attention_mse" and row["preset"].startswith("long-") and row["mode"] != "forward":
            point = (row["length"], row["median_ms"], row["extra_bytes"] / 2**20)
            points[row["dtype"], row["provider"]].append(point)
    return {key: sorted(measured) for key, measured in points.items()}


def memory_lines(rows: list[dict]) -> str:
    """Fit a line to the memory of the fused loss over L, by least squares. Also say how far off a point is at most."""
    lines = []
    for (dtype, provider), points in against_length(rows).items():
        if provider != "fused" or len(points) < 3:
            continue
        lengths, _, memory = zip(*points, strict=True)
        slope, intercept = statistics.linear_regression(lengths, memory)
        off = max(abs(m - intercept - slope * n) / m for n, m in zip(lengths, memory, strict=True))
        lines.append(
            f"Memory of qk_attention_mse, {dtype}, L = {', '.join(map(str, lengths))}: "
            f"{intercept:.2f} MiB + {1024 * slope:.2f} KiB · L, within {100 * off:.1f}%"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw time and memory against L, a colour for each provider; the dashed lines are the second dtype."""
    points_of = against_length(rows)
    dtypes = list(dict.fromkeys(dtype for dtype, _ in points_of))
    providers = list(dict.fromkeys(provider for _, provider in points_of))
    preset = PRESETS["long-512"]
    with figure(path, PAGE_WIDTH, 3.2) as drawn:
        axes = drawn.subplots(1, 2)
        for (dtype, provider), points in points_of.items():
            lengths, times, memory = zip(*points, strict=True)
            number = providers.index(provider)
            style = {"color": COLOURS[number], "marker": MARKERS[number], "label": f"{provider}, {dtype}"}
            style["linestyle"] = "--" if dtypes.index(dtype) else "-"
            axes[0].plot(lengths, times, **style)
            axes[1].plot(lengths, memory, **style)
        labels = "forward + backward, ms", "memory beyond inputs and gradients, MiB"
        for axis, label in zip(axes, labels, strict=True):
            axis.set(xscale="log", yscale="log", xlabel="L", ylabel=label)
            axis.grid(True, alpha=0.3)
        axes[0].set_title(f"qk_attention_mse, {preset.pairs}x{preset.heads}xLx{preset.dim}")
        axes[1].legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--mode", help="only `forward` or `forward+backward`")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = [row for path in options.results for row in json.loads(path.read_text())["rows"]]
    losses = [row for row in rows if "preset" in row and options.mode in (None, row["mode"])]
    steps = [row for row in rows if row["op"] == "training step"]
    parts = [table(shown) for table, shown in ((markdown, losses), (step_markdown, steps)) if shown]
    print("\n\n".join(filter(None, [*parts, memory_lines(losses)])))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
