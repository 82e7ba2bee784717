"""Matrix instructions of a warp, as the PTX ISA defines them: which lane holds which element, and what comes out.

Sums are exact in float64 and then truncated to float32. The ISA leaves order and rounding open; hardware truncates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx.rounding import bfloat16_to_float, to_float32_towards_zero

Array = NDArray[Any]

_LANE = np.arange(32)[:, None]
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def _position(elements: int, row: Callable[[Array], Array], column: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Rows and columns [32, elements] of what a lane holds, from the ISA's formulas of the number i of an element."""
    i = np.arange(elements)[None, :]
    return np.broadcast_to(row(i), (32, elements)), np.broadcast_to(column(i), (32, elements))


# mma.m16n8k16 with 16-bit elements, two to a register
_A16 = _position(
    8,
    row=lambda i: np.where((i < 2) | ((i >= 4) & (i < 6)), _GROUP, _GROUP + 8),
    column=lambda i: np.where(i < 4, _IN_GROUP * 2 + (i & 1), _IN_GROUP * 2 + (i & 1) + 8),
)
_B16 = _position(
    4,
    row=lambda i: np.where(i < 2, _IN_GROUP * 2 + (i & 1), _IN_GROUP * 2 + (i & 1) + 8),
    column=lambda i: _GROUP + 0 * i,
)
# mma.m16n8k8 with tf32, one to a register
_A32 = _position(
    4,
    row=lambda i: np.where((i == 0) | (i == 2), _GROUP, _GROUP + 8),
    column=lambda i: np.where(i < 2, _IN_GROUP, _IN_GROUP + 4),
)
_B32 = _position(2, row=lambda i: np.where(i == 0, _IN_GROUP, _IN_GROUP + 4), column=lambda i: _GROUP + 0 * i)
# the accumulators of both
_C = _position(4, row=lambda i: np.where(i < 2, _GROUP, _GROUP + 8), column=lambda i: _IN_GROUP * 2 + (i & 1))


def multiply_add(kind: str, a: Array, b: Array, c: Array) -> Array:
    """``d = a b + c`` of every warp, as registers.

    Args:
        kind: ``bf16``, ``f16`` or ``tf32``.
        a, b: registers, uint32 ``[warps, 32, 4]`` and ``[warps, 32, 2]``.
        c: float32 ``[warps, 32, 4]``.
    """
    depth = 8 if kind == "tf32" else 16
    (a_rows, a_columns), (b_rows, b_columns) = (_A32, _B32) if kind == "tf32" else (_A16, _B16)
    left, right = np.zeros((len(a), 16, depth)), np.zeros((len(a), depth, 8))
    left[:, a_rows, a_columns], right[:, b_rows, b_columns] = _numbers(kind, a), _numbers(kind, b)
    rows, columns = _C
    return to_float32_towards_zero(np.matmul(left, right)[:, rows, columns] + c)


def _numbers(kind: str, registers: Array) -> Array:
    if kind == "tf32":  # the unit ignores the 13 lowest bits
        return (registers & np.uint32(0xFFFFE000)).view(np.float32)
    halves = np.ascontiguousarray(registers).view(np.uint16)  # the lower half comes first
    return bfloat16_to_float(halves) if kind == "bf16" else halves.view(np.float16)


def numbers_of(kind: str, rows: Array) -> Array:
    """The numbers in bytes ``[..., bytes]``, of a type with 16 bits."""
    return _numbers(kind, np.ascontiguousarray(rows).view(np.uint32))


def multiply_add_rows(a: Array, b: Array, c: Array) -> Array:
    """``d = a b^T + c`` for the 16 rows that a warp holds of a product of four warps, as its registers.

    Args:
        a, b: numbers ``[warps, 16, k]`` and ``[warps, n, k]``.
        c: float32 ``[warps, 32, n / 2]``; four registers of every eight columns, as those of an ``mma``.
    """
    product = np.matmul(a.astype(np.float64), b.astype(np.float64).swapaxes(1, 2))
    rows, columns = _C
    eights = np.stack([product[:, rows, 8 * n + columns] for n in range(product.shape[2] // 8)], axis=2)
    return to_float32_towards_zero(eights.reshape(c.shape) + c)


def load_matrices(rows: Array, transpose: bool) -> Array:
    """``ldmatrix.m8n8.x4.b16``: registers, uint32 ``[warps, 32, 4]``.

    Args:
        rows: uint8 ``[warps, 32, 16]``; lane 8 m + r gives row r of matrix m.
        transpose: ``.trans``.
    """
    matrices = rows.view(np.uint16).reshape(-1, 4, 8, 8)
    if transpose:
        matrices = matrices.swapaxes(2, 3)
    # Lane l gets the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of every matrix.
    pairs = np.ascontiguousarray(matrices).reshape(-1, 4, 32, 2)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).view(np.uint32)[..., 0]
