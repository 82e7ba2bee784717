"""Make tables and plots of results.

    ear-ops bench report                    # of everything below benchmarks/results/speed
    ear-ops bench report FILE.json ...      # prints the tables of these files

A folder of `benchmarks/results/speed` holds the results of one kind of processor. Without files, the script draws
`speed` and `length` into each folder, as PNG and SVG, and writes all tables into `docs/benchmark-tables.md`.

`speed` shows how many times as long as the fused loss eager PyTorch and torch.compile take, forward and backward. Bars
below the line are cases that the fused loss loses. `length` shows time and memory of `qk_attention_mse` against L.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from limits import Limits, fastest
from operations import OPERATIONS
from presets import PRESETS

from ear_ops.recipes.drawing import COLOURS, MARKERS, PAGE_WIDTH, figure

ROOT = Path(__file__).parents[1]
SPEED = ROOT / "benchmarks" / "results" / "speed"
TABLES = ROOT / "docs" / "benchmark-tables.md"
ORDER = ("fused", "eager", "compile")
STEP_OPS = {"training step": "this_over_ear", "distillation step": "this_over_alone"}


def cases(rows: list[dict]) -> dict[tuple[str, ...], dict[str, dict]]:
    """Group the rows of losses by (op, preset, dtype, mode), and then by provider, in the order of the definitions."""
    grouped: dict[tuple[str, ...], dict[str, dict]] = defaultdict(dict)
    for row in (row for row in rows if row["op"] not in STEP_OPS):
        grouped[row["op"], row["preset"], row["dtype"], row["mode"]][row["provider"]] = row
    operations, presets = list(OPERATIONS), list(PRESETS)
    return dict(sorted(grouped.items(), key=lambda case: (operations.index(case[0][0]), presets.index(case[0][1]))))


def cell(row: dict | None) -> str:
    return "-" if row is None else f"{row['median_ms']:.3g} ms {'✓' if row['correct'] else '✗'}"


def loss_table(rows: list[dict]) -> str:
    """Return a table with a row for each case. The last column names the fastest way, in bold where it is not ours."""
    lines = [
        "| op | preset | dtype | what | fused | eager | `torch.compile` | eager ÷ fused | compile ÷ fused | "
        "MSE ÷ fused | memory | of the limit | fastest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (op, preset, dtype, mode), by in cases(rows).items():
        fused = by["fused"]
        ratios = [
            f"{by[name]['median_ms'] / fused['median_ms']:.1f}x" if name in by else "-" for name in ("eager", "compile")
        ]
        ratios.append(f"{fused['mse_over_this']:.2f}x" if "mse_over_this" in fused else "-")
        memory = f"{fused['extra_bytes'] / 2**20:.3g} MiB"
        if "eager" in by:
            memory += f" (eager {by['eager']['extra_bytes'] / 2**20:.0f})"
        share = f"{fused['fraction_of_limit']:.2f} ({fused['bound_by']})"
        winner = fastest(by.values())
        cells = [op, preset, dtype, mode, *(cell(by.get(name)) for name in ORDER), *ratios, memory, share]
        marked = "fused" if winner is fused else f"**{winner['provider']}**{'' if winner['correct'] else ' ✗'}"
        cells.append(marked if len(by) > 1 else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_table(rows: list[dict]) -> str:
    lines = ["| step | of | dtype | way | median | ratio | memory |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["op"], row.get("data") or row["preset"], row["dtype"], row["provider"]]
        cells += [f"{row['median_ms']:.0f} ms", f"{row[STEP_OPS[row['op']]]:.2f}x"]
        lines.append("| " + " | ".join([*cells, f"{row['extra_bytes'] / 2**20:.0f} MiB"]) + " |")
    return "\n".join(lines)


def tables(rows: list[dict]) -> str:
    losses = [row for row in rows if row["op"] not in STEP_OPS]
    steps = [row for row in rows if row["op"] in STEP_OPS]
    parts = [table(shown) for table, shown in ((loss_table, losses), (step_table, steps)) if shown]
    return "\n\n".join(filter(None, [*parts, memory_lines(losses)]))


def section(kind: str, results: list[dict]) -> str:
    """Return the section of a processor: what it is, its limits, the tables, and the commands that measured them."""
    facts = [result["facts"] for result in results]

    def values(name: str) -> str:
        return ", ".join(sorted({str(fact[name]) for fact in facts}))

    parts = [f"## {kind}"]
    described = (
        [values("device"), f"instruction set {values('cpu_isa')}"] if "cpu_isa" in facts[0] else [values("device")]
    )
    if "threads" in facts[0]:
        described.append(f"{values('threads')} threads")
    parts.append(f"{', '.join(described)}, torch {values('torch')}, ear_ops {values('ear_ops')}, {values('date')}.")
    if limits := [result["limits"] for result in results if "limits" in result]:
        best = Limits(
            highest(m["products"] for m in limits),
            highest(m["torch_products"] for m in limits),
            max(m["exponentials"] for m in limits),
            max(m["memory"] for m in limits),
        )
        parts.append(f"At best: {best}.")
    parts.append(tables([row for result in results for row in result["rows"]]))
    if commands := [fact["command"] for fact in facts if "command" in fact]:
        parts.append("\n".join(["```bash", *commands, "```"]))
    return "\n\n".join(parts)


def highest(rates: Iterable[dict[str, float]]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for by_dtype in rates:
        merged |= {dtype: max(rate, merged.get(dtype, 0.0)) for dtype, rate in by_dtype.items()}
    return merged


def page(root: Path) -> str:
    """Return the page with the tables of all processors, from the folders with their results."""
    parts = [
        "# Tables of the benchmarks",
        "`ear-ops bench report` makes this page from the results that are committed below `benchmarks/results/speed`.\n"
        "[Benchmarks](benchmarks.md) says what the columns mean. A bold name in the last column is a case that the "
        "fused loss loses, and ✗ behind it means that the error of the faster way is too large.",
    ]
    parts += [section(folder.name, read(folder)) for folder in folders(root)]
    return "\n\n".join(parts) + "\n"


def folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def read(folder: Path) -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


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


def plot_length(rows: list[dict], path: Path) -> None:
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


def speed_ups(rows: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the time of eager and of torch.compile over that of the fused loss, by dtype, case and way."""
    ratios: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (op, preset, dtype, mode), by in cases(rows).items():
        if op in ("qk_attention_mse", "distillation") and mode == "forward+backward" and len(by) > 1:
            fused = by["fused"]["median_ms"]
            ratios[dtype][preset] = {name: by[name]["median_ms"] / fused for name in ORDER[1:] if name in by}
    return ratios


def plot_speed(rows: list[dict], path: Path) -> None:
    """Draw the ratios of `speed_ups`: a part for each dtype, a group of bars for each preset."""
    of_dtype = speed_ups(rows)
    with figure(path, PAGE_WIDTH, 2.4) as drawn:
        parts = drawn.subplots(1, len(of_dtype), sharey=True, squeeze=False)[0]
        for axes, (dtype, by_preset) in zip(parts, of_dtype.items(), strict=True):
            for number, name in enumerate(ORDER[1:]):
                bars = [(i, by[name]) for i, by in enumerate(by_preset.values()) if name in by]
                places = [i + 0.4 * number - 0.2 for i, _ in bars]
                heights = [ratio - 1 for _, ratio in bars]
                drawn_bars = axes.bar(places, heights, 0.38, bottom=1, color=COLOURS[number + 1], label=name)
                axes.bar_label(drawn_bars, [f"{ratio:.2g}" for _, ratio in bars], fontsize=5, padding=1)
            axes.axhline(1, color=COLOURS[0], label="fused")
            axes.set(yscale="log", title=dtype)
            axes.set_xticks(range(len(by_preset)), list(by_preset), rotation=40, ha="right")
            axes.margins(y=0.12)
        ticks = [0.5, 1, 2, 5, 10, 20, 50]
        parts[0].set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
        parts[0].minorticks_off()
        parts[0].set_ylabel("time over that of fused")
        parts[-1].legend()


def renew(root: Path, tables_path: Path) -> None:
    """Draw the plots of every processor into its folder, and write the page with all tables."""
    for folder in folders(root):
        rows = [row for result in read(folder) for row in result["rows"]]
        if speed_ups(rows):
            plot_speed(rows, folder / "speed.png")
        if against_length(rows):
            plot_length(rows, folder / "length.png")
    tables_path.write_text(page(root), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*")
    options = parser.parse_args()
    if options.results:
        print(tables([row for path in options.results for row in json.loads(path.read_text())["rows"]]))
    else:
        renew(SPEED, TABLES)
        print(f"The plots are in {SPEED.relative_to(ROOT)}, and the tables in {TABLES.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
