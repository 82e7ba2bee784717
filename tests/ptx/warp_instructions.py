"""What the 32 threads of a warp do together. Every function gets the numbers of whole warps, ``[warps, 32]``.

To add an instruction, proceed as in ``instructions.py``. The machine brings the threads together; it reports a warp of
which not every thread arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from ptx import tensor_core
from ptx.faults import Fault, UnknownInstruction
from ptx.instructions import modifiers
from ptx.operands import Array, Reader, address, reader, writer
from ptx.parser import Instruction, Kernel, elements

if TYPE_CHECKING:
    from ptx.machine import Machine

WarpStep = Callable[["Machine", Array], None]
WarpBuilder = Callable[[Kernel, Instruction], WarpStep]

WARP_TABLE: dict[str, WarpBuilder] = {}


def warp_instruction(name: str) -> Callable[[WarpBuilder], WarpBuilder]:
    def register(builder: WarpBuilder) -> WarpBuilder:
        WARP_TABLE[name] = builder
        return builder

    return register


def _check_mask(mask: Reader, machine: Machine, lanes: Array) -> None:
    if (mask(machine, lanes.ravel()) != np.uint32(0xFFFFFFFF)).any():
        raise Fault("a mask that does not name all threads of the warp", int(lanes.flat[0]))


@warp_instruction("bar.warp.sync")
def _sync(kernel: Kernel, of: Instruction) -> WarpStep:
    mask = reader(kernel, of.operands[0], "u32")

    def step(machine: Machine, lanes: Array) -> None:
        _check_mask(mask, machine, lanes)
        machine.clock.pass_warp_barrier(lanes.ravel())

    return step


@warp_instruction("shfl.sync.bfly.b32")
@warp_instruction("shfl.sync.idx.b32")
def _shuffle(kernel: Kernel, of: Instruction) -> WarpStep:
    by_index = ".idx." in of.opcode
    result, value, distance, clamp, mask = of.operands
    operands = (value, distance, clamp, mask)
    value_of, distance_of, clamp_of, mask_of = (reader(kernel, operand, "u32") for operand in operands)
    register, _, predicate = result.partition("|")
    write = writer(kernel, register, "u32")
    write_predicate = writer(kernel, predicate or "_", "pred")

    def step(machine: Machine, lanes: Array) -> None:
        flat = lanes.ravel()
        _check_mask(mask_of, machine, lanes)
        if (clamp_of(machine, flat) != np.uint32(31)).any():
            raise Fault("an exchange within a part of a warp, which is not modelled", int(flat[0]))
        values = np.broadcast_to(value_of(machine, flat), flat.shape).reshape(lanes.shape)
        distances = np.broadcast_to(distance_of(machine, flat), flat.shape).reshape(lanes.shape)
        sources = (distances & 31 if by_index else np.arange(32) ^ distances).astype(np.intp)
        write(machine, flat, np.take_along_axis(values, sources, axis=1).ravel())
        write_predicate(machine, flat, np.ones(flat.shape, np.bool_))

    return step


@warp_instruction("vote.sync.ballot.b32")
def _ballot(kernel: Kernel, of: Instruction) -> WarpStep:
    vote, mask = reader(kernel, of.operands[1], "pred"), reader(kernel, of.operands[2], "u32")
    write = writer(kernel, of.operands[0], "b32")

    def step(machine: Machine, lanes: Array) -> None:
        flat = lanes.ravel()
        _check_mask(mask, machine, lanes)
        votes = np.broadcast_to(vote(machine, flat), flat.shape).reshape(lanes.shape)
        bits = (votes.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        write(machine, flat, np.repeat(bits, 32))

    return step


@warp_instruction("ldmatrix.sync.aligned.m8n8.x4")
def _ldmatrix(kernel: Kernel, of: Instruction) -> WarpStep:
    transpose = "trans" in modifiers(of, "ldmatrix.sync.aligned.m8n8.x4", "trans shared b16")
    at = address(kernel, of.operands[1])
    writers = [writer(kernel, result, "b32") for result in elements(of.operands[0])]

    def step(machine: Machine, lanes: Array) -> None:
        flat = lanes.ravel()
        rows = machine.load("shared", at(machine, flat), 16, flat).reshape(*lanes.shape, 16)
        registers = tensor_core.load_matrices(rows, transpose)
        for number, write in enumerate(writers):
            write(machine, flat, registers[..., number].ravel())

    return step


_SHAPES = {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}


@warp_instruction("mma.sync.aligned")
def _mma(kernel: Kernel, of: Instruction) -> WarpStep:
    kind = of.opcode.split(".")[-2]
    if of.opcode != f"mma.sync.aligned.{_SHAPES.get(kind)}.row.col.f32.{kind}.{kind}.f32":
        raise UnknownInstruction(str(of))
    result, *factors, addend = map(elements, of.operands)
    left, right = ([reader(kernel, register, "b32") for register in factor] for factor in factors)
    start = [reader(kernel, register, "f32") for register in addend]
    writers = [writer(kernel, register, "f32") for register in result]

    def step(machine: Machine, lanes: Array) -> None:
        flat = lanes.ravel()

        def gathered(readers: list[Reader]) -> Array:
            values = [np.broadcast_to(value(machine, flat), flat.shape) for value in readers]
            return np.stack(values, axis=-1).reshape(*lanes.shape, len(readers))

        products = tensor_core.multiply_add(kind, gathered(left), gathered(right), gathered(start))
        for number, write in enumerate(writers):
            write(machine, flat, products[..., number].ravel())

    return step
