"""Print what the issue model says of the attention kernels on an H100, beside the memory floor, as a Markdown table.

    python csrc/cuda/model_table.py [--out FILE]

What the model is, and what it is not: docs/contributing/kernel-model.md. It needs nvcc and nvdisasm, and no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from check_build import HOPPER, built, cases_of, demangled, ptxas_version  # noqa: E402
from sass import counts, issue  # noqa: E402
from sass.counts import MSE, Case  # noqa: E402

ARCHITECTURE = "90"
PAPER = (32, 12, 128)
PASSES = ("forward", "backward")
DIVERGENCES = "qk_divergences_bfloat16_64.cu"
COMPARISONS = {"kKl": "KL", "kJs": "JS", "kScores": "scores"}  # but the MSE
# Of each call its file, its comparison as in csrc/comparison.h, and its sizes.
CALLS = [
    *(("qk_bfloat16_64.cu", MSE, Case(name, *PAPER, kind)) for kind in ("plain", "padded") for name in PASSES),
    *((DIVERGENCES, comparison, Case(name, *PAPER, "plain")) for comparison in COMPARISONS for name in PASSES),
    *(("qk_float_64.cu", MSE, Case(name, *PAPER, "plain")) for name in PASSES),
    *(("qk_bfloat16_64.cu", MSE, Case(name, 1, 12, 4096, "plain")) for name in PASSES),
    *((HOPPER, MSE, Case(name, 1, 12, 4096, "plain")) for name in PASSES),
]
KINDS = (*counts.OPCODES, counts.OTHER)


def rows_of(name: str) -> list[tuple[str, Case, str]]:
    """A row for each call of one file, without the outer bars, behind its comparison and sizes."""
    rows = []
    hopper = name == HOPPER
    architecture = "90a" if hopper else ARCHITECTURE
    device = issue.DEVICES[architecture]
    with built(HERE / name if hopper else HERE / "instances" / name, architecture) as file:
        if file.kernels is None:
            raise SystemExit("there is no nvdisasm: pip install nvidia-cuda-nvdisasm")
        hosts = {host.comparison: host for host, *_ in cases_of(file.source)}
        launchers = {comparison: host.build(file.objects, file.objects.parent) for comparison, host in hosts.items()}
        for comparison, case in ((comparison, case) for source, comparison, case in CALLS if source == name):
            element, features = hosts[comparison].element, hosts[comparison].features
            launches = counts.launches_of(launchers[comparison], case, features, device)
            result = counts.count(case, launches, file.kernels, file.registers, architecture)
            best, worst = (1e6 * total / device.hertz for total in (result.best_cycles, result.worst_cycles))
            floor = 1e6 * result.bytes / device.bytes_per_second
            kernels = ", ".join(f"`{demangled(kernel).partition('<')[0]}`" for kernel in result.kernels)
            spills = sum(file.spills[kernel][1] for kernel in result.kernels)
            shape = f"{case.pairs}x{case.heads}x{case.length}x{features}"
            compared = COMPARISONS.get(comparison, "squared error")
            cells = [compared, element, case.pass_, case.kind, shape, kernels, f"{best:.1f} to {worst:.1f}"]
            cells += [f"{floor:.1f}"]
            cells += [f"{result.warp:,}", f"{result.instructions:,.0f}"]
            cells += [f"{result.kinds.get(kind, 0):.0f}" for kind in KINDS]
            rows.append((comparison, case, " | ".join([*cells, str(spills)])))
    return rows


def table() -> Iterator[str]:
    heads = [
        "comparison",
        "dtype",
        "pass",
        "masks",
        "shape",
        "kernels",
        "µs",
        "memory floor, µs",
        "instructions of a warp",
    ]
    heads += ["for a tile", *KINDS, "spilled bytes"]
    yield f"ptxas {ptxas_version()}, sm_{ARCHITECTURE}"
    yield ""
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    names = list(dict.fromkeys(name for name, *_ in CALLS))
    with ProcessPoolExecutor(len(names)) as pool:
        rows = dict(zip(names, pool.map(rows_of, names), strict=True))
    for name, comparison, case in CALLS:
        yield from (f"| {row} |" for *of, row in rows[name] if of == [comparison, case])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table into this file too")
    options = parser.parse_args()
    lines = []
    for line in table():
        print(line, flush=True)
        lines.append(line)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
