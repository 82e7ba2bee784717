"""Two builds of ear_ops beside each other: whether their results are equal to the bit, and the ratio of their times.

    python benchmarks/compare_builds.py BASE_CHECKOUT NEW_CHECKOUT --rounds 30 --out FILE.json

Both checkouts need CPU kernels built in place. Each runs in a process of its own, through the public functions alone.
Where bits differ, both results are held against the base's reference in float64 (max |err| / max |ref|), and the exit
code is 1 if an error of the new build is larger; to float64 results of the base's reference, any difference is one.
Speed does not change the exit code; `--rounds 0` leaves it out. On a busy machine, take OMP_NUM_THREADS=1 and look at
processor time; a build against a copy of itself shows how far ratios stray. EAR_OPS_CPU_ISA chooses the instruction set
of both builds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pickle
import random
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from presets import PRESETS
from torch import Tensor

Case = dict[str, Any]  # one call of a loss, and of its backward where any input requires grad; see `AXES`

# The operators that are compared, and their differentiable inputs.
INPUTS = {"qk_attention_mse": ("query", "key"), "attention_mse": ("attn",), "pooled_distance": ("hidden",)}
WANTED = {"all": slice(None), "first": slice(1), "last": slice(-1, None), "alternate": slice(0, 4, 2), "none": slice(0)}
AXES: dict[str, tuple] = {  # the first value is the default; a loss that has no such argument ignores it
    "lengths": ((40, 40), (1, 1), (7, 7), (128, 128), (530, 530), (16, 64), (130, 70), (2, 4200)),  # queries, keys
    "dim": (32, 1, 8, 9, 16, 31, 33, 48, 63, 64, 65, 77, 80, 95, 96, 128, 384),
    "heads": ((2, 2), (4, 2), (6, 1)),  # of queries, of keys
    "mask": ("none", "ragged", "empty row", "gaps", "of queries too"),
    "bias": ("none", "float", "bool", "float per view", "bool per view"),
    "is_causal": (False, True),
    "window": (None, 1, 9, 100),
    "scale": (None, 0.5),
    "softcap": (None, 1.5),  # of the reference only
    "head_weights": (False, True),
    "reduction": ("mean", "padded_mean", "equations", "sum", "none"),
    "stacked": (True, False),  # both views in one tensor
    "layout": ("contiguous", "transposed", "every second"),
    "wanted": tuple(WANTED),  # the inputs that require grad
    "threads": (1, 2),
    "pairs": (3,),
}
DRAWN = {"cpu": 100, "reference": 40}  # random combinations for every loss and dtype
THREADS = torch.get_num_threads()
SHORTEST_SAMPLE = 20.0  # milliseconds of processor time: shorter calls are repeated within a sample
ACCEPTED_RATIO = 1.05
# The same build differs by as much as a tenth between processes, by where its memory happens to lie.
ROUNDS_OF_A_PROCESS = 3
# The large blocks that a call frees stay with the process, else timings are of pages that the system clears.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


def grid() -> list[Case]:
    """Every value of every axis by itself, and random combinations of all axes, the same in every run."""
    cases = []
    for op, dtype, backend in product(INPUTS, ("float32", "bfloat16", "float16", "float64"), DRAWN):
        changes: list[Case] = [{}, *({axis: value} for axis, values in AXES.items() for value in values[1:])]
        choose = random.Random(f"{op} {dtype} {backend}").choice
        changes += [{axis: choose(values) for axis, values in AXES.items()} for _ in range(DRAWN[backend])]
        cases += [{"op": op, "dtype": dtype, "backend": backend, **change} for change in changes]
    return cases


def workloads() -> list[Case]:
    """What is timed: real sizes, and sizes so small that the time is the overhead of a call."""
    cases = []
    for op in INPUTS:
        layout = "transposed" if op == "qk_attention_mse" else "contiguous"  # as models hand them over
        common = {"op": op, "backend": "cpu", "layout": layout, "threads": THREADS}
        paper = {"pairs": 32, "heads": (12, 12), "lengths": (128, 128), "dim": 768 if op == "pooled_distance" else 64}
        for mask, dtype, wanted in product(("none", "xnli"), ("bfloat16", "float32"), ("none", "all")):
            cases.append({**common, **paper, "mask": mask, "dtype": dtype, "wanted": wanted})
        cases.append({**common, "pairs": 2, "heads": (2, 2), "lengths": (8, 8), "dim": 8, "dtype": "float32"})
    return cases


# --- in the process of a build --------------------------------------------------------------------------------------


def prepare(case: Case, exact: bool = False) -> Callable[[], dict[str, Tensor]]:
    """The call that a case describes, on inputs that are the same in every process; `exact`: the same in float64.

    It returns the loss and the gradients. The second view is the first with noise, as that of a model is.
    """
    import ear_ops

    values = SimpleNamespace(**{axis: choices[0] for axis, choices in AXES.items()} | case)
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    op, pairs, (queries, keys), (heads, key_heads) = values.op, values.pairs, values.lengths, values.heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def of_views(name: str, both: Tensor) -> dict[str, Tensor]:
        return {name: both} if values.stacked else {name: both[:pairs], f"{name}_aug": both[pairs:]}

    def mask_of(length: int) -> Tensor:
        if values.mask == "gaps":
            return draw(2 * pairs, length) > -0.5
        real = (torch.sigmoid(draw(2 * pairs, 1)) * length).ceil()
        if values.mask == "empty row":
            real[0] = 0
        elif values.mask == "xnli":
            real = torch.tensor(PRESETS["xnli"].lengths()).T.reshape(-1, 1)
        return torch.arange(length) < real

    shapes: dict[str, tuple[int, ...]] = {"attn": (heads, queries, keys), "hidden": (keys, values.dim)}
    shapes |= {"query": (heads, queries, values.dim), "key": (key_heads, keys, values.dim)}
    inputs: dict[str, Tensor] = {}
    for name in INPUTS[op]:
        first, noise = draw(pairs, *shapes[name]), draw(pairs, *shapes[name])
        both = torch.cat([first, first + 0.3 * noise])
        both = (both.softmax(-1) if name == "attn" else both).to(getattr(torch, values.dtype))
        inputs |= of_views(name, both.double() if exact else both)
    for name, tensor in inputs.items():
        if values.layout == "transposed":
            inputs[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        elif values.layout == "every second":  # the last dimension is not dense
            inputs[name] = torch.stack([tensor, tensor], dim=-1)[..., 0]
    wanted = list(inputs)[WANTED[values.wanted]]
    sources = [inputs[name].requires_grad_() for name in wanted]

    options: dict[str, Any] = {"reduction": values.reduction, "backend": "reference" if exact else values.backend}
    if values.mask != "none":
        options |= of_views("attention_mask", mask_of(keys))
    if values.mask == "of queries too" and op != "pooled_distance":
        options |= of_views("query_mask", mask_of(queries))
    if values.head_weights and op != "pooled_distance":
        options["head_weights"] = draw(heads).float().clamp(min=0)  # a zero leaves a head out
    if op == "qk_attention_mse":
        options |= {name: getattr(values, name) for name in ("is_causal", "window", "scale")}
        options["softcap"] = values.softcap if values.backend == "reference" else None
        if values.bias != "none":
            per_view = values.bias.endswith("per view")
            bias = draw(2 * pairs if per_view else 1, heads, queries, keys).float()
            bias = bias > -1 if values.bias.startswith("bool") else bias.masked_fill(bias > 1.5, -math.inf)
            options |= of_views("attn_bias", bias) if per_view else {"attn_bias": bias}
    sums = (pairs,) if op == "pooled_distance" else (pairs, heads)
    upstream = draw(*sums if values.reduction == "none" else ()).float()
    upstream = upstream.double() if exact or values.dtype == "float64" else upstream
    loss_function = getattr(ear_ops, op)
    torch.set_num_threads(values.threads)

    def call() -> dict[str, Tensor]:
        loss = loss_function(**inputs, **options)
        gradients = torch.autograd.grad(loss, sources, upstream) if sources else ()
        return {"loss": loss.detach(), **dict(zip(wanted, gradients, strict=True))}

    return call


def digests(case: Case) -> dict[str, str]:
    """Dtype and shape of the loss and of every gradient, and a digest of the bytes."""
    return {
        name: f"{t.dtype} {list(t.shape)} {hashlib.sha256(bytes(t.reshape(-1).view(torch.uint8).numpy())).hexdigest()}"
        for name, t in prepare(case)().items()
    }


def facts() -> dict[str, str | int]:
    import measuring  # which imports ear_ops, so that only the process of a build may

    return measuring.facts()


def timer(case: Case) -> Callable[[int], tuple[float, float]]:
    """Milliseconds of a call, by the wall clock and of the processor: the mean of `calls` after one to warm up."""
    call = prepare(case)

    def milliseconds(calls: int) -> tuple[float, float]:
        call()
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - wall) / calls, 1e3 * (time.process_time() - processor) / calls

    return milliseconds


def serve(folder: Path) -> None:
    """Answer requests until the pipe closes, if ear_ops and its kernels lie in `folder` and fit the sources."""
    import ear_ops

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what is printed must not come between the answers
    if Path(ear_ops.__file__).resolve().parent != folder:
        raise SystemExit(f"{folder} was asked for, but ear_ops lies in {ear_ops.__file__}")
    ear_ops.pooled_distance(torch.zeros(2, 1, 1), backend="cpu")  # raises where no kernels are loaded
    kernels = [Path(path) for path in torch.ops.loaded_libraries if Path(path).resolve().parent == folder]
    sources = [path for path in (folder.parent / "csrc").rglob("*.*") if "cuda" not in path.parts]
    if not kernels or kernels[0].stat().st_mtime < max(path.stat().st_mtime for path in sources):
        raise SystemExit(f"{folder}: the kernels that are loaded, {kernels}, are not of this folder or out of date")
    functions: dict[str, Callable[..., Any]] = {"digests": digests, "facts": facts}
    functions["results"] = lambda case, exact=False: prepare(case, exact)()
    while True:
        try:
            name, arguments = pickle.load(requests)
        except EOFError:
            return
        if name == "timer":  # what it returns stays here, to be asked as "milliseconds"
            functions["milliseconds"] = timer(*arguments)
        pickle.dump(None if name == "timer" else functions[name](*arguments), answers)
        answers.flush()


# --- in the process that compares -----------------------------------------------------------------------------------


class Build:
    """A checkout, its commit, and the process that runs it."""

    def __init__(self, checkout: Path) -> None:
        git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        self.commit = subprocess.check_output(git, text=True).strip()
        self.checkout = checkout.resolve()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve", str(self.checkout / "ear_ops")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **MALLOC, "PYTHONPATH": str(self.checkout)},
        )

    def ask(self, function: str, *arguments: Any) -> Any:
        """What the function returns in the process of the build."""
        assert self.process.stdin and self.process.stdout
        try:
            pickle.dump((function, arguments), self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            raise SystemExit(f"{self.checkout}: no answer to {function}{arguments}, see above") from None

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def max_difference(first: Tensor, second: Tensor) -> float:
    return (first.double() - second.double()).abs().max().item()


def compare_bits(base: Build, new: Build) -> dict[str, Any]:
    """How many cases are equal to the bit, and how exact the tensors are that are not."""
    cases: Counter[str] = Counter()
    equal: Counter[str] = Counter()
    differences = []
    for case in grid():
        kind = f"{case['op']} {case['dtype']} {case['backend']}"
        digest, digest_new = base.ask("digests", case), new.ask("digests", case)
        cases[kind] += 1
        equal[kind] += digest == digest_new
        if digest == digest_new:
            continue
        before, after, exact = base.ask("results", case), new.ask("results", case), base.ask("results", case, True)
        for name in (name for name in before if digest[name] != digest_new[name]):
            if before[name].dtype != after[name].dtype or before[name].shape != after[name].shape:
                raise SystemExit(f"{case}: {name} was {digest[name]} and is {digest_new[name]}")
            largest = exact[name].abs().max().item() or 1.0  # where all are zero the error is absolute
            error, error_new = (max_difference(tensors[name], exact[name]) / largest for tensors in (before, after))
            row = {"max_difference": max_difference(before[name], after[name]), "error": error, "error_new": error_new}
            row["larger"] = not error_new <= error  # NaN counts as larger
            differences.append({"case": case, "tensor": name, **row})
            print(f"{case}: {name}: {row}", flush=True)
    for kind in cases:
        print(f"{kind:<36}{equal[kind]:4} of {cases[kind]} cases equal to the bit", flush=True)
    no_larger = sum(not row["larger"] for row in differences)
    print(f"all: {equal.total()} of {cases.total()}; float64 error no larger than before in {no_larger} of", end=" ")
    print(f"{len(differences)} tensors that differ", flush=True)
    return {"cases": cases, "equal": equal, "differences": differences}


def compare_speed(checkouts: tuple[Path, Path], rounds: int) -> list[dict[str, Any]]:
    """The ratio of times, new over base, of builds that take turns, first one and then the other beginning: the median
    over rounds, with its 95% interval by the percentile bootstrap over processes."""
    cases, processes = workloads(), math.ceil(rounds / ROUNDS_OF_A_PROCESS)
    calls = [1] * len(cases)
    times = np.zeros((len(cases), processes, ROUNDS_OF_A_PROCESS, 2, 2))  # the last: of each build, by each clock
    for process in range(processes):
        builds = [Build(checkout) for checkout in checkouts]
        for index, case in enumerate(cases):
            for build in builds:
                build.ask("timer", case)
            for _ in range(0 if process else 3):  # the first calls are slow
                calls[index] = math.ceil(SHORTEST_SAMPLE / builds[0].ask("milliseconds", calls[index])[1])
            for i in range(ROUNDS_OF_A_PROCESS):
                for which in (0, 1) if (process + i) % 2 else (1, 0):
                    times[index, process, i, which] = builds[which].ask("milliseconds", calls[index])
        for build in builds:
            build.close()
        print(f"timed {process + 1} of {processes} pairs of processes", file=sys.stderr, flush=True)

    rows = []
    drawn = np.random.default_rng(0).integers(processes, size=(10_000, processes))
    for index, case in enumerate(cases):
        size = f"{case['pairs']}x{case['heads'][0]}x{case['lengths'][1]}x{case['dim']}"
        gradients = case.get("wanted", "all")
        print(f"{case['op']} {size}, mask {case.get('mask', 'none')}, {case['dtype']}, gradients: {gradients}")
        rows.append({**case, "calls": calls[index], "rounds": processes * ROUNDS_OF_A_PROCESS})
        for column, clock in enumerate(("wall", "processor")):
            measured = times[index, :, :, :, column]
            ratios = measured[:, :, 1] / measured[:, :, 0]
            medians = np.median(ratios[drawn].reshape(len(drawn), -1), axis=1)
            ratio, (low, high) = float(np.median(ratios)), np.percentile(medians, [2.5, 97.5]).tolist()
            ms, ms_new = np.median(measured, axis=(0, 1)).tolist()
            accepted = high <= ACCEPTED_RATIO
            rows[-1][clock] = {
                "ms": ms,
                "ms_new": ms_new,
                "ratio": ratio,
                "interval": [low, high],
                "accepted": accepted,
            }
            print(
                f"    {clock:<10}{ms:10.4f} ms {ms_new:10.4f} ms  ratio {ratio:.3f} [{low:.3f}, {high:.3f}]"
                f"  upper end {'<=' if accepted else '>'} {ACCEPTED_RATIO}",
                flush=True,
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE_CHECKOUT")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT")
    parser.add_argument("--rounds", type=int, default=30, help="of timings, in threes; 0: none")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--ops", default=",".join(INPUTS), help="compare only these operators")
    options = parser.parse_args()
    ops = options.ops.split(",")
    if unknown := sorted(set(ops) - INPUTS.keys()):
        parser.error(f"--ops: expected some of {','.join(INPUTS)}, got {','.join(unknown)}")
    for op in INPUTS.keys() - ops:
        del INPUTS[op]
    base, new = Build(options.base), Build(options.new)
    report = {"base": base.commit, "new": new.commit, "rounds": options.rounds, **new.ask("facts")}
    report["command"] = (
        f"python benchmarks/compare_builds.py BASE_CHECKOUT NEW_CHECKOUT --rounds {options.rounds} --ops {options.ops}"
    )
    print("\n".join(f"{name}: {value}" for name, value in report.items()), flush=True)
    report["bits"] = compare_bits(base, new)
    for build in (base, new):
        build.close()
    report["speed"] = compare_speed((options.base, options.new), options.rounds) if options.rounds else []
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["larger"] for row in report["bits"]["differences"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]))
    else:
        sys.exit(main())
