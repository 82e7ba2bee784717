"""Speed and error of ``qk_attention_mse`` against plain PyTorch.

    python benchmarks/bench_qk_attention_mse.py --out benchmarks/results/NAME.json

All providers of a case are timed in turns, within one process, so that a ratio survives a noisy machine. Inputs are
laid out as models hand them over: ``[2B, L, H, D]`` in memory, both views in one tensor. A row is "ok" when the loss
and its gradients are within twice (three times) eager's error against float64 plus 8 eps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from providers import Loss, qk_attention_mse_providers
from torch import Tensor

import ear_ops

PRESETS = {  # B, H, L, D
    "paper": (32, 12, 128, 64),
    "e5": (32, 12, 128, 32),
    "long-512": (1, 12, 512, 64),
    "small": (2, 4, 16, 32),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("forward", "forward+backward")


def make_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """query, key ``[2B, H, L, D]``; the second view is the first with noise, as that of a model is."""
    pairs, heads, length, dim = shape
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for _ in range(2):
        first = torch.randn(pairs, length, heads, dim, generator=generator)
        second = first + 0.3 * torch.randn(pairs, length, heads, dim, generator=generator)
        tensors.append(torch.cat([first, second]).to(dtype).transpose(1, 2).requires_grad_())
    return tensors[0], tensors[1]


def run(loss: Loss, query: Tensor, key: Tensor, mode: str) -> tuple[Tensor, ...]:
    if mode == "forward":
        with torch.no_grad():
            return (loss(query, key),)
    value = loss(query, key)
    return (value, *torch.autograd.grad(value, (query, key)))


def errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """max |err| / max |ref| of the loss and the gradients."""
    return [((r.double() - e).abs().max() / e.abs().max()).item() for r, e in zip(results, exact, strict=True)]


def measure(preset: str, dtype_name: str, mode: str, providers: dict[str, Loss], repeats: int) -> list[dict]:
    shape, dtype = PRESETS[preset], DTYPES[dtype_name]
    query, key = make_inputs(shape, dtype)
    exact_inputs = [t.detach().double().requires_grad_() for t in (query, key)]
    exact = run(lambda q, k: ear_ops.qk_attention_mse(q, k, backend="reference"), *exact_inputs, mode)
    error = {name: errors(run(loss, query, key, mode), exact) for name, loss in providers.items()}  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, loss in providers.items():
            start = time.perf_counter()
            run(loss, query, key, mode)
            times[name].append(time.perf_counter() - start)
    eps = torch.finfo(dtype).eps
    rows = []
    for name in providers:
        allowed = [(2 if i == 0 else 3) * e + 8 * eps for i, e in enumerate(error["eager"])]
        cuts = statistics.quantiles(times[name], n=5)
        rows.append(
            {
                "preset": preset,
                "shape": dict(zip("BHLD", shape, strict=True)),
                "dtype": dtype_name,
                "mode": mode,
                "provider": name,
                "median_ms": 1e3 * statistics.median(times[name]),
                "p20_ms": 1e3 * cuts[0],
                "p80_ms": 1e3 * cuts[-1],
                "eager_over_this": statistics.median(times["eager"]) / statistics.median(times[name]),
                "max_errors": error[name],
                "correct": all(e <= a for e, a in zip(error[name], allowed, strict=True)),
            }
        )
    return rows


def device_facts() -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.processor() or platform.machine(),
        "cpu_isa": torch.ops.ear_ops.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ear_ops": ear_ops.__version__,
        "date": date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of the eager loss")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = []
    for preset in options.presets.split(","):
        for dtype in options.dtypes.split(","):
            for mode in MODES:
                providers = qk_attention_mse_providers(options.compile)
                rows += measure(preset, dtype, mode, providers, options.repeats)
                for row in rows[-len(providers) :]:
                    print(
                        f"{preset:<9} {dtype:<9} {mode:<17} {row['provider']:<8} {row['median_ms']:9.2f} ms "
                        f"[{row['p20_ms']:.2f}, {row['p80_ms']:.2f}]  {row['eager_over_this']:5.2f}x "
                        f"{'ok' if row['correct'] else 'error too large'}",
                        flush=True,
                    )
    if options.out:
        options.out.write_text(json.dumps({"facts": device_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
