"""Measure speed, memory and error of the losses: fused, in eager PyTorch and under torch.compile.

    ear-ops bench losses --presets paper,xnli --out FILE.json
    ear-ops bench losses --device cuda --out FILE.json

All ways get the same inputs. They are warm before they are timed, and take turns; a row holds medians over the rounds.
A call that takes more than a second gets three rounds. A case names the way that wins where that is not the fused one.

Each case is held against the limits of the processor: the least time that its products, exponentials and bytes take at
the highest rates that the run measured. The unit that needs longest binds. The fraction is that time over the p20 of
the measured times, because other work on the processor only ever adds time.

A divergence is timed beside the squared error of the same inputs, in turns.

A row is "ok" when its errors against float64 are small enough. The loss may have twice the error of eager PyTorch, and
a gradient three times, each plus 8 eps. Where float64 needs too much memory, one key head and 512 queries are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from limits import Limits, Work, against_limit, fastest
from measuring import chosen, max_error, measurer
from operations import OPERATIONS, Inputs, Loss, Operation
from presets import PRESETS
from torch import Tensor

from ear_ops.memory import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forward", "forward+backward")
FLOAT64_BYTES = 3 << 29  # that the maps of a case may hold in plain PyTorch, so that it is checked as a whole


def run(loss: Loss, inputs: Inputs, mode: str) -> tuple[Tensor, ...]:
    if mode == "forward":
        with torch.no_grad():
            return (loss(inputs),)
    value = loss(inputs)
    return (value, *torch.autograd.grad(value, inputs.tensors))


def losses_of(operation: Operation, compiled: bool, eager: bool) -> dict[str, Loss]:
    """Return the ways to compute the loss. `compiled` adds torch.compile of eager, anew for each case."""
    losses: dict[str, Loss] = {"fused": operation.fused}
    if eager:
        losses["eager"] = operation.eager
        if compiled:
            torch._dynamo.reset()  # otherwise it runs eagerly after some shapes, without a message
            losses["compile"] = torch.compile(operation.eager, dynamic=False)
    return losses


def check(operation: Operation, losses: dict[str, Loss], part: Inputs, mode: str) -> dict[str, dict]:
    """Return the errors of every way on a part of the inputs, and whether they keep the error rule."""
    exact = run(operation.eager, part.to(torch.float64), mode)
    results = {name: run(loss, part, mode) for name, loss in {**losses, "eager": operation.eager}.items()}
    errors = {name: [max_error(a, e) for a, e in zip(tensors, exact, strict=True)] for name, tensors in results.items()}
    eps = torch.finfo(part.tensors[0].dtype).eps
    allowed = [(2 if i == 0 else 3) * e + 8 * eps for i, e in enumerate(errors["eager"])]
    return {
        name: {"max_errors": errors[name], "correct": all(e <= a for e, a in zip(errors[name], allowed, strict=True))}
        for name in losses
    }


@dataclass(frozen=True)
class Case:
    op: str
    preset: str
    dtype: str
    mode: str

    def eager_seconds(self, limits: Limits) -> float:
        """Return about how long the products of plain PyTorch take, which also computes what masks leave out."""
        preset = replace(PRESETS[self.preset], ragged=False, is_causal=False)
        dtype = DTYPES[self.dtype]
        work = OPERATIONS[self.op].work(preset, dtype.itemsize, self.mode != "forward")
        return work.flops / limits.torch_products[self.dtype]


def measure(case: Case, limits: Limits, options: argparse.Namespace) -> list[dict]:
    using = measurer(options.device)
    operation, preset, dtype = OPERATIONS[case.op], PRESETS[case.preset], DTYPES[case.dtype]
    inputs = operation.make(preset, dtype).to(options.device)
    seconds, held = case.eager_seconds(limits), operation.eager_bytes(preset)
    with_eager = held <= using.eager_bytes() and seconds <= options.longest
    losses = losses_of(operation, options.compile, with_eager)
    whole = with_eager and held <= FLOAT64_BYTES
    checked = check(operation, losses, inputs if whole else operation.part(inputs), case.mode)
    calls: dict[str, Callable[[], object]] = {
        name: lambda loss=loss: run(loss, inputs, case.mode) for name, loss in losses.items()
    }
    beside = {}
    if operation.mse is not None:
        beside["mse"] = partial(run, operation.mse, inputs, case.mode)
    times = using.interleaved({**calls, **beside}, options.repeats)
    limits.measure(using, dtype)
    gradients = sum(t.nbytes for t in inputs.tensors) if case.mode != "forward" else 0
    work = operation.work(preset, inputs.tensors[0].element_size(), case.mode != "forward")
    rows = []
    for name, call in calls.items():
        row = asdict(case) | {"length": preset.length, "provider": name, **times[name], "work": asdict(work)}
        row |= {"extra_bytes": using.peak_memory(call) - gradients, **checked[name]}
        if beside:
            row["mse_over_this"] = times["mse"]["median_ms"] / times[name]["median_ms"]
        if with_eager:
            row["eager_over_this"] = times["eager"]["median_ms"] / times[name]["median_ms"]
        else:
            row["eager_left_out"] = {"seconds": seconds, "bytes": held}
        rows.append(row)
    return rows


def hold_against(limits: Limits, rows: list[dict]) -> None:
    """Put into the rows what the highest rates of the run make of their limits."""
    for row in rows:
        row |= against_limit(limits.times(Work(**row["work"]), row["dtype"]), row["p20_ms"])


def lines(rows: list[dict]) -> str:
    """Return what is printed of a case: its limits, a line for each way, and the way that wins."""
    first = rows[0]
    needed = sorted(first["units_ms"].items(), key=lambda unit: -unit[1])
    units = ", ".join(f"{unit} {ms:.3g} ms" for unit, ms in needed if ms)
    title = f"{first['op']} {first['preset']} {first['dtype']} {first['mode']}"
    printed = [f"{title}, bound by {first['bound_by']}: {units}"]
    for row in rows:
        ratio = f"{row['median_ms'] / first['median_ms']:7.2f}x fused" if row is not first else " " * 14
        printed.append(
            f"  {row['provider']:<8}{row['median_ms']:10.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}] {ratio}"
            f"  {row['fraction_of_limit']:5.2f} of the limit  {row['extra_bytes'] / 2**20:8.1f} MiB  "
            f"{'ok' if row['correct'] else 'error too large'}"
        )
    if "mse_over_this" in first:
        printed.append(f"  qk_attention_mse of the same inputs takes {first['mse_over_this']:.2f} of the time")
    if "eager_left_out" in first:
        left_out = first["eager_left_out"]
        printed.append(
            f"  eager is left out: about {left_out['seconds']:.1f} s a call and {left_out['bytes'] / 2**30:.1f} GiB"
        )
    winner = fastest(rows)
    if winner is not first:
        printed.append(f"  {winner['provider']} wins{'' if winner['correct'] else ', with an error that is too large'}")
    return "\n".join(printed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="qk_attention_mse,attention_mse,pooled_distance")
    parser.add_argument("--presets", default="paper,e5,xnli,small")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of eager")
    parser.add_argument("--longest", type=float, default=3.0, help="leave eager out where a call takes more seconds")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    using = measurer(options.device)
    if options.device == "cpu":
        keep_freed_memory()
    names = (
        chosen(options.ops, OPERATIONS, "ops"),
        chosen(options.presets, PRESETS, "presets"),
        chosen(options.dtypes, DTYPES, "dtypes"),
        chosen(options.modes, dict.fromkeys(MODES), "modes"),
    )
    limits = Limits()
    for dtype in names[2]:
        limits.measure(using, DTYPES[dtype])
    facts = using.facts()
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    print(f"{facts['device']} ({facts['kind']}{threads}) at best: {limits}", flush=True)
    rows: list[dict] = []
    for case in product(*names):
        new = measure(Case(*case), limits, options)
        rows += new
        hold_against(limits, rows)
        print(lines(new), flush=True)
        if options.out:  # after every case, so that an interrupted run keeps its results
            result = {"facts": facts, "limits": asdict(limits), "rows": rows}
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"at best, in the whole run: {limits}")


if __name__ == "__main__":
    main()
