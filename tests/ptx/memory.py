"""Global and shared memory of a kernel, and what is checked at every access.

Shared memory is watched in cells of two bytes. Two accesses of different threads to one cell, of which one writes, must
be ordered: by a barrier of the block, or within a warp by ``bar.warp.sync``. Nothing else orders them. Shuffles, votes,
``ldmatrix`` and ``mma`` bring a warp together, but by the PTX memory model they do not make its writes visible.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx.faults import Fault
from ptx.parser import SHARED_BASE

Array = NDArray[Any]


def _first(bad: Any, lanes: Array) -> int:
    return int(lanes[np.argmax(bad)])


def _check_aligned(what: str, addresses: Array, size: int, lanes: Array) -> None:
    bad = addresses % size != 0
    if bad.any():
        raise Fault(
            f"{what}: an access of {size} bytes at {int(addresses[bad][0]):#x} is not aligned", _first(bad, lanes)
        )


# --- global memory --------------------------------------------------------------------------------------------------

_READABLE, _WRITABLE, _REWRITABLE = 1, 2, 3
_ARENA_ALIGNMENT = 256


@dataclass(frozen=True)
class Extent:
    """Memory of the process that kernels may touch."""

    address: int
    bytes: int
    written: bool  # by kernels, every byte once; what is not written may be read alone
    rewritten: bool = False  # by the later launches of a call, every byte once in each


def extent_of(array: Array, written: bool) -> Extent:
    return Extent(array.ctypes.data, array.nbytes, written)


class GlobalMemory:
    """A copy of some extents, whose addresses stay those of the process."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self.extents = list(extents)  # none of them empty
        bounds: list[list[int]] = []
        for extent in sorted(self.extents, key=lambda extent: extent.address):
            end = extent.address + extent.bytes
            if bounds and extent.address <= bounds[-1][1]:
                bounds[-1][1] = max(bounds[-1][1], end)
            else:
                bounds.append([extent.address, end])
        self._starts = np.array([start for start, _ in bounds], np.int64)
        self._ends = np.array([end for _, end in bounds], np.int64)
        offsets, size = [], 0
        for start, end in bounds:
            offset = size + start % _ARENA_ALIGNMENT  # as well aligned as in the process
            offsets.append(offset)
            size = -(-(offset + end - start) // _ARENA_ALIGNMENT) * _ARENA_ALIGNMENT
        self._offsets = np.array(offsets, np.int64)
        self._data, self._rights = (np.zeros(size, np.uint8) for _ in range(2))
        self._writes, self._launch = np.zeros(size, np.uint16), 0  # the launch that wrote a byte last; 0: none
        for start, end, offset in zip(self._starts, self._ends, self._offsets, strict=True):
            self._data[offset : offset + end - start] = _process_memory(int(start), int(end - start))
        for extent in sorted(self.extents, key=lambda extent: extent.written):
            written = _REWRITABLE if extent.rewritten else _WRITABLE
            self._rights[self._span(extent)] = written if extent.written else _READABLE

    def _span(self, extent: Extent) -> slice:
        index = int(np.searchsorted(self._starts, extent.address, "right")) - 1
        offset = int(self._offsets[index] + extent.address - self._starts[index])
        return slice(offset, offset + extent.bytes)

    def begin_launch(self) -> None:
        self._launch += 1

    def load(self, addresses: Array, size: int, lanes: Array) -> Array:
        """Bytes ``[lanes, size]``."""
        rows = self._rows("read", addresses, size, lanes)
        rights, writes = self._rights.reshape(-1, size)[rows], self._writes.reshape(-1, size)[rows]
        bad = ((rights != _READABLE) & (writes == 0)).any(1)
        if bad.any():
            raise Fault("global memory: a result is read before it is written", _first(bad, lanes))
        return self._data.reshape(-1, size)[rows]

    def store(self, addresses: Array, values: Array, lanes: Array) -> None:
        """Writes bytes ``[lanes, size]``."""
        size = values.shape[1]
        rows = self._rows("write", addresses, size, lanes)
        rights, writes = self._rights.reshape(-1, size)[rows], self._writes.reshape(-1, size)[rows]
        bad = (rights == _READABLE).any(1)
        if bad.any():
            raise Fault("global memory: a write to an input", _first(bad, lanes))
        bad = ((writes == self._launch) | (rights != _REWRITABLE) & (writes != 0)).any(1)
        if bad.any() or len(np.unique(rows)) != len(rows):
            raise Fault("global memory: a byte of a result is written a second time", _first(bad, lanes))
        self._data.reshape(-1, size)[rows] = values
        self._writes.reshape(-1, size)[rows] = self._launch

    def _rows(self, verb: str, addresses: Array, size: int, lanes: Array) -> Array:
        """Which rows of the arena, ``size`` bytes each, the addresses are."""
        addresses = addresses.astype(np.int64)
        index = np.searchsorted(self._starts, addresses, "right") - 1
        bad = (index < 0) | (addresses + size > self._ends[index])
        if bad.any():
            lane = _first(bad, lanes)
            raise Fault(
                f"global memory: a {verb} of {size} bytes at {int(addresses[bad][0]):#x}, outside of every tensor", lane
            )
        _check_aligned("global memory", addresses, size, lanes)
        return (addresses - self._starts[index] + self._offsets[index]) // size

    def give_back(self) -> None:
        """Copies the results to the process."""
        for extent in self.extents:
            if extent.written:
                _process_memory(extent.address, extent.bytes)[:] = self._data[self._span(extent)]

    def check_complete(self) -> None:
        """Every byte of every result must have been written."""
        for extent in self.extents:
            missing = int((self._writes[self._span(extent)] == 0).sum()) if extent.written else 0
            if missing:
                raise Fault(f"global memory: {missing} of {extent.bytes} bytes of a result were never written")


def _process_memory(address: int, size: int) -> Array:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


# --- shared memory --------------------------------------------------------------------------------------------------

_CELL = 2  # bytes
_NEVER_WRITTEN, _WRITTEN, _ON_ITS_WAY, _SET_ASIDE = 0, 1, 2, 3

# Who did something to a cell, and when, in 31 bits: epoch of the block (barriers so far), epoch of the warp within it,
# warp, lane. The highest lane and warp stand for several of them.
_LANE_BITS, _WARP_BITS, _WARP_EPOCH_BITS, _BLOCK_EPOCH_BITS = 6, 6, 6, 13
_WARP_SHIFT, _CLOCK_SHIFT = _LANE_BITS, _LANE_BITS + _WARP_BITS
_BLOCK_SHIFT = _CLOCK_SHIFT + _WARP_EPOCH_BITS
_LANES = np.int32((1 << _LANE_BITS) - 1)
_WARPS = np.int32(((1 << _WARP_BITS) - 1) << _WARP_SHIFT)
_NOBODY = np.int32(-1)


class Clock:
    """What orders the accesses of the threads of some blocks: how many barriers each of them has passed."""

    def __init__(self, threads: Array) -> None:
        self._block_epoch, self._warp_epoch = (np.zeros(len(threads), np.int32) for _ in range(2))
        self._who = (threads // 32 << _WARP_SHIFT | threads % 32).astype(np.int32)
        self.stamps = self._who.copy()

    def pass_block_barrier(self, lanes: Array) -> None:
        self._block_epoch[lanes] += 1
        self._warp_epoch[lanes] = 0
        self._update(lanes)

    def pass_warp_barrier(self, lanes: Array) -> None:
        self._warp_epoch[lanes] += 1
        self._update(lanes)

    def _update(self, lanes: Array) -> None:
        block, warp = self._block_epoch[lanes], self._warp_epoch[lanes]
        if (block >> _BLOCK_EPOCH_BITS).any() or (warp >> _WARP_EPOCH_BITS).any():
            raise Fault("more barriers than the interpreter can tell apart; widen the stamps in memory.py")
        self.stamps[lanes] = block << _BLOCK_SHIFT | warp << _CLOCK_SHIFT | self._who[lanes]


def _unordered(stamps: Array, mine: Array) -> Array:
    """Where another thread did something that no barrier separates from what happens now."""
    recent = stamps >> _BLOCK_SHIFT == mine >> _BLOCK_SHIFT
    if not recent.any():
        return recent
    difference = stamps ^ mine
    other_warp, other_lane = (difference & _WARPS) != 0, (difference & _LANES) != 0
    same_clock = stamps >> _CLOCK_SHIFT == mine >> _CLOCK_SHIFT
    return recent & (other_warp | (other_lane & same_clock))


class SharedMemory:
    """Shared memory of some blocks that run at once."""

    def __init__(self, blocks: int, size: int, clock: Clock) -> None:
        self.size, self._clock = size, clock
        self._stride = -(-size // 16) * 16 or 16
        cells = blocks * self._stride // _CELL
        self._data = np.full(blocks * self._stride, 0xFF, np.uint8)
        self._state = np.full(cells, _NEVER_WRITTEN, np.uint8)
        self._reader, self._writer = (np.full(cells, _NOBODY, np.int32) for _ in range(2))

    def load(self, addresses: Array, size: int, blocks: Array, lanes: Array) -> Array:
        """Bytes ``[lanes, size]``."""
        rows, cells = self._rows(addresses, size, blocks, lanes)
        state = self._state.reshape(-1, cells)[rows]
        if (state != _WRITTEN).any():
            self._report(state == _ON_ITS_WAY, "a read of what a copy is still bringing", lanes)
            self._report(state == _NEVER_WRITTEN, "a read of what nobody wrote", lanes)
            self._report(state == _SET_ASIDE, "a read of a barrier or tile", lanes)
        mine = self._clock.stamps[lanes][:, None]
        self._report(_unordered(self._writer.reshape(-1, cells)[rows], mine), "a race of this read with a write", lanes)
        self._note_readers(rows, cells, mine)
        return self._data.reshape(-1, size)[rows]

    def store(self, addresses: Array, values: Array, blocks: Array, lanes: Array) -> None:
        """Writes bytes ``[lanes, size]``."""
        rows = self._claim(addresses, values.shape[1], blocks, lanes)
        self._arrive(rows, values, lanes)

    def begin_copy(self, addresses: Array, size: int, blocks: Array, lanes: Array) -> Array:
        """Where an asynchronous copy will arrive; until then nobody may touch it."""
        rows = self._claim(addresses, size, blocks, lanes)
        self._state.reshape(-1, size // _CELL)[rows] = _ON_ITS_WAY
        self._data.reshape(-1, size)[rows] = 0xFF
        return rows

    def finish_copy(self, rows: Array, values: Array, lanes: Array) -> None:
        self._arrive(rows, values, lanes)

    # --- tiles and barriers, which asynchronous.py watches ---

    def set_aside(self, block: int, offsets: Array, size: int) -> None:
        """Leaves memory to instructions that are no ordinary accesses."""
        if (offsets < 0).any() or (offsets + size > self.size).any() or (offsets % size).any():
            raise Fault(f"shared memory: {size} bytes that are outside of it or not aligned, for a barrier or tile")
        cells = (block * self._stride + offsets)[:, None] // _CELL + np.arange(size // _CELL)
        if not np.isin(self._state[cells], (_NEVER_WRITTEN, _SET_ASIDE)).all():
            raise Fault("shared memory: a barrier or tile where ordinary accesses are")
        self._state[cells] = _SET_ASIDE

    def put(self, block: int, offsets: Array, values: Array) -> None:
        """Bytes ``[offsets, size]`` of tiles."""
        self._data[(block * self._stride + offsets)[:, None] + np.arange(values.shape[1])] = values

    def take(self, blocks: Array, offsets: Array, size: int) -> Array:
        """Bytes ``[blocks, offsets, size]`` of tiles."""
        return self._data[(blocks[:, None] * self._stride + offsets)[:, :, None] + np.arange(size)]

    # --- ---

    def _arrive(self, rows: Array, values: Array, lanes: Array) -> None:
        size = values.shape[1]
        self._data.reshape(-1, size)[rows] = values
        self._state.reshape(-1, size // _CELL)[rows] = _WRITTEN
        self._writer.reshape(-1, size // _CELL)[rows] = self._clock.stamps[lanes][:, None]

    def _claim(self, addresses: Array, size: int, blocks: Array, lanes: Array) -> Array:
        """Checks that these lanes may write, and notes that they do."""
        rows, cells = self._rows(addresses, size, blocks, lanes)
        state = self._state.reshape(-1, cells)[rows]
        self._report(state == _ON_ITS_WAY, "a write over what a copy is still bringing", lanes)
        self._report(state == _SET_ASIDE, "a write to a barrier or tile", lanes)
        mine = self._clock.stamps[lanes][:, None]
        writer = self._writer.reshape(-1, cells)
        self._report(_unordered(self._reader.reshape(-1, cells)[rows], mine), "a race of this write with a read", lanes)
        self._report(_unordered(writer[rows], mine), "a race of this write with another", lanes)
        writer[rows] = mine
        self._report(writer[rows] != mine, "a race of two writes in one instruction", lanes)
        return rows

    def _note_readers(self, rows: Array, cells: int, mine: Array) -> None:
        reader = self._reader.reshape(-1, cells)
        before = reader[rows]
        after = np.broadcast_to(mine, before.shape)
        if (before >> _BLOCK_SHIFT == mine >> _BLOCK_SHIFT).any():
            after = self._joined(before, after)
        reader[rows] = after
        lost = reader[rows] != after  # another lane of this instruction read the same
        if lost.any():
            flat = (rows[:, None] * cells + np.arange(cells))[lost]
            joined = self._joined(self._reader[flat], after[lost])
            several_warps = (joined & _WARPS) == _WARPS
            self._reader[flat] = joined
            self._reader[flat[several_warps]] = joined[several_warps]

    @staticmethod
    def _joined(before: Array, after: Array) -> Array:
        """The stamps of later reads, which also stand for the earlier ones that a write must wait for."""
        difference = before ^ after
        recent = before >> _BLOCK_SHIFT == after >> _BLOCK_SHIFT
        other_warp = recent & ((difference & _WARPS) != 0)
        other_lane = (before >> _CLOCK_SHIFT == after >> _CLOCK_SHIFT) & ((difference & _LANES) != 0)
        joined = np.where(other_lane, after | _LANES, after)
        return np.where(other_warp, joined | _WARPS, joined)

    def _rows(self, addresses: Array, size: int, blocks: Array, lanes: Array) -> tuple[Array, int]:
        """Which rows of all shared memory, ``size`` bytes each, the addresses are, and how many cells a row has."""
        offsets = addresses.astype(np.int64) - SHARED_BASE
        bad = (offsets < 0) | (offsets + size > self.size)
        if bad.any():
            raise Fault(
                f"shared memory: an access of {size} bytes at offset {int(offsets[bad][0])} of {self.size}",
                _first(bad, lanes),
            )
        _check_aligned("shared memory", offsets, size, lanes)
        if size % _CELL:
            raise Fault(f"shared memory: an access of {size} byte, but a cell has {_CELL}; make cells smaller")
        return (blocks * self._stride + offsets) // size, size // _CELL

    @staticmethod
    def _report(bad: Array, what: str, lanes: Array) -> None:
        if bad.any():
            raise Fault(f"shared memory: {what}", _first(bad.any(1), lanes))
