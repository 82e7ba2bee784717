"""How instructions read and write their operands: registers, immediate numbers, special registers, addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx.faults import UnknownInstruction
from ptx.parser import Kernel

if TYPE_CHECKING:
    from ptx.machine import Machine

Array = NDArray[Any]
Lanes = slice | NDArray[np.intp]  # all threads, or the numbers of some
Reader = Callable[["Machine", Lanes], Any]  # a value for each lane, or one number for all of them
Writer = Callable[["Machine", Lanes, Any], None]

DTYPES: dict[str, Any] = {
    **{
        f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
        for kind, letter in (("u", "u"), ("b", "u"), ("s", "i"))
        for bits in (8, 16, 32, 64)
    },
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f16": np.dtype(np.uint16),  # its bits
    "bf16": np.dtype(np.uint16),
    "pred": np.dtype(np.bool_),
}
SPECIAL: dict[str, Reader] = {
    "%tid.x": lambda machine, lanes: machine.threads[lanes],
    "%ctaid.x": lambda machine, lanes: machine.blocks[lanes],
    "%ntid.x": lambda machine, lanes: np.uint32(machine.threads_per_block),
    "%nctaid.x": lambda machine, lanes: np.uint32(machine.grid),
    "%laneid": lambda machine, lanes: machine.threads[lanes] % np.uint32(32),
}


def dtype_of(kind: str) -> Any:
    if kind not in DTYPES:
        raise UnknownInstruction(f"the type .{kind}")
    return DTYPES[kind]


def reader(kernel: Kernel, operand: str, kind: str) -> Reader:
    """Reads an operand as a type of PTX; of a register that is wider, its lowest bits."""
    dtype = dtype_of(kind)
    if operand.startswith("!"):
        value_of = reader(kernel, operand[1:], kind)
        return lambda machine, lanes: ~value_of(machine, lanes)
    if operand in SPECIAL:
        return SPECIAL[operand]
    if operand in kernel.registers:
        stored = dtype_of(kernel.registers[operand])
        if dtype.itemsize == stored.itemsize:
            return lambda machine, lanes: machine.registers[operand][lanes].view(dtype)
        if dtype.itemsize > stored.itemsize:
            raise UnknownInstruction(f"the {stored.itemsize} bytes of {operand} read as .{kind}")
        bits = np.dtype(f"u{dtype.itemsize}")
        return lambda machine, lanes: machine.registers[operand][lanes].astype(bits).view(dtype)
    number = _immediate(kernel, operand, dtype)
    return lambda machine, lanes: number


def _immediate(kernel: Kernel, operand: str, dtype: Any) -> Any:
    if operand in kernel.symbols:
        return dtype.type(kernel.symbols[operand])
    if dtype == np.bool_:
        return np.bool_(int(operand, 0))
    if re.fullmatch(r"0[fd][0-9a-fA-F]+", operand):
        bits = np.dtype(np.uint32 if operand[1] == "f" else np.uint64)
        return bits.type(int(operand[2:], 16)).view(dtype)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
        mask = (1 << 8 * dtype.itemsize) - 1
        return np.dtype(f"u{dtype.itemsize}").type(int(operand.rstrip("U"), 0) & mask).view(dtype)
    raise UnknownInstruction(f"the operand {operand!r}")


def writer(kernel: Kernel, operand: str, kind: str) -> Writer:
    """Writes values of a type of PTX to a register; one that is wider takes them extended by zeros or the sign."""
    dtype = dtype_of(kind)
    if operand == "_":
        return lambda machine, lanes, values: None
    if operand not in kernel.registers:
        raise UnknownInstruction(f"the result {operand!r}")
    stored = dtype_of(kernel.registers[operand])
    if dtype.itemsize > stored.itemsize:
        raise UnknownInstruction(f".{kind} written to the {stored.itemsize} bytes of {operand}")
    wide = np.dtype(f"i{stored.itemsize}") if dtype.kind == "i" else stored

    def write(machine: Machine, lanes: Lanes, values: Any) -> None:
        assert values.dtype == dtype, (operand, values.dtype, dtype)
        if dtype.itemsize == stored.itemsize:
            machine.registers[operand][lanes] = values.view(stored)
        else:
            machine.registers[operand][lanes] = values.astype(wide).view(stored)

    return write


def address(kernel: Kernel, operand: str) -> Reader:
    """Reads ``[%rd1+8]``, ``[%rd1]`` or ``[symbol+8]`` as int64, an address for each lane."""
    match = re.fullmatch(r"\[([%$\w]+)(?:\+(-?\d+))?\]", operand)
    if match is None:
        raise UnknownInstruction(f"the address {operand}")
    base, offset = match[1], np.int64(match[2] or 0)
    kind = kernel.registers.get(base, "b64")
    base_of = reader(kernel, base, kind)

    def read(machine: Machine, lanes: Lanes) -> Array:
        bases = np.asarray(base_of(machine, lanes)).astype(np.int64) + offset
        return np.broadcast_to(bases, machine.numbers(lanes).shape)

    return read
