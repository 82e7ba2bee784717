"""Measure the time, memory and error of a call on a CPU, and the rates of the processor."""

from __future__ import annotations

import importlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from types import ModuleType

import support_path  # noqa: F401 (makes `support` importable)
import torch
from support.memory import peak_memory as peak_memory  # callers take it from here or from `measuring_cuda`

import ear_ops

__all__ = [
    "copy_rate",
    "eager_bytes",
    "exponential_rate",
    "facts",
    "interleaved",
    "max_error",
    "measurer",
    "peak_memory",
    "processor_kind",
    "product_rates",
    "summary",
]

SHORTEST_SAMPLE = 2e-3  # seconds; a sample repeats shorter calls
SLOW = 1.0  # seconds; a call that takes longer is measured in SLOW_ROUNDS rounds at most
SLOW_ROUNDS = 3


def measurer(device: str) -> ModuleType:
    """Return the module that measures time, memory and limits on a device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch.cuda.is_available() is false")
    return importlib.import_module("measuring" if device == "cpu" else "measuring_cuda")


def eager_bytes() -> float:
    """Return the bytes that plain PyTorch may hold. Where it needs more, it is not measured."""
    return 8 << 30


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Return what `summary` says of each call, after two calls to warm up.

    Calls take turns, so that noise does not change ratios. Every second turn begins with the last call.
    """
    inner, rounds = {}, {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        inner[name] = max(1, round(SHORTEST_SAMPLE / seconds))
        rounds[name] = repeats if seconds < SLOW else min(repeats, SLOW_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            if turn >= rounds[name]:
                continue
            start = time.perf_counter()
            for _ in range(inner[name]):
                calls[name]()
            times[name].append(1e3 * (time.perf_counter() - start) / inner[name])
    return {name: summary(samples) for name, samples in times.items()}


def summary(samples: list[float]) -> dict[str, float]:
    """Return the median, p20 and p80 of times in ms, and how many they are."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
    return {
        "median_ms": statistics.median(samples),
        "p20_ms": cuts[0],
        "p80_ms": cuts[-1],
        "rounds": len(samples),
    }


@cache
def _large() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.zeros(2, 1 << 25))  # type: ignore[return-value]


def copy_rate() -> float:
    """Return how many bytes a copy reads and writes per second, best of 5. It is far larger than the caches."""
    source, target = _large()
    return 2 * source.nbytes / shortest(lambda: target.copy_(source), 5)


def shortest(call: Callable[[], object], tries: int) -> float:
    """Return the seconds of the fastest of so many calls."""
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _torch_product_rate(dtype: torch.dtype) -> float:
    """Return the multiplications and additions per second of torch's matrix product."""
    rate = 0.0
    for n in (256, 1024):
        left, right = torch.zeros(2, n, n, dtype=dtype)
        rate = max(rate, 2.0 * n**3 / shortest(lambda left=left, right=right: left @ right, 3))  # type: ignore[misc]
        if rate < 1e10:  # a processor without a unit for this dtype needs seconds for the larger product
            break
    return rate


def product_rates(dtype: torch.dtype) -> dict[str, float]:
    """Return the multiplications and additions per second of torch's matrix product and of that of the kernels."""
    kernels = [torch.ops.ear_ops.cpu_rates(256, 64, k, dtype)[0] for k in (64, 128)]
    return {"torch": _torch_product_rate(dtype), "kernels": max(kernels)}


def exponential_rate() -> float:
    """Return the exponentials per second of torch's function, or of the kernels' own if higher."""
    numbers = torch.zeros(1 << 18)
    out = torch.empty_like(numbers)
    of_torch = numbers.numel() / shortest(lambda: torch.exp(numbers, out=out), 20)
    return max(of_torch, torch.ops.ear_ops.cpu_rates(256, 64, 32, torch.float32)[1])


def max_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return max |error| / max |exact|."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


MAKERS = ("epyc", "ryzen", "xeon", "core", "neoverse")
UNITS = {"amx_bf16": "amx", "avx512_bf16": "avx512-bf16", "avx512f": "avx512", "avx2": "avx2"}  # the best one first


def processor_kind(name: str, flags: Collection[str]) -> str:
    """Return the family of a processor and its best vector unit, such as `epyc-avx512-bf16`.

    Args:
        name: what the processor calls itself.
        flags: the features that the system lists.
    """
    family = next((maker for maker in MAKERS if maker in name.lower().replace("(r)", "").split()), platform.machine())
    unit = next((unit for flag, unit in UNITS.items() if flag in flags), "portable")
    return f"{family.lower()}-{unit}"


def facts() -> dict[str, str | int]:
    """Return what a result depends on, besides the settings in its rows."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()] if cpuinfo.exists() else []
    described = {key.strip(): value.strip() for key, _, value in lines}
    name = described.get("model name") or platform.processor() or platform.machine()
    return {
        "device": name,
        "kind": processor_kind(name, described.get("flags", "").split()),
        "cpu_isa": torch.ops.ear_ops.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ear_ops": ear_ops.__version__,
        "date": date.today().isoformat(),
        "command": command(),
    }


def command() -> str:
    """Return the command that runs this script, as a user types it."""
    name = Path(sys.argv[0]).stem
    if name.startswith("bench_"):
        return shlex.join(["ear-ops", "bench", name.removeprefix("bench_"), *sys.argv[1:]])
    return shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])


def chosen(value: str, known: Collection[str], option: str) -> list[str]:
    """Split the value of an option into names, and exit where a name is unknown."""
    names = value.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"--{option}: expected names out of {', '.join(known)}, got {name!r}")
    return names
