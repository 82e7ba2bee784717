"""Matrix products of the four warps of a group (wgmma), which read shared memory while the warps go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from ptx import tensor_core
from ptx.asynchronous import Asynchronous, swizzled
from ptx.faults import Fault, UnknownInstruction
from ptx.operands import Array

if TYPE_CHECKING:
    from ptx.machine import Machine

ROWS, COLUMNS, BYTES = 64, 64, 32  # of m64n64k16; bytes of a row of a factor
_OF_WARP = 16  # rows
_SWIZZLE_128 = 1


@dataclass
class _Product:
    """One instruction, for some warps of all blocks."""

    warps: Array
    groups: Array  # of each warp, as it commits them
    registers: tuple[str, ...]
    start: Array | None  # [warps, 32, registers]; None: what the product before it leaves
    left: Array  # cells [warps, 16 * 2]
    right: Array  # cells [warps, 64 * 2]
    kind: str


class Products:
    """They happen as late as they may: when their warp waits for their group."""

    def __init__(self, machine: Machine, tiles: Asynchronous) -> None:
        self._machine, self._tiles = machine, tiles
        count = len(machine.threads) // 32
        self._committed, self._made = (np.zeros(count, np.int64) for _ in range(2))
        self._ordered = np.zeros(count, np.bool_)  # whether a fence came after what registers were used for
        self._pending: list[_Product] = []

    def fence(self, warps: Array) -> None:
        self._ordered[warps] = True

    def commit(self, warps: Array) -> None:
        self._committed[warps] += 1

    def begin(
        self, warps: Array, kind: str, registers: tuple[str, ...], left: Array, right: Array, adds: Array
    ) -> None:
        """``left`` and ``right``: a descriptor for each warp."""
        of_warp = warps % self._tiles.warps
        if (of_warp // 4 * 4 + 4 > self._tiles.warps).any():
            raise Fault("a product of a warp that has no group of four", int(warps[0]) * 32)
        follows = np.array([self._is_pending(int(warp), registers) for warp in warps])
        if follows.any() != follows.all():
            raise UnknownInstruction("a product whose sums are pending in a part of the warps")
        if not follows.all() and not self._ordered[warps].all():
            raise Fault("a product of registers that no wgmma.fence orders", int(warps[0]) * 32)
        rows = of_warp % 4 * _OF_WARP
        blocks = warps // self._tiles.warps
        cells = [
            self._tiles.begin_read(blocks, of_warp, _addresses(factor, first, count))
            for factor, first, count in ((left, rows, _OF_WARP), (right, 0 * rows, COLUMNS))
        ]
        start = None
        if not follows.all():
            start = np.where(adds[:, None, None], self._sums(warps, registers), np.float32(0))
        elif not adds.all():
            raise UnknownInstruction("a product that starts anew where its sums are pending")
        self._made[warps] += 1
        self._pending.append(_Product(warps, self._committed[warps], registers, start, cells[0], cells[1], kind))
        self._write(warps, registers, np.full((len(warps), 32, len(registers)), np.nan, np.float32))

    def wait(self, warps: Array, groups: int) -> None:
        """Until at most the last ``groups`` groups of these warps are left."""
        complete = np.zeros(len(self._committed), np.int64)
        complete[warps] = self._committed[warps] - groups
        left = []
        for product in self._pending:
            done = product.groups < complete[product.warps]
            if done.any():
                self._finish(_part(product, done))
            if not done.all():
                left.append(_part(product, ~done))
        self._pending = left
        self._ordered[warps] = False

    def check_complete(self) -> None:
        if self._pending:
            raise Fault("a product that nobody waits for")
        made = self._made.reshape(-1, self._tiles.warps)
        groups = made[:, : self._tiles.warps // 4 * 4].reshape(len(made), -1, 4)
        if (groups != groups[:, :, :1]).any():
            raise Fault("the warps of a group do not make the same products")

    def _finish(self, product: _Product) -> None:
        warps = product.warps
        blocks, of_warp = warps // self._tiles.warps, warps % self._tiles.warps
        a, b = (
            tensor_core.numbers_of(
                product.kind, self._tiles.end_read(blocks, of_warp, cells).reshape(len(warps), -1, BYTES)
            )
            for cells in (product.left, product.right)
        )
        start = product.start if product.start is not None else self._sums(warps, product.registers)
        self._write(warps, product.registers, tensor_core.multiply_add_rows(a, b, start))

    def _is_pending(self, warp: int, registers: tuple[str, ...]) -> bool:
        return any(product.registers == registers and warp in product.warps for product in self._pending)

    def _sums(self, warps: Array, registers: tuple[str, ...]) -> Array:
        values = [self._machine.registers[name].reshape(-1, 32)[warps].view(np.float32) for name in registers]
        return np.stack(values, axis=-1)

    def _write(self, warps: Array, registers: tuple[str, ...], sums: Array) -> None:
        for number, name in enumerate(registers):
            values = self._machine.registers[name]
            values.reshape(-1, 32)[warps] = np.ascontiguousarray(sums[..., number]).view(values.dtype)


def _part(product: _Product, some: Array) -> _Product:
    start = None if product.start is None else product.start[some]
    return _Product(
        product.warps[some],
        product.groups[some],
        product.registers,
        start,
        product.left[some],
        product.right[some],
        product.kind,
    )


def _addresses(descriptors: Array, first: Array, count: int) -> Array:
    """Where the 16 bytes of a factor lie, ``[warps, count * 2]``, from the ISA's fields of a matrix descriptor."""
    descriptors = descriptors.astype(np.uint64)
    if (descriptors >> np.uint64(62) != _SWIZZLE_128).any() or (descriptors >> np.uint64(49) & np.uint64(7)).any():
        raise UnknownInstruction("a matrix without the swizzle of 128 bytes, or with a base offset")
    start = (descriptors & np.uint64(0x3FFF)).astype(np.int64) << 4
    if (start >> 7 & 7).any():
        raise Fault("a matrix whose rows do not begin at a multiple of 1024 bytes")
    group = (descriptors >> np.uint64(32) & np.uint64(0x3FFF)).astype(np.int64) << 4  # from eight rows to the next
    rows = first[:, None] + np.arange(count)
    places = start[:, None] + rows // 8 * group[:, None] + rows % 8 * 128
    return swizzled(places[:, :, None] + np.arange(0, BYTES, 16)).reshape(len(descriptors), -1)
