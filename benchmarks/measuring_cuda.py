"""Measure time, memory and limits on a GPU. The functions have the names of those in ``measuring``.

CUDA events measure the replay of a CUDA graph that holds many calls, so that the time to start a graph does not count.
Before every call, other bytes are read into the L2 cache; the time for that is measured alone and taken off. The rates
of the device are measured in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache, partial

import measuring
import torch

import ear_ops

FLUSH = 1 << 28  # bytes to read before every call, several times the size of an L2 cache
GRAPH_SECONDS = 2e-3  # that the calls of a graph take, together and at least
MOST_CALLS = 100  # of a graph
EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor (CUDA C++ Programming Guide, throughput of ex2 on 8.0 and 9.0)


def calls_in_graph(seconds: float) -> int:
    """Return how many calls a graph holds if one takes so many seconds."""
    return math.ceil(GRAPH_SECONDS / min(max(seconds, GRAPH_SECONDS / MOST_CALLS), GRAPH_SECONDS))


def per_call(with_calls: float, without: float, calls: int) -> float:
    """Return the time of one call out of the times of a graph with calls and of one that only reads other bytes."""
    return max(with_calls - without, 0.0) / calls


def warm_up(call: Callable[[], object]) -> float:
    """Run a call on a stream of its own, as graphs ask for, and return the seconds of the last run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for _ in range(3):
            start.record()
            call()
            end.record()
    torch.cuda.current_stream().wait_stream(stream)
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Capture calls that have been warmed up."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def eager_bytes() -> float:
    """Return the bytes that plain PyTorch may hold. Where it needs more, it is not measured."""
    return 0.5 * torch.cuda.get_device_properties(0).total_memory


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, capture: bool = True
) -> dict[str, dict[str, float]]:
    """Return what `measuring.summary` says of each call. Calls take turns. `capture` makes CUDA graphs of them."""
    flush = torch.zeros(FLUSH // 4, dtype=torch.int32, device="cuda").max  # reads only, so that nothing is written back
    warm_up(flush)
    runs: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {}  # with and without the calls
    for name, call in calls.items():
        if capture:
            count = calls_in_graph(warm_up(call))
            runs[name] = graph_of([flush, call] * count).replay, graph_of([flush] * count).replay, count
        else:
            runs[name] = (lambda call=call: (flush(), call())), flush, 1
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, (with_calls, without, count) in runs.items():
            times = [_milliseconds(run) for run in (with_calls, without)]
            if turn:  # the first turn warms up
                samples[name].append(per_call(*times, count))
    return {name: measuring.summary(times) for name, times in samples.items()}


def _milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


peak_memory = partial(measuring.peak_memory, device="cuda")


@cache
def copy_rate() -> float:
    """Return how many bytes a copy reads and writes per second. It is far larger than the caches."""
    source, target = torch.zeros(2, 1 << 28, device="cuda")
    times = interleaved({"copy": lambda: target.copy_(source)}, 20)
    return 2 * source.nbytes / (1e-3 * times["copy"]["p20_ms"])


@cache
def product_rates(dtype: torch.dtype) -> dict[str, float]:
    """Return the multiplications and additions per second of torch's matrix product of 8192 x 8192 in this dtype.

    For float32, this is the better of two ways: the float32 unit, or three products of the matrix unit, whose sum is
    as exact.
    """
    if dtype != torch.float32:
        return {"torch": _product_rate(dtype)}
    float32_unit = _product_rate(dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return {"torch": max(float32_unit, _product_rate(dtype) / 3)}
    finally:
        torch.set_float32_matmul_precision(before)


def _product_rate(dtype: torch.dtype) -> float:
    n = 8192
    left, right = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = interleaved({"product": lambda: torch.mm(left, right, out=out)}, 10)
    return 2.0 * n**3 / (1e-3 * times["product"]["p20_ms"])


def exponential_rate() -> float:
    """Return the exponentials per second by clock and multiprocessors; older releases of torch do not say the clock."""
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", math.inf)  # kHz
    return EXPONENTIALS_PER_CLOCK * properties.multi_processor_count * 1e3 * clock


def facts() -> dict[str, str | int]:
    """Return what a result depends on, besides the settings in its rows."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "kind": "-".join(properties.name.lower().split()[:2]),
        "capability": f"sm_{properties.major}{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "ear_ops": ear_ops.__version__,
        "date": date.today().isoformat(),
        "command": measuring.command(),
    }
