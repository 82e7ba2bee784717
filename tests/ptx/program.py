"""A kernel whose instructions become functions, made once and run for many blocks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from functools import cache

from ptx.faults import UnknownInstruction
from ptx.hopper_instructions import Wait, wait_of
from ptx.instructions import TABLE, Step, find
from ptx.operands import Reader, reader
from ptx.parser import Instruction, Kernel
from ptx.warp_instructions import WARP_TABLE, WarpStep


class Kind(Enum):
    THREAD = auto()  # each thread does it alone
    WARP = auto()  # the threads of a warp do it together
    BLOCK = auto()  # a barrier of the block
    PHASE = auto()  # a barrier in shared memory, for which each thread waits alone
    BRANCH = auto()
    EXIT = auto()


_CONTROL = {"bra": Kind.BRANCH, "bra.uni": Kind.BRANCH, "ret": Kind.EXIT, "exit": Kind.EXIT, "bar.sync": Kind.BLOCK}
_CONTROL["mbarrier.try_wait.parity.shared::cta.b64"] = Kind.PHASE


@dataclass(frozen=True)
class Operation:
    source: Instruction
    kind: Kind
    predicate: Reader | None
    step: Step | None = None
    warp_step: WarpStep | None = None
    wait: Wait | None = None
    target: int = -1  # of a branch


class Program:
    """The operations of a kernel, each made when it is first reached.

    Raises:
        UnknownInstruction: the kernel holds an instruction that is not modelled, reached or not.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._operations: list[Operation | None] = [None] * len(kernel.instructions)
        last_uses = {instruction.opcode: position for position, instruction in enumerate(kernel.instructions)}
        for position in last_uses.values():
            self.operation(position)

    def operation(self, position: int) -> Operation:
        operation = self._operations[position]
        if operation is None:
            operation = self._operations[position] = _operation(self.kernel, self.kernel.instructions[position])
        return operation


@cache
def _kind(opcode: str) -> Kind | None:
    if opcode in _CONTROL:
        return _CONTROL[opcode]
    if find(WARP_TABLE, opcode):
        return Kind.WARP
    return Kind.THREAD if find(TABLE, opcode) else None


def _operation(kernel: Kernel, of: Instruction) -> Operation:
    kind = _kind(of.opcode)
    if kind is None:
        raise UnknownInstruction(f"the instruction {of}")
    predicate = reader(kernel, of.predicate, "pred") if of.predicate else None
    if kind is Kind.BRANCH:
        return Operation(of, kind, predicate, target=kernel.labels[of.operands[0]])
    if kind is Kind.WARP and (warp_builder := find(WARP_TABLE, of.opcode)):
        return Operation(of, kind, predicate, warp_step=warp_builder(kernel, of))
    if kind is Kind.THREAD and (builder := find(TABLE, of.opcode)):
        return Operation(of, kind, predicate, step=builder(kernel, of))
    if kind is Kind.PHASE:
        return Operation(of, kind, predicate, wait=wait_of(kernel, of))
    if kind is Kind.BLOCK and of.operands != ("0",):
        raise UnknownInstruction(f"a barrier of a part of the block, {of}")
    return Operation(of, kind, predicate)
