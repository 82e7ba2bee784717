"""Measure speed, memory and error of the three losses: fused, in eager PyTorch and under torch.compile.

    ear-ops bench losses --presets paper,xnli --out benchmarks/results/NAME.json
    ear-ops bench losses --device cuda --out benchmarks/results/NAME.json

The speed is also compared with a limit: the least time that the work can take on the machine.

A row is "ok" when its errors against float64 are small enough. The loss may have twice the error of eager PyTorch, and
a gradient three times, each plus 8 eps. Where float64 needs too much memory, one key head and 512 queries are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import max_error, measurer
from operations import OPERATIONS, Inputs, Loss, Operation
from presets import PRESETS, Preset
from torch import Tensor

from ear_ops.memory import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forward", "forward+backward")


def run(loss: Loss, inputs: Inputs, mode: str) -> tuple[Tensor, ...]:
    if mode == "forward":
        with torch.no_grad():
            return (loss(inputs),)
    value = loss(inputs)
    return (value, *torch.autograd.grad(value, inputs.tensors))


def losses_of(operation: Operation, preset: Preset, compiled: bool, eager_bytes: float) -> dict[str, Loss]:
    """Return the ways to compute the loss.

    Eager PyTorch is left out where it would need more than `eager_bytes`. With `compiled`, torch.compile of eager
    PyTorch is added. It compiles anew for each case.
    """
    losses: dict[str, Loss] = {"fused": operation.fused}
    if operation.eager_bytes(preset) <= eager_bytes:
        losses["eager"] = operation.eager
        if compiled:
            torch._dynamo.reset()  # otherwise it runs eagerly after some shapes, without a message
            losses["compile"] = torch.compile(operation.eager, dynamic=False)
    return losses


def check(operation: Operation, losses: dict[str, Loss], inputs: Inputs, mode: str) -> dict[str, dict]:
    """Return the errors of every way on a part of the inputs, and whether they keep the error rule."""
    part = operation.part(inputs)
    exact = run(operation.eager, part.to(torch.float64), mode)
    results = {name: run(loss, part, mode) for name, loss in {**losses, "eager": operation.eager}.items()}
    errors = {name: [max_error(a, e) for a, e in zip(tensors, exact, strict=True)] for name, tensors in results.items()}
    eps = torch.finfo(inputs.tensors[0].dtype).eps
    allowed = [(2 if i == 0 else 3) * e + 8 * eps for i, e in enumerate(errors["eager"])]
    return {
        name: {"max_errors": errors[name], "correct": all(e <= a for e, a in zip(errors[name], allowed, strict=True))}
        for name in losses
    }


def measure(
    op: str, preset_name: str, dtype_name: str, mode: str, repeats: int, compiled: bool, device: str = "cpu"
) -> list[dict]:
    using = measurer(device)
    operation, preset, dtype = OPERATIONS[op], PRESETS[preset_name], DTYPES[dtype_name]
    inputs = operation.make(preset, dtype).to(device)
    losses = losses_of(operation, preset, compiled, using.eager_bytes())
    checked = check(operation, losses, inputs, mode)
    calls: dict[str, Callable[[], object]] = {
        name: lambda loss=loss: run(loss, inputs, mode) for name, loss in losses.items()
    }
    times = using.interleaved(calls, repeats)
    gradients = sum(t.nbytes for t in inputs.tensors) if mode != "forward" else 0
    work = operation.work(preset, inputs.tensors[0].element_size(), mode != "forward")
    light = using.limit(work, preset.length, preset.dim, dtype)
    rows = []
    for name, call in calls.items():
        row = {"op": op, "preset": preset_name, "length": preset.length, "dtype": dtype_name, "mode": mode}
        row |= {
            "provider": name,
            **times[name],
            "extra_bytes": using.peak_memory(call) - gradients,
            **checked[name],
            **light,
        }
        row["fraction_of_limit"] = light["limit_ms"] / times[name]["median_ms"]
        if "eager" in times:
            row["eager_over_this"] = times["eager"]["median_ms"] / times[name]["median_ms"]
        rows.append(row)
    return rows


def line(row: dict) -> str:
    ratio = f"{row['eager_over_this']:6.2f}x eager" if "eager_over_this" in row else "             "
    return (
        f"{row['op']:<17}{row['preset']:<11}{row['dtype']:<9} {row['mode']:<17}{row['provider']:<8}"
        f"{row['median_ms']:10.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}] {ratio} "
        f"{row['extra_bytes'] / 2**20:8.1f} MiB  {row['fraction_of_limit']:5.2f} of the limit ({row['bound_by']})  "
        f"{'ok' if row['correct'] else 'error too large'}"
    )


def chosen(value: str, known: dict, option: str) -> list[str]:
    """Split the value of an option into names, and exit where a name is unknown."""
    names = value.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"--{option}: expected names out of {', '.join(known)}, got {name!r}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="qk_attention_mse,attention_mse,pooled_distance")
    parser.add_argument("--presets", default="paper,e5,xnli,small")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of eager")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    using = measurer(options.device)
    if options.device == "cpu":
        keep_freed_memory()
    rows = []
    for op in chosen(options.ops, OPERATIONS, "ops"):
        for preset in chosen(options.presets, PRESETS, "presets"):
            for dtype in chosen(options.dtypes, DTYPES, "dtypes"):
                for mode in chosen(options.modes, dict.fromkeys(MODES), "modes"):
                    new = measure(op, preset, dtype, mode, options.repeats, options.compile, options.device)
                    rows += new
                    print("\n".join(map(line, new)), flush=True)
                    if options.out:  # after every case, so that an interrupted run keeps its results
                        options.out.write_text(json.dumps({"facts": using.facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
