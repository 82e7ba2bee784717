"""Time, memory and limits on a GPU, under the names of ``measuring``: CUDA events around replayed CUDA graphs, the L2
cache filled with other bytes before every sample, and rates of the device measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from datetime import date
from functools import cache, partial

import measuring
import torch
from operations import Work

import ear_ops

FLUSH = 1 << 29  # bytes read before every sample: several times any L2 cache
EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor (CUDA C++ Programming Guide, throughput of ex2 on 8.0 and 9.0)


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A call, warmed up and captured, so that launches cost nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def eager_bytes() -> float:
    """What plain PyTorch may hold at once, or it is not tried."""
    return 0.5 * torch.cuda.get_device_properties(0).total_memory


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, capture: bool = True
) -> dict[str, dict[str, float]]:
    """Median, p20 and p80 in ms of each call, taken in turns; `capture`: as CUDA graphs."""
    flush = torch.zeros(FLUSH // 4, dtype=torch.int32, device="cuda")
    replays = {name: graph_of(call).replay if capture else call for name, call in calls.items()}
    for replay in replays.values():
        replay()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, replay in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.max()  # read, not written: a sample should not have to write back what was here before it
            start.record()
            replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    result = {}
    for name, pairs in events.items():
        samples = [start.elapsed_time(end) for start, end in pairs]
        cuts = statistics.quantiles(samples, n=5)
        result[name] = {"median_ms": statistics.median(samples), "p20_ms": cuts[0], "p80_ms": cuts[-1]}
    return result


peak_memory = partial(measuring.peak_memory, device="cuda")


@cache
def copy_rate() -> float:
    """Bytes read and written per second by a copy far larger than the caches, best of 20."""
    source, target = torch.zeros(2, 1 << 28, device="cuda")
    times = interleaved({"copy": lambda: target.copy_(source)}, 20)
    return 2 * source.nbytes / (1e-3 * times["copy"]["p20_ms"])


@cache
def product_rate(dtype: torch.dtype) -> float:
    """Multiplications and additions per second of torch's matrix product of 8192 x 8192 in this dtype. In float32 the
    better of two ways: its own unit, or three products of the matrix unit for one, which round as well."""
    if dtype != torch.float32:
        return _product_rate(dtype)
    own = _product_rate(dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return max(own, _product_rate(dtype) / 3)
    finally:
        torch.set_float32_matmul_precision(before)


def _product_rate(dtype: torch.dtype) -> float:
    n = 8192
    left, right = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = interleaved({"product": lambda: torch.mm(left, right, out=out)}, 10)
    return 2.0 * n**3 / (1e-3 * times["product"]["p20_ms"])


def limit(work: Work, length: int, dim: int, dtype: torch.dtype) -> dict[str, float | str]:
    """The least time in ms that the work can take here, and which of its terms binds."""
    properties = torch.cuda.get_device_properties(0)
    terms = {"memory": work.bytes / copy_rate()}
    clock = getattr(properties, "clock_rate", 0)  # kHz; older releases of torch do not say
    if clock:
        rate = EXPONENTIALS_PER_CLOCK * properties.multi_processor_count * 1e3 * clock
        terms["exponentials"] = work.exponentials / rate
    if work.flops:
        terms["products"] = work.flops / product_rate(dtype)
    binding = max(terms, key=terms.__getitem__)
    return {"limit_ms": 1e3 * terms[binding], "bound_by": binding}


def facts() -> dict[str, str | int]:
    """What a result depends on and the rows do not say."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "ear_ops": ear_ops.__version__,
        "date": date.today().isoformat(),
    }
