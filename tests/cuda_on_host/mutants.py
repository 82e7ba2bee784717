"""Breaks the kernels on purpose, one change at a time, and asks which test on the host catches it.

    python tests/cuda_on_host/mutants.py                    all, and writes benchmarks/results/ptx/mutants-on-host.md
    python tests/cuda_on_host/mutants.py --only TEXT        those whose name or place holds TEXT; writes nothing

A mutant leaves out a barrier, wait or commit, as those of ``tests/ptx/mutants.py`` for the interpreter, or changes
what a comparison computes. Changes of instructions are not tried here, because the host has functions of its own in
the place of instructions (``primitives.h``). ``build.py`` must have run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from cuda_on_host.build import BUILD, HERE, LIBRARY, ROOT
from ptx.compiler import SOURCES
from ptx.mutants import Mutant, order_mutants, try_all

LOG = ROOT / "benchmarks" / "results" / "ptx" / "mutants-on-host.md"
HEAD = """# Kernels that were broken on purpose, on the host

Written by `python tests/cuda_on_host/mutants.py`. Each row is one change of `csrc/cuda`; the test is the first that
failed. Of {count} mutants {survivors} survive, for the reasons that they show. [`mutants.md`](mutants.md) has the
barriers, waits and commits under the interpreter of PTX, which checks each access for races, whatever the order of the
threads.

| what was broken | where | caught by |
|---|---|---|
"""

# By how the name of the file begins: what is compiled again, and which tests run.
UNITS = {
    "block": (("kernels", "kernels_bfloat16"), "test_kernels_on_host.py", "bfloat16 or maps or pooled or attention"),
    "mean": (("kernels_mean",), "test_averages_on_host.py", ""),
    "pooled": (("kernels",), "test_kernels_on_host.py", "pooled or others or anything"),
    "qk_hopper": (("kernels_hopper",), "test_kernels_on_host.py", "hopper"),
    "qk_word": (("kernels_words",), "test_words_on_host.py", ""),
    "qk": (("kernels_bfloat16",), "test_kernels_on_host.py", "bfloat16"),
    "split": (("kernels_float",), "test_kernels_on_host.py", "float32"),
}
COMPARISON_UNITS = (
    ("kernels_divergences_bfloat16", "kernels_divergences_float"),
    "test_comparisons_on_host.py",
    "bfloat16 or not float16",
)
# What KL, JS and squared scores compute, and how rows are gone over for them.
COMPARISON_CHANGES = {
    "kl: another ratio of sums does not move entries": (
        "qk_divergences.cuh",
        "kLogOf2 * risen + (logarithm[half] - log_before)",
        "kLogOf2 * risen",
    ),
    "kl: entries of equal views as of others": ("qk_divergences.cuh", "fabsf(log) < 0.5f ? near : far", "far"),
    "kl: entries of all views as of equal ones": ("qk_divergences.cuh", "fabsf(log) < 0.5f ? near : far", "near"),
    "kl: infinity times 0 in the value": (
        "qk_divergences.cuh",
        "x[n][odd] = fmaxf(logs[1] - logs[0], -1e30f);",
        "x[n][odd] = logs[1] - logs[0];",
    ),
    "kl: infinity times 0 in the gradient": (
        "qk_divergences.cuh",
        "const float x = fmaxf(logs[1] - logs[0], -1e30f);",
        "const float x = logs[1] - logs[0];",
    ),
    "js: log cosh of all views as of equal ones": ("qk_divergences.cuh", "near ? w * (0.08", "true ? w * (0.08"),
    "js: values of equal views as of others": ("qk_divergences.cuh", "near ? (p + t)", "false ? (p + t)"),
    "js: x has no bounds": ("qk_divergences.cuh", "fmaxf(fminf(log2, 30.0f), -30.0f)", "log2"),
    "js: the logarithm beside the larger maximum": (
        "qk_divergences.cuh",
        "fabsf(largest[0]) < fabsf(largest[1])",
        "fabsf(largest[0]) > fabsf(largest[1])",
    ),
    "js: the multiplier does not make up for the logarithm": (
        "qk_divergences.cuh",
        "reciprocal_fast(sums[v]) * exp2_fast(shift[v][half] - largest[v])",
        "reciprocal_fast(sums[v])",
    ),
    "js: a row that is no number does not show": (
        "qk_divergences.cuh",
        "quad_sum(f[half]) + no_number",
        "quad_sum(f[half])",
    ),
    "js: a row that is empty in one view has a gradient": ("qk_divergences.cuh", "both ? of_row : 0.0f", "of_row"),
    "two sweeps: the last tile is not measured": (
        "qk_forward.cuh",
        "if (step <= 1) rows",
        "if (step < last_step - 1 || !two_tiles) rows",
    ),
    "two sweeps: the first tile is not added": ("qk_forward.cuh", "last_step = two_tiles ? 2 : 1", "last_step = 1"),
    "short rows: the mask of the first tile for all": ("qk_vectors.cuh", "if (index == other)", "if (false)"),
    "short rows: infinity times 0 for keys": (
        "qk_backward_short.cuh",
        "{counts() && keys.real(v, key + half), counts() && keys.real(v, key + half + 8)}",
        "{keys.real(v, key + half), keys.real(v, key + half + 8)}",
    ),
    "short rows: infinity times 0 for queries": ("qk_backward_short.cuh", "if (!counts())", "if (false)"),
    "short rows: the factor of the MSE": (
        "qk_backward_short.cuh",
        "Compared::kFactor * a.scale",
        "Mse::kFactor * a.scale",
    ),
}

_FOR_THE_COMPILER = "It binds the compiler alone."
_NO_ORDER = (
    "No order of the threads that the tests draw changes a result. The interpreter, which looks at accesses, sees it."
)
SURVIVORS = {
    "qk_backward, sync_warp number 3: left out": _FOR_THE_COMPILER,
    "qk_words_backward, sync_warp number 1: left out": _FOR_THE_COMPILER,
    "split_products, sync_warp number 2: left out": _FOR_THE_COMPILER,
    "qk_backward_short, sync_block number 2: left out": _NO_ORDER,
    "qk_backward_short, sync_warp number 1: left out": _NO_ORDER,
    "qk_forward, sync_block number 4: left out": _NO_ORDER,
    "qk_hopper, publish_barriers number 1: left out": _NO_ORDER,
    "qk_hopper, begin_products number 1: left out": _NO_ORDER,
    "qk_hopper_backward, begin_products number 1: left out": _NO_ORDER,
    "js: a row that is empty in one view has a gradient": "Its gradient is a difference that is zero but for rounding.",
    "js: values of equal views as of others": "It loses about as many digits as rounding of the scores does.",
    "qk_steps, sync_block number 1: left out": _NO_ORDER,
    "qk_steps, sync_block number 2: left out": _NO_ORDER,
    "qk_word_scores, sync_warp number 1: left out": _FOR_THE_COMPILER,
    "qk_word_tokens, sync_block number 3: left out": (
        "Every call comes after a barrier of its caller today; forget() does not rely on that."
    ),
    "qk_word_tokens, sync_block number 4: left out": _NO_ORDER,
    "split_products, sync_warp number 1: left out": _NO_ORDER,
}
"""Why a mutant changes nothing that the host could see, by its name."""

RUN = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from support import cuda_on_host
cuda_on_host.LIBRARY = Path({library!r})
import pytest
raise SystemExit(pytest.main({arguments!r}))
"""


def comparison_mutants() -> Iterator[Mutant]:
    for name, (file, old, new) in COMPARISON_CHANGES.items():
        text = (SOURCES / "cuda" / file).read_text()
        yield Mutant(name, file, old, new, text.index(old))


def flags(name: str) -> list[str]:
    """Of the compiler (``cflags``) or linker (``ldflags``), as the build of the host wrote them down."""
    line = re.search(rf"^{name} = (.*)$", (BUILD / "build.ninja").read_text(), re.MULTILINE)
    assert line, f"build.ninja has no {name}"
    return shlex.split(line[1])


def build(mutant: Mutant, units: tuple[str, ...], folder: Path) -> Path:
    mutant.write(folder)
    here = folder / "tests" / HERE.name
    shutil.copytree(HERE, here, ignore=shutil.ignore_patterns("__pycache__"))
    changed = [folder / f"{unit}.o" for unit in units]
    for unit, result in zip(units, changed, strict=True):
        options = [option.replace(str(HERE), str(here)) for option in flags("cflags")]
        subprocess.run(["c++", *options, "-c", here / f"{unit}.cpp", "-o", result], check=True, capture_output=True)
    others = [path for path in sorted(BUILD.glob("*.o")) if path.stem not in units]
    library = folder / LIBRARY.name
    subprocess.run(["c++", *changed, *others, *flags("ldflags"), "-o", library], check=True, capture_output=True)
    return library


def caught_by(mutant: Mutant) -> str | None:
    """The first test that fails."""
    units, file, chosen = (
        COMPARISON_UNITS
        if mutant.name in COMPARISON_CHANGES
        else next(unit for start, unit in UNITS.items() if mutant.file.startswith(start))
    )
    with tempfile.TemporaryDirectory() as folder:
        library = build(mutant, units, Path(folder))
        path = ROOT / "tests" / "ops" / "on_host" / file
        arguments = [str(path), "-x", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
        arguments += ["-c", str(ROOT / "pyproject.toml"), *(["-k", chosen] if chosen else [])]
        program = RUN.format(tests=str(ROOT / "tests"), root=str(ROOT), library=str(library), arguments=arguments)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            run = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=600
            )
        except subprocess.TimeoutExpired:
            return "a test that never ends"
    failed = re.search(r"^FAILED \S*?::(.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    if failed:
        return f"`{failed[1]}`"
    assert run.returncode == 0, run.stdout + run.stderr
    return None


def row_of(mutant: Mutant) -> tuple[str, bool]:
    """A row of the log, and whether all is as it should be."""
    caught = caught_by(mutant)
    reason = SURVIVORS.get(mutant.name)
    words = caught or f"survives. {reason or 'NO REASON IS GIVEN'}"
    if caught and reason:
        words += ", though a reason to survive is given"
    return f"| {mutant.name} | `{mutant.place}` | {words} |", (caught is None) == (reason is not None)


if __name__ == "__main__":
    try_all(__doc__, [*order_mutants(), *comparison_mutants()], row_of, LOG, HEAD)
