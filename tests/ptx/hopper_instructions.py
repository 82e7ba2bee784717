"""The instructions of sm_90a: barriers in shared memory, copies of tiles, products of warp groups.

Barriers are few, so their instructions go from thread to thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from ptx.asynchronous import TensorMap
from ptx.faults import Fault, UnknownInstruction
from ptx.instructions import Step, instruction, modifiers
from ptx.operands import Array, Lanes, Writer, address, reader, writer
from ptx.parser import Instruction, Kernel, elements
from ptx.warp_instructions import WarpStep, warp_instruction

if TYPE_CHECKING:
    from ptx.machine import Machine


def _threads(machine: Machine, lanes: Lanes) -> list[tuple[int, int, int]]:
    """Lane, block and warp of each."""
    width = machine.threads_per_block
    return [(int(lane), int(lane) // width, int(lane) % width // 32) for lane in machine.numbers(lanes)]


def _by_thread(kernel: Kernel, of: Instruction, act: Callable[..., None], kinds: str = "") -> Step:
    """``act(machine, block, warp, first address, other operands)`` of each thread."""
    addresses = [address(kernel, operand) for operand in of.operands if operand.startswith("[")]
    numbers = [operand for operand in of.operands if not operand.startswith("[") and operand != "_"]
    others = [reader(kernel, operand, kinds or "u32") for operand in numbers]

    def step(machine: Machine, lanes: Lanes) -> None:
        shape = machine.numbers(lanes).shape
        columns = [np.broadcast_to(value(machine, lanes), shape) for value in (*addresses, *others)]
        for number, (lane, block, warp) in enumerate(_threads(machine, lanes)):
            try:
                act(machine, block, warp, *(int(column[number]) for column in columns))
            except Fault as fault:
                raise Fault(str(fault), lane) from None

    return step


@instruction("mbarrier.init.shared::cta.b64")
def _init(kernel: Kernel, of: Instruction) -> Step:
    return _by_thread(kernel, of, lambda machine, *what: machine.tiles.init(*what))


@instruction("fence.mbarrier_init.release.cluster")
def _publish(kernel: Kernel, of: Instruction) -> Step:
    return _by_thread(kernel, of, lambda machine, *what: machine.tiles.publish(*what))


@instruction("mbarrier.arrive.shared::cta.b64", "mbarrier.arrive.expect_tx.shared::cta.b64")
def _arrive(kernel: Kernel, of: Instruction) -> Step:
    if of.operands[0] != "_" or len(of.operands) != (3 if "expect_tx" in of.opcode else 2):
        raise UnknownInstruction(str(of))
    return _by_thread(kernel, of, lambda machine, *what: machine.tiles.arrive(*what))


@instruction("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes")
def _copy(kernel: Kernel, of: Instruction) -> Step:
    to, source, barrier = of.operands
    match = re.fullmatch(r"\[(%\w+), \{(.*)\}\]", source)
    if match is None:
        raise UnknownInstruction(str(of))
    map_of, to_of, barrier_of = (address(kernel, operand) for operand in (f"[{match[1]}]", to, barrier))
    corner_of = [reader(kernel, operand.strip(), "s32") for operand in match[2].split(",")]

    def step(machine: Machine, lanes: Lanes) -> None:
        shape = machine.numbers(lanes).shape
        columns = [np.broadcast_to(value(machine, lanes), shape) for value in (map_of, to_of, barrier_of, *corner_of)]
        for number, (lane, block, warp) in enumerate(_threads(machine, lanes)):
            place, target, counted_at, *corner = (int(column[number]) for column in columns)
            content = machine.load("param", np.array([place]), 128, np.array([lane]))
            try:
                machine.tiles.copy(block, warp, target, TensorMap.read(content[0]), corner, counted_at)
            except Fault as fault:
                raise Fault(str(fault), lane) from None

    return step


@dataclass(frozen=True)
class Wait:
    """``mbarrier.try_wait``. It may give up once before the phase ends; after that it waits."""

    ended: Callable[[Machine, Lanes], Array]  # a bool for each thread
    acquire: Callable[[Machine, Lanes], None]
    write: Writer


def wait_of(kernel: Kernel, of: Instruction) -> Wait:
    result, place, parity = of.operands
    address_of, parity_of = address(kernel, place), reader(kernel, parity, "u32")

    def ended(machine: Machine, lanes: Lanes) -> Array:
        places, parities = (
            address_of(machine, lanes),
            np.broadcast_to(parity_of(machine, lanes), machine.numbers(lanes).shape),
        )
        known: dict[tuple[int, int, int, int], bool] = {}
        answers = []
        for (lane, block, warp), at, asked in zip(_threads(machine, lanes), places, parities, strict=True):
            question = block, warp, int(at), int(asked)
            if question not in known:
                try:
                    known[question] = machine.tiles.ended(*question)
                except Fault as fault:
                    raise Fault(str(fault), lane) from None
            answers.append(known[question])
        return np.array(answers, np.bool_)

    def acquire(machine: Machine, lanes: Lanes) -> None:
        of_threads = zip(_threads(machine, lanes), address_of(machine, lanes), strict=True)
        for block, warp, at in {(block, warp, int(at)) for (_, block, warp), at in of_threads}:
            machine.tiles.acquire(block, warp, at)

    return Wait(ended, acquire, writer(kernel, result, "pred"))


# --- products -------------------------------------------------------------------------------------------------------


def _of_warp(machine: Machine, lanes: Array, values: Array, what: str) -> Array:
    """The number that all lanes of a warp must agree on."""
    table = np.broadcast_to(values, lanes.size).reshape(lanes.shape)
    if (table != table[:, :1]).any():
        raise Fault(f"{what} differs between the threads of a warp", int(lanes.flat[0]))
    return table[:, 0]


@warp_instruction("wgmma.fence.sync.aligned")
def _fence(kernel: Kernel, of: Instruction) -> WarpStep:
    return lambda machine, lanes: machine.products.fence(lanes[:, 0] // 32)


@warp_instruction("wgmma.commit_group.sync.aligned")
def _commit(kernel: Kernel, of: Instruction) -> WarpStep:
    return lambda machine, lanes: machine.products.commit(lanes[:, 0] // 32)


@warp_instruction("wgmma.wait_group.sync.aligned")
def _wait(kernel: Kernel, of: Instruction) -> WarpStep:
    groups = int(of.operands[0])
    return lambda machine, lanes: machine.products.wait(lanes[:, 0] // 32, groups)


@warp_instruction("wgmma.mma_async.sync.aligned.m64n64k16.f32")
def _multiply(kernel: Kernel, of: Instruction) -> WarpStep:
    kind, other = modifiers(of, "wgmma.mma_async.sync.aligned.m64n64k16.f32", "bf16 f16")
    sums, left, right, adds, *rest = of.operands
    if kind != other or rest != ["1", "1", "0", "0"]:  # nothing negated, nothing transposed
        raise UnknownInstruction(str(of))
    registers = tuple(elements(sums))
    left_of, right_of = reader(kernel, left, "b64"), reader(kernel, right, "b64")
    adds_of = reader(kernel, adds, "pred")

    def step(machine: Machine, lanes: Array) -> None:
        flat = lanes.ravel()
        factors = [_of_warp(machine, lanes, value(machine, flat), "a factor") for value in (left_of, right_of)]
        machine.products.begin(
            lanes[:, 0] // 32, kind, registers, *factors, _of_warp(machine, lanes, adds_of(machine, flat), "scale-d")
        )

    return step
