"""What a processor can do at best, and the least time that the work of a loss takes on it.

A processor has three units that a loss can wait for: the one for products of matrices, the one for exponentials, and
the memory. A loss cannot take less time than the slowest unit needs for its share of the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Work:
    """The least work of a call: multiplications and additions, exponentials, and bytes to read and write."""

    flops: float
    exponentials: float
    bytes: float


@dataclass
class Limits:
    """The highest rates that a run has measured, a second. Other work on the processor only ever lowers a rate."""

    products: dict[str, float] = field(default_factory=dict)  # multiplications and additions, by the name of the dtype
    torch_products: dict[str, float] = field(default_factory=dict)  # the same of torch's product alone, as eager has it
    exponentials: float = 0.0
    memory: float = 0.0  # bytes that are read or written

    def measure(self, using: ModuleType, dtype: torch.dtype) -> None:
        """Measure the rates again with the functions of `measuring` or `measuring_cuda`, and keep the higher ones."""
        name = str(dtype).removeprefix("torch.")
        rates = using.product_rates(dtype)
        self.torch_products[name] = max(self.torch_products.get(name, 0.0), rates["torch"])
        self.products[name] = max(self.products.get(name, 0.0), *rates.values())
        self.exponentials = max(self.exponentials, using.exponential_rate())
        self.memory = max(self.memory, using.copy_rate())

    def times(self, work: Work, dtype: str) -> dict[str, float]:
        """Return the ms that each unit needs for its share of the work."""
        shares = {
            "products": (work.flops, self.products[dtype]),
            "exponentials": (work.exponentials, self.exponentials),
            "memory": (work.bytes, self.memory),
        }
        return {unit: 1e3 * amount / rate for unit, (amount, rate) in shares.items()}

    def __str__(self) -> str:
        products = ", ".join(
            f"{dtype} {rate / 1e9:.3g} GFLOP/s (torch {self.torch_products[dtype] / 1e9:.3g})"
            for dtype, rate in self.products.items()
        )
        exponentials = "" if math.isinf(self.exponentials) else f"; exponentials {self.exponentials / 1e9:.3g} G/s"
        return f"products {products}{exponentials}; copy {self.memory / 1e9:.3g} GB/s"


def against_limit(times: Mapping[str, float], measured_ms: float) -> dict[str, float | str | dict[str, float]]:
    """Return the fields of a row about its limit: the least time in ms, the unit that decides it, the fraction reached.

    Args:
        times: what `Limits.times` returned.
        measured_ms: how long a call took.
    """
    binding = max(times, key=times.__getitem__)
    limit_ms = times[binding]
    return {
        "units_ms": dict(times),
        "limit_ms": limit_ms,
        "bound_by": binding,
        "fraction_of_limit": limit_ms / max(measured_ms, 1e-6),  # a GPU may measure nothing above its noise
    }


def fastest(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the row with the smallest median among those of a case, even if its error is too large."""
    return min(rows, key=lambda row: row["median_ms"])
