"""Conversions of float32 to the shorter types, and truncation, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def bfloat16_to_float(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: Array, mode: str) -> Array:
    """The 16 bits of ``x`` rounded; ``mode``: ``rn`` to nearest, ties to even, or ``rz`` towards zero."""
    rounded = _shorten(x.view(np.uint32), 16, mode) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_float16(x: Array, mode: str) -> Array:
    """The 16 bits of ``x`` rounded, as :func:`to_bfloat16`."""
    rounded = x.astype(np.float16)
    if mode == "rz":
        longer = np.abs(rounded.astype(np.float32)) > np.abs(x)
        rounded = np.where(longer, np.nextafter(rounded, np.float16(0)), rounded)
    elif mode != "rn":
        raise ValueError(f"mode: expected rn or rz, got {mode}")
    return rounded.view(np.uint16)


def to_float32_towards_zero(x: Array) -> Array:
    """float64 to float32, truncated; what is too large becomes infinite."""
    rounded = x.astype(np.float32)
    longer = np.isfinite(rounded) & (np.abs(rounded.astype(np.float64)) > np.abs(x))
    return np.where(longer, np.nextafter(rounded, np.float32(0)), rounded)


def _shorten(bits: Array, dropped: int, mode: str) -> Array:
    """Rounds away the lowest bits of sign and magnitude."""
    half, kept = np.uint32(1 << (dropped - 1)), np.uint32((0xFFFFFFFF << dropped) & 0xFFFFFFFF)
    if mode == "rn":
        return (bits + (half - np.uint32(1)) + ((bits >> np.uint32(dropped)) & np.uint32(1))) & kept
    if mode == "rz":
        return bits & kept
    raise ValueError(f"mode: expected rn or rz, got {mode}")
