"""What Hopper does beside its threads: barriers in shared memory, copies of tiles, and products that read these tiles.

Every warp has a clock: how much it knows to have happened of every warp and of the phases of every barrier. Who arrives
at a barrier gives his clock, and who sees the end of a phase takes the clocks of all that arrived. A copy may write
where somebody has read, and a product may read what a copy has brought, only if the clock says that it has happened.

Tiles and barriers belong to these instructions alone: an ordinary access to them is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ptx.faults import Fault, UnknownInstruction
from ptx.memory import GlobalMemory, SharedMemory
from ptx.operands import Array
from ptx.parser import SHARED_BASE

BARRIERS = 32  # of a block, at most
_CELL = 16  # bytes, which the swizzle keeps together
_ROW = 128  # bytes of a tile
_NEVER, _ON_ITS_WAY, _THERE = 0, 1, 2
_PENDING = np.iinfo(np.int32).max


def swizzled(addresses: Array) -> Array:
    """Where the bytes at an address of a tile lie: bits 7 to 9 change bits 4 to 6."""
    return addresses ^ (addresses >> 7 & 7) << 4


@dataclass(frozen=True)
class TensorMap:
    """What ``tests/cuda_on_host/hopper.h`` writes in the place of the driver's opaque bytes."""

    data: int
    sizes: tuple[int, ...]  # features, rows, heads, batches
    strides: tuple[int, ...]  # bytes, of all but features
    box_rows: int

    @classmethod
    def read(cls, content: Array) -> TensorMap:
        words = [int(word) for word in np.ascontiguousarray(content).view(np.uint64)]
        return cls(words[0], tuple(words[1:5]), tuple(words[5:8]), words[8])


@dataclass
class _Copy:
    block: int
    barrier: int
    cells: Array
    values: Array  # bytes [cells, 16]


class Asynchronous:
    """Of the blocks that run at once. Warps are numbered within a block; lanes are those of the machine."""

    def __init__(self, blocks: int, warps: int, shared: SharedMemory, memory: GlobalMemory) -> None:
        self._shared, self._memory = shared, memory
        self.warps = warps
        self._in_use = False
        self._addresses: dict[int, int] = {}  # numbers of barriers
        knows = warps + BARRIERS
        self._clock = np.zeros((blocks, warps, knows), np.int32)
        self._clock[:, range(warps), range(warps)] = 1
        shape = (blocks, BARRIERS)
        self._arrivals, self._missing, self._phase, self._bytes, self._maker, self._made = (
            np.zeros(shape, np.int32) for _ in range(6)
        )
        self._published = np.zeros(shape, np.bool_)
        self._gathered, self._released = (np.zeros((*shape, knows), np.int32) for _ in range(2))
        self._copies: list[_Copy] = []
        cells = -(-shared.size // _CELL)
        self._state = np.zeros((blocks, cells), np.int8)
        self._barrier, self._ends = (np.zeros((blocks, cells), np.int32) for _ in range(2))  # that showed the copy
        self._readers = np.zeros((blocks, cells, warps), np.int32)

    # --- barriers ---

    def init(self, block: int, warp: int, address: int, arrivals: int) -> None:
        self._in_use = True
        number = self._addresses.setdefault(address, len(self._addresses))
        if number >= BARRIERS:
            raise UnknownInstruction(f"more than {BARRIERS} barriers in shared memory")
        if self._arrivals[block, number]:
            raise Fault("a barrier is made a second time")
        self._shared.set_aside(block, np.array([address - SHARED_BASE]), 8)
        self._arrivals[block, number] = self._missing[block, number] = arrivals
        self._maker[block, number], self._made[block, number] = warp, self._clock[block, warp, warp]

    def publish(self, block: int, warp: int) -> None:
        self._published[block] |= (self._maker[block] == warp) & (self._arrivals[block] > 0)

    def arrive(self, block: int, warp: int, address: int, expected: int = 0) -> None:
        number = self._known(block, warp, address)
        if not self._missing[block, number]:
            raise Fault("one arrival too many at a barrier")
        self._bytes[block, number] += expected
        gathered, clock = self._gathered[block, number], self._clock[block, warp]
        np.maximum(gathered, clock, out=gathered)
        clock[warp] += 1
        self._missing[block, number] -= 1
        self._end_phase(block, number)

    def ended(self, block: int, warp: int, address: int, parity: int) -> bool:
        return bool(self._phase[block, self._known(block, warp, address)] & 1 != parity)

    def acquire(self, block: int, warp: int, address: int) -> None:
        clock = self._clock[block, warp]
        np.maximum(clock, self._released[block, self._addresses[address]], out=clock)

    def pass_block_barrier(self, blocks: Array) -> None:
        if self._in_use:
            self._clock[blocks] = self._clock[blocks].max(axis=1, keepdims=True)
            self._clock[np.ix_(blocks, range(self.warps), range(self.warps))] += np.eye(self.warps, dtype=np.int32)

    def _known(self, block: int, warp: int, address: int) -> int:
        number = self._addresses.get(address, -1)
        if number < 0 or not self._arrivals[block, number]:
            raise Fault("no barrier was made here")
        maker = self._maker[block, number]
        if self._clock[block, warp, maker] < self._made[block, number]:
            raise Fault("nothing orders the making of a barrier and its use")
        return number

    def _end_phase(self, block: int, number: int) -> None:
        if self._missing[block, number] or self._bytes[block, number]:
            return
        self._phase[block, number] += 1
        self._missing[block, number] = self._arrivals[block, number]
        self._released[block, number] = self._gathered[block, number]
        self._released[block, number, self.warps + number] = self._phase[block, number]
        self._gathered[block, number] = 0

    # --- copies ---

    def copy(self, block: int, warp: int, to: int, tensor: TensorMap, corner: list[int], barrier: int) -> None:
        """Starts a copy of a box; it arrives as late as it may."""
        number = self._known(block, warp, barrier)
        if not self._published[block, number]:
            raise Fault("a copy counts at a barrier that no fence has shown to copies")
        if to % _ROW:
            raise Fault("a tile that does not begin at a multiple of 128 bytes")
        rows, places = np.meshgrid(np.arange(tensor.box_rows), np.arange(_ROW // _CELL), indexing="ij")
        offsets = swizzled(to + rows * _ROW + places * _CELL).ravel() - SHARED_BASE
        self._shared.set_aside(block, offsets, _CELL)
        cells = offsets // _CELL
        if (self._state[block, cells] == _ON_ITS_WAY).any():
            raise Fault("a copy over what another is still bringing")
        clock = self._clock[block, warp]
        if (self._readers[block, cells] > clock[: self.warps]).any():
            raise Fault("a race of this copy with a product that reads what it overwrites")
        if (self._ends[block, cells] > clock[self.warps + self._barrier[block, cells]]).any():
            raise Fault("a race of this copy with another")
        self._state[block, cells] = _ON_ITS_WAY
        values = self._box(tensor, corner, rows.ravel(), places.ravel())
        self._copies.append(_Copy(block, number, cells, values))

    def _box(self, tensor: TensorMap, corner: list[int], rows: Array, places: Array) -> Array:
        """Bytes ``[cells, 16]``, zeros outside of the tensor."""
        feature, row, head, batch = corner
        if not (0 <= head < tensor.sizes[2] and 0 <= batch < tensor.sizes[3]):
            raise Fault("a copy of a head or batch that the tensor does not have")
        inside = (feature + places * (_CELL // 2) < tensor.sizes[0]) & (row + rows < tensor.sizes[1])
        addresses = tensor.data + batch * tensor.strides[2] + head * tensor.strides[1]
        addresses = addresses + (row + rows) * tensor.strides[0] + 2 * feature + places * _CELL
        values = np.zeros((len(rows), _CELL), np.uint8)
        if inside.any():
            values[inside] = self._memory.load(addresses[inside], _CELL, np.zeros(int(inside.sum()), np.intp))
        return values

    def deliver(self) -> bool:
        """Lets the last copy that was started arrive. Returns whether there was one."""
        if not self._copies:
            return False
        copy = self._copies.pop()
        block, cells, number = copy.block, copy.cells, copy.barrier
        self._shared.put(block, cells * _CELL, copy.values)
        self._state[block, cells] = _THERE
        self._barrier[block, cells], self._ends[block, cells] = number, self._phase[block, number] + 1
        self._bytes[block, number] -= copy.values.size
        self._end_phase(block, number)
        return True

    def check_complete(self) -> None:
        if self._copies:
            raise Fault("a copy is still on its way when its block has ended")

    # --- what products read ---

    def begin_read(self, blocks: Array, warps: Array, addresses: Array) -> Array:
        """Checks that each warp may read cells ``[warps, cells]``, and returns them."""
        cells = (addresses - SHARED_BASE) // _CELL
        if (cells < 0).any() or (cells >= self._state.shape[1]).any():
            raise Fault("a product of what is outside of shared memory")
        rows = blocks[:, None]
        if (self._state[rows, cells] == _ON_ITS_WAY).any():
            raise Fault("a product of what a copy is still bringing")
        if (self._state[rows, cells] == _NEVER).any():
            raise Fault("a product of what no copy brought")
        clock = self._clock[blocks, warps]
        seen = np.take_along_axis(clock, self.warps + self._barrier[rows, cells], axis=1)
        if (self._ends[rows, cells] > seen).any():
            raise Fault("a product of what a copy brought, without waiting for its barrier")
        self._readers[rows, cells, warps[:, None]] = _PENDING
        return cells

    def end_read(self, blocks: Array, warps: Array, cells: Array) -> Array:
        """Bytes ``[warps, cells, 16]``."""
        rows = blocks[:, None]
        self._readers[rows, cells, warps[:, None]] = self._clock[blocks, warps, warps][:, None]
        return self._shared.take(blocks, cells * _CELL, _CELL)
