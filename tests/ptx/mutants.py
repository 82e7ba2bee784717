"""Breaks the kernels on purpose and asks which check catches it.

    python tests/ptx/mutants.py                    all, and writes benchmarks/results/ptx/mutants.md
    python tests/ptx/mutants.py --only TEXT        those whose name or place holds TEXT; writes nothing

A mutant is one change of ``csrc/cuda``: of an instruction in ``primitives.cuh``, or a barrier, wait or commit that is
left out at one place where it is called. One that no check catches must have a reason in ``SURVIVORS``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from ptx.checks import Check, checks, primitives
from ptx.compiler import SOURCES, CompileError, Compiler
from ptx.device import in_place_of_cpu_kernels
from ptx.faults import Fault

ROOT = Path(__file__).parents[2]
LOG = ROOT / "benchmarks" / "results" / "ptx" / "mutants.md"
ARCHITECTURE = "sm_90"
HEAD = """# Kernels that were broken on purpose

Written by `make ptx-mutants`. Each row is one change of `csrc/cuda`; the check is the first that caught it. Of {count}
mutants {survivors} survive, for the reasons that they show.

| what was broken | where | caught by | what it said |
|---|---|---|---|
"""

ATTENTION = (
    "qk bfloat16 short rows, masks",
    "qk bfloat16 65 queries, 128 keys",  # short rows without a mask, whose copies no clearing follows
    "qk bfloat16 long rows, masks",
    "qk bfloat16 NaN in 40 keys padded left",
    "qk bfloat16 NaN in 140 keys padded left",
    "qk float16 short rows, masks",
    "qk float32 short rows, masks",
    "qk float32 long rows, masks",
    "qk float32 NaN in 40 keys padded left",
    "qk bfloat16 dim 160",
    "qk bfloat16 chunks, masks",
)
OTHERS = (
    "maps bfloat16 200 keys",
    "pooled bfloat16 130 tokens, 100 features",
    "pooled float32 300 tokens, 64 features",
)
HOPPER = (
    "hopper bfloat16 forward",
    "hopper float16 forward",
    "hopper bfloat16 forward, masks",
    "hopper bfloat16 forward, dim 128",
    "hopper bfloat16 backward",
    "hopper float16 backward",
)
WORDS = (
    "words bfloat16 mse, padding",
    "words bfloat16 kl, padding",
    "words float32 mse, padding",
    "words bfloat16 strips",
    "words bfloat16 chunks",
    "words bfloat16 many pieces",
)
# by how the name of the file begins
CHECKS = {
    "hopper": HOPPER,
    "qk_hopper_backward": HOPPER[-2:],
    "qk_hopper": HOPPER,
    "primitives.cuh": (*ATTENTION, *OTHERS),
    "qk_word": WORDS,
    "qk": ATTENTION,
    "split": ATTENTION,
    "mean": ("mean float32 mse, masks",),
    "": OTHERS,
}


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    at: int  # where the old text begins
    element: str = ""  # whose checks are tried first

    @property
    def place(self) -> str:
        text = (SOURCES / "cuda" / self.file).read_text()
        return f"{self.file}:{text[: self.at].count(chr(10)) + 1}"

    def write(self, folder: Path) -> Path:
        """A copy of the sources with this change."""
        sources = folder / "csrc"
        shutil.copytree(SOURCES, sources)
        path = sources / "cuda" / self.file
        text = path.read_text()
        path.write_text(text[: self.at] + self.new + text[self.at + len(self.old) :])
        return sources


# --- what is broken -------------------------------------------------------------------------------------------------


def instruction_mutants() -> Iterator[Mutant]:
    file = "primitives.cuh"
    text = (SOURCES / "cuda" / file).read_text()

    def mutant(name: str, old: str, new: str, after: str = "") -> Mutant:
        """``after``: text that comes before the place."""
        at = text.index(old, text.index(after))
        element = re.search(r"mma of (\w+)", name)
        return Mutant(name, file, old, new, at, element[1] if element else "")

    yield mutant("sync_block does nothing", "{ __syncthreads(); }", "{}")
    yield mutant("sync_warp does nothing", "{ __syncwarp(); }", "{}")
    yield mutant("shuffle_xor with another lane", "value, lanes);", "value, lanes ^ 4);")
    yield mutant("ballot of the opposite", "(0xffffffffu, vote)", "(0xffffffffu, !vote)")
    yield mutant("cp.async of 16 bytes ignores the number of bytes", "[%1], 16, %2;", "[%1], 16;")
    yield mutant("cp.async of 4 bytes ignores the number of bytes", "[%1], %2, %3;", "[%1], %2;")
    yield mutant("cp.async of 4 bytes brings nothing", '"n"(kBytes), "r"(bytes)', '"n"(kBytes), "r"(0)')
    yield mutant("cp.async of 16 bytes brings nothing", '"l"(global), "r"(bytes)', '"l"(global), "r"(0)')
    yield mutant("commit_group left out", 'asm volatile("cp.async.commit_group;" ::: "memory");', "")
    yield mutant("wait_group leaves one group more", '"n"(kGroups) : "memory"', '"n"(kGroups + 1) : "memory"')
    yield mutant("wait_group left out", 'asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");', "")
    for name, start in (("transposed", "if constexpr (kTranspose)"), ("straight", "m8n8.x4.shared.b16")):
        for i in range(3):
            old = f'"=r"(to[{i}]), "=r"(to[{i + 1}])'
            new = f'"=r"(to[{i + 1}]), "=r"(to[{i}])'
            yield mutant(f"ldmatrix, {name}: results {i} and {i + 1} change places", old, new, start)
    yield mutant("ldmatrix without .trans", "x4.trans.shared", "x4.shared")
    yield mutant("ldmatrix with .trans", "x4.shared.b16", "x4.trans.shared.b16")
    for element, type_name in (("bfloat16", "bfloat16"), ("float16", "float16")):
        start = f"void multiply_add({type_name}, float"
        for i in range(3):
            old, new = f'"r"(a[{i}]), "r"(a[{i + 1}])', f'"r"(a[{i + 1}]), "r"(a[{i}])'
            yield mutant(f"mma of {element}: a{i} and a{i + 1} change places", old, new, start)
            old, new = f'"+f"(c[{i}]), "+f"(c[{i + 1}])', f'"+f"(c[{i + 1}]), "+f"(c[{i}])'
            yield mutant(f"mma of {element}: c{i} and c{i + 1} change places", old, new, start)
        yield mutant(f"mma of {element}: b0 and b1 change places", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)', start)
        yield mutant(f"mma of {element}: the sum goes astray", "{%0,%1,%2,%3};", "{%1,%0,%2,%3};", start)
    yield mutant("mma of bfloat16 with float16", "f32.bf16.bf16.f32", "f32.f16.f16.f32")
    yield mutant("mma of float16 with bfloat16", "f32.f16.f16.f32", "f32.bf16.bf16.f32")
    for function in ("ex2", "lg2", "rcp"):
        yield mutant(f"{function} of -x", '"=f"(y) : "f"(x)', '"=f"(y) : "f"(-x)', f"{function}.approx")
    for element, kind in (("bfloat16", "bf16x2"), ("float16", "f16x2")):
        old, new = '"f"(second), "f"(first)', '"f"(first), "f"(second)'
        yield mutant(f"{kind}: halves change places", old, new, f"pack_two({element}, float")
        yield mutant(f"{kind} rounded towards zero", f"cvt.rn.{kind}", f"cvt.rz.{kind}")
    yield mutant("bfloat16 rounded towards zero", "__float2bfloat16_rn", "__float2bfloat16_rz")
    yield mutant("float16 rounded towards zero", "__float2half_rn", "__float2half_rz")


def hopper_mutants() -> Iterator[Mutant]:
    """Of the instructions for Hopper, and of how their kernel takes turns."""
    for file, changes in HOPPER_CHANGES.items():
        text = (SOURCES / "cuda" / file).read_text()
        for name, (old, new) in changes.items():
            yield Mutant(name, file, old, new, text.index(old), "float16" if "float16" in name else "bfloat16")


_SUMS_0_AND_1 = '"+f"(c[0][0]), "+f"(c[0][1])', '"+f"(c[0][1]), "+f"(c[0][0])'
HOPPER_CHANGES: dict[str, dict[str, tuple[str, str]]] = {
    "hopper.cuh": {
        "uniform: another lane's number": ("number, 0);", "number, 0) + 1;"),
        "align_tiles: to 128 bytes": ("& 1023u", "& 127u"),
        "mbarrier.init for one arrival more": ('"r"(arrivals)', '"r"(arrivals + 1)'),
        "mbarrier.init left out": ("mbarrier.init.shared::cta.b64 [%0], %1;", ""),
        "fence.mbarrier_init left out": ("fence.mbarrier_init.release.cluster;", ""),
        "mbarrier.arrive left out": ("mbarrier.arrive.shared::cta.b64 _, [%0];", ""),
        "mbarrier.arrive.expect_tx left out": ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;", ""),
        "mbarrier.arrive.expect_tx expects nothing": ('"r"(bytes)', '"r"(0)'),
        "mbarrier.try_wait of the other parity": ('"r"(parity)', '"r"(parity ^ 1)'),
        "mbarrier.try_wait is not repeated": ("while (!ended)", "while (false)"),
        "cp.async.bulk.tensor left out": ('"cp.async.bulk', '"// cp.async.bulk'),
        "cp.async.bulk.tensor: feature and row change places": ("{%2, %3, %4, %5}", "{%3, %2, %4, %5}"),
        "cp.async.bulk.tensor: head and batch change places": ("{%2, %3, %4, %5}", "{%2, %3, %5, %4}"),
        "cp.async.bulk.tensor counts at its tile": ("[%6];", "[%0];"),
        "descriptor: groups of rows overlap": ("kGroupBytes = 8 *", "kGroupBytes = 4 *"),
        "descriptor: another leading offset": ("uint64_t(1) << 16", "uint64_t(2) << 16"),
        "further: half as far": ("bytes >> 4)", "bytes >> 5)"),
        "wgmma.fence left out": ("wgmma.fence.sync.aligned;", ""),
        "wgmma.commit_group left out": ("wgmma.commit_group.sync.aligned;", ""),
        "wgmma.wait_group left out": ("wgmma.wait_group.sync.aligned 0;", ""),
        "wgmma.wait_group leaves a group": ("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"),
        "wait_products does not hold reads back": ('asm volatile("" : "+f"(sums[v][n][e])::"memory");', ";"),
        "wgmma always adds": ("setp.ne.b32 adds, %34, 0", "setp.ne.b32 adds, 1, 0"),
        "wgmma never adds": ("setp.ne.b32 adds, %34, 0", "setp.ne.b32 adds, 0, 0"),
        "wgmma: factors change places": ('"l"(a), "l"(b)', '"l"(b), "l"(a)'),
        "wgmma: sums 0 and 1 change places": _SUMS_0_AND_1,
        "wgmma: sums 1 and 2 change places": ('"+f"(c[0][1]), "+f"(c[0][2])', '"+f"(c[0][2]), "+f"(c[0][1])'),
        "wgmma of weights starts anew": ("setp.ne.b32 adds, 1, 0", "setp.ne.b32 adds, 0, 0"),
        "wgmma of weights: a0 and a1 change places": ('"r"(a[0]), "r"(a[1])', '"r"(a[1]), "r"(a[0])'),
        "wgmma of weights: a1 and a2 change places": ('"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'),
        "wgmma of weights, bfloat16 with float16": ('EAR_OPS_WEIGHTED("bf16")', 'EAR_OPS_WEIGHTED("f16")'),
        "wgmma of weights, float16 with bfloat16": ('EAR_OPS_WEIGHTED("f16")', 'EAR_OPS_WEIGHTED("bf16")'),
        "setmaxnreg of more registers than there are": ('"n"(kRegisters)', '"n"(kRegisters + 16)'),
        "wgmma of bfloat16 with float16": ('EAR_OPS_PRODUCT("bf16")', 'EAR_OPS_PRODUCT("f16")'),
        "wgmma of float16 with bfloat16": ('EAR_OPS_PRODUCT("f16")', 'EAR_OPS_PRODUCT("bf16")'),
    },
    "qk_hopper.cuh": {
        "empty: one arrival is enough": ("init_barrier(empty(stage), kConsumers)", "init_barrier(empty(stage), 1)"),
        "full: its bytes are those of one view": ("arrive_expecting(barrier, 2 * ", "arrive_expecting(barrier, "),
        "a turn never changes the parity": ("parity ^= 1;", ""),
        "the copies wait for the other parity": ("turn.parity ^ 1", "turn.parity"),
        "a stage is given back before its products are done": (
            "    wait_products(scores);\n    if (thread_index() % kWarp == 0) arrive(R::empty(turn.stage));\n",
            "    if (thread_index() % kWarp == 0) arrive(R::empty(turn.stage));\n    wait_products(scores);\n",
        ),
        "a stage is given back by nobody": ("if (thread_index() % kWarp == 0) arrive(R::empty(turn.stage));", ""),
        "a stage is given back by every lane": ("if (thread_index() % kWarp == 0) arrive(R::empty", "arrive(R::empty"),
        "products do not wait for a stage": ("wait_phase(R::full(turn.stage), turn.parity);", ""),
        "products do not wait for the queries": ("wait_phase(R::owned_full(), 0);", ""),
        "copies do not wait for a stage": ("wait_phase(R::empty(turn.stage), turn.parity ^ 1);", ""),
    },
    "qk_hopper_backward.cuh": {
        "gradients: a stage is given back before its products are done": (
            "    wait_products(gradient);\n    keep(weights);\n"
            "    if (thread_index() % kWarp == 0) arrive(R::empty(turn.stage));\n",
            "    if (thread_index() % kWarp == 0) arrive(R::empty(turn.stage));\n"
            "    wait_products(gradient);\n    keep(weights);\n",
        ),
        "gradients: nobody waits for scores": ("wait_products(scores);", ""),
        "gradients: nobody waits for the sums": ("wait_products(gradient);", ""),
        "gradients: nobody waits for a stage": ("wait_phase(R::full(turn.stage), turn.parity);", ""),
        "gradients: nobody waits for owned vectors": ("wait_phase(R::owned_full(), 0);", ""),
        "gradients: copies do not wait for a stage": ("wait_phase(R::empty(turn.stage), turn.parity ^ 1);", ""),
        "gradients: no registers are given": ("give_registers<24>();", ""),
        "gradients: no registers are taken": ("take_registers<240>();", ""),
        "gradients: the weights are not kept": ("keep(weights);", ""),
    },
}


def order_mutants() -> Iterator[Mutant]:
    """Every barrier, wait and commit, left out where it is called; every wait for one group less."""
    for path in sorted((SOURCES / "cuda").glob("*.cuh")):
        if path.name in ("primitives.cuh", "hopper.cuh"):
            continue
        count: Counter[str] = Counter()
        element = "float32" if path.name.startswith("split") else ""
        waits = r"sync_block|sync_warp|commit_copies|wait_copies<(\d)>|publish_barriers|begin_products|commit_products"
        calls = re.finditer(rf"\b({waits})\(\);", path.read_text())
        for call in calls:
            count[call[1]] += 1
            name = f"{path.stem}, {call[1]} number {count[call[1]]}"
            yield Mutant(f"{name}: left out", path.name, call[0], ";", call.start(), element)
            if call[2]:
                later = f"wait_copies<{int(call[2]) + 1}>();"
                yield Mutant(f"{name}: one group more is left", path.name, call[0], later, call.start(), element)


_FOR_THE_COMPILER = "It binds the compiler alone, which does not move reads of the sums here even without it."
SURVIVORS = {
    "wait_products does not hold reads back": _FOR_THE_COMPILER,
    "gradients: the weights are not kept": (
        "It binds the compiler alone: in PTX no register is used for two things, so nothing writes over the weights."
    ),
    "descriptor: another leading offset": "Under a swizzle of 128 bytes, rows of 128 bytes do not use it.",
    "gradients: no registers are taken": "It lets ptxas use more registers; PTX has as many as it wants.",
    "qk_backward, sync_warp number 3: left out": (
        "It orders no memory: it keeps the compiler from making both gradients at a time, which takes registers."
    ),
    "qk_words_backward, sync_warp number 1: left out": (
        "It orders no memory: it keeps the compiler from multiplying more at a time, which takes registers."
    ),
    "qk_word_scores, sync_warp number 1: left out": (
        "It orders no memory: it keeps the compiler from loading the statistics of both views, which takes registers."
    ),
    "qk_word_tokens, sync_block number 3: left out": (
        "Every call comes after a barrier of its caller today; forget() does not rely on that."
    ),
    "split_products, sync_warp number 2: left out": (
        "It orders no memory: it keeps the compiler from loading far ahead, which takes registers."
    ),
}
"""Why a mutant changes nothing that matters, by its name."""


# --- what catches it ------------------------------------------------------------------------------------------------


@cache
def checks_by_name() -> dict[str, Check]:
    return {check.name: check for check in checks()}


def caught_by(mutant: Mutant, compiler: Compiler) -> tuple[str, str] | None:
    """The first check that fails, and what it says."""
    if mutant.file == "primitives.cuh":
        try:
            primitives(compiler)
        except (AssertionError, Fault) as error:
            return "primitives", first_line(error)
    names = next(names for start, names in CHECKS.items() if mutant.file.startswith(start))
    for name in sorted(names, key=lambda name: mutant.element not in name.split()):
        try:
            with in_place_of_cpu_kernels(compiler):
                checks_by_name()[name].run()
        except (AssertionError, Fault) as error:
            return name, first_line(error)
    return None


def first_line(error: Exception) -> str:
    return f"{error}".partition("\n")[0].partition(", in _Z")[0].replace("|", "/")


def row_of(mutant: Mutant) -> tuple[str, bool]:
    """A row of the log, and whether all is as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(ARCHITECTURE, Path(folder), mutant.write(Path(folder)))
        try:
            caught = caught_by(mutant, compiler)
        except CompileError:
            return f"| {mutant.name} | `{mutant.place}` | nvcc | IT DOES NOT COMPILE, so it breaks nothing |", False
    reason = SURVIVORS.get(mutant.name)
    check, words = caught or ("survives", reason or "NO REASON IS GIVEN")
    if caught and reason:
        words = f"CAUGHT, though a reason to survive is given. {words}"
    return f"| {mutant.name} | `{mutant.place}` | {check} | {words} |", (caught is None) == (reason is not None)


def try_all(
    description: str | None,
    mutants: Sequence[Mutant],
    row_of: Callable[[Mutant], tuple[str, bool]],
    log: Path,
    head: str,
) -> None:
    """The command line: tries the mutants, prints their rows, and writes the log where none was left out.

    Args:
        row_of: the row of a mutant, and whether all is as it should be.
        head: of the log, with places for the ``count`` of mutants and of ``survivors``.

    Raises:
        SystemExit: a mutant survived without a reason, or was caught in spite of one.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="text in the name or place of the mutants to try")
    options = parser.parse_args()
    wanted = [mutant for mutant in mutants if options.only in f"{mutant.name} {mutant.place}"]
    rows, bad = [], 0
    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for row, good in pool.map(row_of, wanted):
            print(row, flush=True)
            rows.append(row)
            bad += not good
    if not options.only:
        log.parent.mkdir(parents=True, exist_ok=True)
        survivors = sum("| survives" in row for row in rows)
        log.write_text(head.format(count=len(rows), survivors=survivors) + "\n".join(rows) + "\n")
    if bad:
        raise SystemExit(f"{bad} mutants did not fare as they should")


if __name__ == "__main__":
    try_all(__doc__, [*instruction_mutants(), *hopper_mutants(), *order_mutants()], row_of, LOG, HEAD)
