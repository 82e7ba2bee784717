"""Leaves out the barriers, waits and commits of the kernels one by one, and asks which test on the host catches it.

    python tests/cuda_on_host/mutants.py                    all, and writes benchmarks/results/ptx/mutants-on-host.md
    python tests/cuda_on_host/mutants.py --only TEXT        those whose name or place holds TEXT; writes nothing

``tests/ptx/mutants.py`` makes the same changes for the interpreter. Its changes of instructions are not tried here,
because the host has functions of its own in the place of instructions (``primitives.h``). ``build.py`` must have run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from cuda_on_host.build import BUILD, HERE, LIBRARY, ROOT
from ptx.mutants import Mutant, order_mutants, try_all

LOG = ROOT / "benchmarks" / "results" / "ptx" / "mutants-on-host.md"
HEAD = """# Kernels without a barrier, on the host

Written by `python tests/cuda_on_host/mutants.py`. Each row is one change of `csrc/cuda`; the test is the first that
failed. Of {count} mutants {survivors} survive, for the reasons that they show. [`mutants.md`](mutants.md) has the same
changes under the interpreter of PTX, which checks each access for races, whatever the order of the threads.

| what was left out | where | caught by |
|---|---|---|
"""

# By how the name of the file begins: what is compiled again, and which tests run.
UNITS = {
    "block": (("kernels", "kernels_bfloat16"), "test_cuda_on_host.py", "bfloat16 or maps or pooled or attention"),
    "mean": (("kernels_mean",), "test_cuda_on_host.py", "averages"),
    "pooled": (("kernels",), "test_cuda_on_host.py", "pooled or others or anything"),
    "qk_hopper": (("kernels_hopper",), "test_cuda_on_host.py", "hopper"),
    "qk_word": (("kernels_words",), "test_words_on_host.py", ""),
    "qk": (("kernels_bfloat16",), "test_cuda_on_host.py", "bfloat16"),
    "split": (("kernels_float",), "test_cuda_on_host.py", "float32"),
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
    "qk_steps, sync_block number 1: left out": _NO_ORDER,
    "qk_steps, sync_block number 2: left out": _NO_ORDER,
    "qk_word_scores, sync_warp number 1: left out": _FOR_THE_COMPILER,
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
    units, file, chosen = next(unit for start, unit in UNITS.items() if mutant.file.startswith(start))
    with tempfile.TemporaryDirectory() as folder:
        library = build(mutant, units, Path(folder))
        arguments = [str(ROOT / "tests" / "ops" / file), "-x", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
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
    try_all(__doc__, list(order_mutants()), row_of, LOG, HEAD)
