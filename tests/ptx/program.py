"""A kernel whose every instruction has become a function, made once and run for many blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from ptx.faults import UnknownInstruction
from ptx.instructions import TABLE, Step, find
from ptx.operands import Reader, reader
from ptx.parser import Instruction, Kernel
from ptx.warp_instructions import WARP_TABLE, WarpStep


class Kind(Enum):
    THREAD = auto()  # each thread does it alone
    WARP = auto()  # the threads of a warp do it together
    BLOCK = auto()  # a barrier of the block
    BRANCH = auto()
    EXIT = auto()


@dataclass(frozen=True)
class Operation:
    source: Instruction
    kind: Kind
    predicate: Reader | None
    step: Step | None = None
    warp_step: WarpStep | None = None
    target: int = -1  # of a branch


@dataclass
class Program:
    kernel: Kernel
    operations: list[Operation] = field(default_factory=list)

    @classmethod
    def of(cls, kernel: Kernel) -> Program:
        """
        Raises:
            UnknownInstruction: the kernel holds one that is not modelled; the message names it.
        """
        return cls(kernel, [_operation(kernel, instruction) for instruction in kernel.instructions])


def _operation(kernel: Kernel, of: Instruction) -> Operation:
    predicate = reader(kernel, of.predicate, "pred") if of.predicate else None
    if of.opcode in ("bra", "bra.uni"):
        return Operation(of, Kind.BRANCH, predicate, target=kernel.labels[of.operands[0]])
    if of.opcode in ("ret", "exit"):
        return Operation(of, Kind.EXIT, predicate)
    if of.opcode == "bar.sync" and of.operands == ("0",):
        return Operation(of, Kind.BLOCK, predicate)
    if warp_builder := find(WARP_TABLE, of.opcode):
        return Operation(of, Kind.WARP, predicate, warp_step=warp_builder(kernel, of))
    if builder := find(TABLE, of.opcode):
        return Operation(of, Kind.THREAD, predicate, step=builder(kernel, of))
    raise UnknownInstruction(f"the instruction {of}")
