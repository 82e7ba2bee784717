"""Runs a kernel: all threads of some blocks at once, each instruction for every thread that is there.

Threads that part at a branch meet again by the rule that those who are least far in the text run first. Where a barrier
or an instruction of a warp needs threads that never come, this is reported.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from ptx.asynchronous import Asynchronous
from ptx.copies import Copies
from ptx.faults import Fault, UnknownInstruction
from ptx.memory import Clock, GlobalMemory, SharedMemory
from ptx.operands import DTYPES, Array, Lanes
from ptx.program import Kind, Operation, Program
from ptx.warp_groups import Products

LANES_AT_ONCE = 2048  # more need more memory than caches hold
_EVERYONE = slice(None)


class State(IntEnum):
    RUNS = 0
    WAITS_FOR_WARP = 1
    WAITS_FOR_BLOCK = 2
    WAITS_FOR_PHASE = 3
    FINISHED = 4


def run(
    program: Program, parameters: bytes, memory: GlobalMemory, *, grid: int, threads: int, shared_bytes: int
) -> None:
    """Runs all blocks of a launch, some at a time.

    Args:
        parameters: the bytes of the kernel's argument.
        grid: the number of blocks.
        threads: of a block; whole warps.
        shared_bytes: dynamic shared memory of a block.

    Raises:
        Fault: what the kernel does wrong, with the instruction, its place in the source, the block and the thread.
    """
    memory.begin_launch()
    at_once = max(1, LANES_AT_ONCE // threads)
    for first in range(0, grid, at_once):
        blocks = range(first, min(grid, first + at_once))
        Machine(program, parameters, memory, blocks, grid, threads, shared_bytes).run()


class Machine:
    """Some blocks of a launch. A lane is a thread's number among all of their threads."""

    def __init__(
        self,
        program: Program,
        parameters: bytes,
        memory: GlobalMemory,
        blocks: range,
        grid: int,
        threads_per_block: int,
        shared_bytes: int,
    ) -> None:
        kernel = program.kernel
        if len(parameters) != kernel.parameter_bytes:
            raise Fault(f"{kernel.name} takes {kernel.parameter_bytes} bytes of arguments and gets {len(parameters)}")
        if threads_per_block % 32:
            raise Fault(f"expected whole warps in a block, got {threads_per_block} threads")
        self.program, self.memory = program, memory
        self.grid: int = grid
        self.threads_per_block: int = threads_per_block
        self.threads: Array = np.tile(np.arange(threads_per_block, dtype=np.uint32), len(blocks))
        self.blocks: Array = np.repeat(np.array(blocks, np.uint32), threads_per_block)
        count = len(self.threads)
        self._lanes = np.arange(count)
        self._block_of = np.repeat(np.arange(len(blocks)), threads_per_block)
        self.clock = Clock(self.threads)
        self.shared = SharedMemory(len(blocks), kernel.static_shared_bytes + shared_bytes, self.clock)
        self.copies = Copies(count, self._block_of, self.shared)
        self.tiles = Asynchronous(len(blocks), threads_per_block // 32, self.shared, memory)
        self.registers = _Registers(kernel.registers, count)
        self.products = Products(self, self.tiles)
        self._parameters = np.frombuffer(parameters, np.uint8)
        self._at = np.zeros(count, np.intp)  # the operation that a lane does next
        self._state = np.full(count, State.RUNS, np.int8)
        self._gave_up = np.zeros(count, np.bool_)  # waiting for the end of a phase

    # --- for instructions ---

    def numbers(self, lanes: Lanes) -> Array:
        return self._lanes[lanes]

    def load(self, space: str, addresses: Array, size: int, lanes: Array) -> Array:
        if space == "global":
            return self.memory.load(addresses, size, lanes)
        if space == "shared":
            return self.shared.load(addresses, size, self._block_of[lanes], lanes)
        bad = (addresses < 0) | (addresses + size > len(self._parameters)) | (addresses % size != 0)
        if bad.any():
            raise Fault("arguments: a read outside of them, or one that is not aligned", int(lanes[np.argmax(bad)]))
        return self._parameters[addresses[:, None] + np.arange(size)]

    def store(self, space: str, addresses: Array, values: Array, lanes: Array) -> None:
        if space == "global":
            self.memory.store(addresses, values, lanes)
        elif space == "shared":
            self.shared.store(addresses, values, self._block_of[lanes], lanes)
        else:
            raise UnknownInstruction(f"a store to .{space}")

    # --- the order of things ---

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while (self._state != State.FINISHED).any():
                runs = self._state == State.RUNS
                if runs.any():
                    self._run_lowest(runs)
                elif not self._end_phases():
                    self._report_missing()
            self.tiles.check_complete()
            self.products.check_complete()

    def _run_lowest(self, runs: Array) -> None:
        """Those who are least far, up to where others wait for them, or until they part, meet or finish."""
        everyone = bool(runs.all())
        places = self._at if everyone else self._at[runs]
        position = int(places.min())
        together = places == position
        lanes: Lanes = _EVERYONE
        others = np.iinfo(np.intp).max
        if not (everyone and together.all()):
            lanes = np.flatnonzero(runs & (self._at == position))
            if not together.all():
                others = int(places[~together].min())
        while position < others:
            operation = self.program.operation(position)
            acting = lanes if operation.predicate is None else self._acting(operation, lanes)
            try:
                if operation.kind is Kind.THREAD:
                    self._step(operation, acting)
                    position += 1
                elif operation.kind is Kind.BRANCH and acting is lanes:
                    position = operation.target
                elif acting is lanes and self._step_together(operation, lanes):
                    position += 1
                else:
                    self._at[lanes] = position + 1
                    self._part_or_meet(operation, position, acting)
                    return
            except Fault as fault:
                raise self._located(fault, operation) from None
        self._at[lanes] = position

    def _acting(self, operation: Operation, lanes: Lanes) -> Lanes:
        """The lanes whose predicate lets them do it: the same object where all do."""
        assert operation.predicate is not None
        does = np.broadcast_to(operation.predicate(self, lanes), self.numbers(lanes).shape)
        return lanes if does.all() else self.numbers(lanes)[does]

    def _step(self, operation: Operation, acting: Lanes) -> None:
        assert operation.step is not None
        if self.numbers(acting).size:
            operation.step(self, acting)

    def _step_together(self, operation: Operation, lanes: Lanes) -> bool:
        """Does it if nobody has to wait for others, and returns whether it is done."""
        if operation.kind is Kind.PHASE:
            return self._try_wait(operation, lanes)
        return operation.kind is Kind.WARP and self._step_of_warps(operation, lanes)

    def _step_of_warps(self, operation: Operation, lanes: Lanes) -> bool:
        """Does it if these lanes are whole warps, and returns whether they are."""
        assert operation.warp_step is not None
        numbers = self.numbers(lanes)
        if len(numbers) % 32:
            return False
        warps = numbers.reshape(-1, 32)
        if (warps[:, 0] % 32 != 0).any() or (warps[:, 31] - warps[:, 0] != 31).any():
            return False
        operation.warp_step(self, warps)
        return True

    def _part_or_meet(self, operation: Operation, position: int, acting: Lanes) -> None:
        lanes = self.numbers(acting)
        if operation.kind is Kind.BRANCH:
            self._at[lanes] = operation.target
        elif operation.kind is Kind.EXIT:
            self._state[lanes] = State.FINISHED
        elif operation.kind is Kind.WARP:
            self._meet_in_warps(operation, position, lanes)
        elif operation.kind is Kind.PHASE:
            self._wait_for_phase(operation, position, lanes)
        else:
            self._meet_in_blocks(position, lanes)

    def _meet_in_warps(self, operation: Operation, position: int, lanes: Array) -> None:
        """Those whose warp is complete do it; the others wait."""
        assert operation.warp_step is not None
        self._at[lanes], self._state[lanes] = position, State.WAITS_FOR_WARP
        here = (self._state == State.WAITS_FOR_WARP) & (self._at == position)
        complete = here.reshape(-1, 32).all(axis=1)
        if complete.any():
            warps = self._lanes.reshape(-1, 32)[complete]
            operation.warp_step(self, warps)
            self._at[warps], self._state[warps] = position + 1, State.RUNS

    def _meet_in_blocks(self, position: int, lanes: Array) -> None:
        self._at[lanes], self._state[lanes] = position, State.WAITS_FOR_BLOCK
        here = (self._state == State.WAITS_FOR_BLOCK) & (self._at == position)
        complete = here.reshape(-1, self.threads_per_block).all(axis=1)
        if complete.any():
            block_lanes = self._lanes.reshape(-1, self.threads_per_block)[complete].ravel()
            self.clock.pass_block_barrier(block_lanes)
            self.tiles.pass_block_barrier(np.flatnonzero(complete))
            self._at[block_lanes], self._state[block_lanes] = position + 1, State.RUNS

    def _try_wait(self, operation: Operation, lanes: Lanes) -> bool:
        """Returns whether no thread has to wait: the phase has ended, or the thread gives up for once."""
        assert operation.wait is not None
        ended = operation.wait.ended(self, lanes)
        numbers = self.numbers(lanes)
        if not (ended | ~self._gave_up[numbers]).all():
            return False
        self._pass_phase(operation, numbers, ended)
        return True

    def _pass_phase(self, operation: Operation, numbers: Array, ended: Array) -> None:
        assert operation.wait is not None
        self._gave_up[numbers] = ~ended
        operation.wait.write(self, numbers, ended)
        if ended.any():
            operation.wait.acquire(self, numbers[ended])

    def _wait_for_phase(self, operation: Operation, position: int, lanes: Array) -> None:
        """Those whose phase has ended, and those who give up for once, go on; the others wait."""
        assert operation.wait is not None
        ended = operation.wait.ended(self, lanes)
        goes_on = ended | ~self._gave_up[lanes]
        self._pass_phase(operation, lanes[goes_on], ended[goes_on])
        waits = lanes[~goes_on]
        self._at[waits], self._state[waits] = position, State.WAITS_FOR_PHASE

    def _end_phases(self) -> bool:
        """Nobody can go on: lets copies arrive until somebody can, and returns whether he can."""
        waits = np.flatnonzero(self._state == State.WAITS_FOR_PHASE)
        if not waits.size:
            return False
        places = self._at[waits]
        while True:
            for position in np.unique(places):
                operation, lanes = self.program.operation(int(position)), waits[places == position]
                assert operation.wait is not None
                self._state[lanes[operation.wait.ended(self, lanes)]] = State.RUNS
            if (self._state[waits] == State.RUNS).any():
                return True
            if not self.tiles.deliver():
                return False

    # --- what goes wrong ---

    def _report_missing(self) -> None:
        """Nobody can go on: somebody waits for threads that wait elsewhere or have finished."""
        phases = np.flatnonzero(self._state == State.WAITS_FOR_PHASE)
        if len(phases):
            operation = self.program.operation(int(self._at[phases[0]]))
            raise self._located(Fault("the end of a phase that never comes", int(phases[0])), operation)
        waits = np.flatnonzero((self._state == State.WAITS_FOR_WARP) | (self._state == State.WAITS_FOR_BLOCK))
        warps = waits[self._state[waits] == State.WAITS_FOR_WARP]
        lane = int((warps if len(warps) else waits)[0])
        who = "the warp" if self._state[lane] == State.WAITS_FOR_WARP else "the block"
        operation = self.program.operation(int(self._at[lane]))
        raise self._located(Fault(f"not every thread of {who} comes to this instruction", lane), operation)

    def _located(self, fault: Fault, operation: Operation) -> Fault:
        who = ""
        if fault.lane is not None:
            who = f" by thread {self.threads[fault.lane]} of block {self.blocks[fault.lane]}"
        return Fault(f"{fault}: {operation.source}{who}, in {self.program.kernel.name}", fault.lane)


class _Registers(dict[str, Array]):
    """The values of every lane, made when they are first needed. Undefined ones hold zeros."""

    def __init__(self, types: dict[str, str], count: int) -> None:
        super().__init__()
        self._types, self._count = types, count

    def __missing__(self, name: str) -> Array:
        values = self[name] = np.zeros(self._count, DTYPES[self._types[name]])
        return values
