"""Measure the time, memory and error of a call on a CPU, and the rates of the machine."""

from __future__ import annotations

import importlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from types import ModuleType

import support_path  # noqa: F401 (makes `support` importable)
import torch
from operations import Work
from support.memory import peak_memory as peak_memory  # callers take it from here or from `measuring_cuda`

import ear_ops

__all__ = [
    "compute_rates",
    "copy_rate",
    "eager_bytes",
    "facts",
    "interleaved",
    "limit",
    "max_error",
    "measurer",
    "peak_memory",
]

SHORTEST_SAMPLE = 2e-3  # seconds; a sample repeats shorter calls


def measurer(device: str) -> ModuleType:
    """Return the module that measures time, memory and limits on a device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch.cuda.is_available() is false")
    return importlib.import_module("measuring" if device == "cpu" else "measuring_cuda")


def eager_bytes() -> float:
    """Return the bytes that plain PyTorch may hold. Where it needs more, it is not measured."""
    return 8 << 30


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Return median, p20 and p80 of each call in ms. Calls take turns, so that noise does not change ratios."""
    inner = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        inner[name] = max(1, round(SHORTEST_SAMPLE / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(inner[name]):
                call()
            times[name].append((time.perf_counter() - start) / inner[name])
    result = {}
    for name, samples in times.items():
        cuts = statistics.quantiles(samples, n=5)
        median = statistics.median(samples)
        result[name] = {"median_ms": 1e3 * median, "p20_ms": 1e3 * cuts[0], "p80_ms": 1e3 * cuts[-1]}
    return result


@cache
def copy_rate() -> float:
    """Return how many bytes a copy reads and writes per second, best of 20. It is far larger than the caches."""
    source, target = torch.zeros(2, 1 << 25)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


@cache
def compute_rates(length: int, dim: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return how many product operations and exponentials the CPU kernels can do per second, best of 20."""
    m, k = (max(32, min(n, 256) // 32 * 32) for n in (length, dim))
    flops, exponentials = torch.ops.ear_ops.cpu_rates(m, 64, k, dtype)
    return flops, exponentials


def limit(work: Work, length: int, dim: int, dtype: torch.dtype) -> dict[str, float | str]:
    """Return the least time in ms that the work can take on this machine, and which rate decides it."""
    flops, exponentials = compute_rates(length, dim, dtype)
    terms = {
        "products": work.flops / flops,
        "exponentials": work.exponentials / exponentials,
        "memory": work.bytes / copy_rate(),
    }
    binding = max(terms, key=terms.__getitem__)
    return {"limit_ms": 1e3 * terms[binding], "bound_by": binding}


def max_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return max |error| / max |exact|."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


def facts() -> dict[str, str | int]:
    """Return what a result depends on, besides the settings in its rows."""
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
