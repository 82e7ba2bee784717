"""Runs one block of threads of a kernel, instruction by instruction, to learn which instructions its warps execute.

Integers, predicates, addresses, branches and barriers are exact, so loops run as often as they would. Every number that
the kernel reads from a tensor is the same, 0.5, and every matrix product gives 0.5: values do not matter to the count,
except where a branch asks for them. Such a branch takes the way of equal scores. An access outside of the memory of
the call is an error, as is an instruction that the table does not know.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from . import floats, integers, memory  # noqa: F401 -- they fill the table
from .listing import INSTRUCTION_BYTES, Instruction, Kernel
from .operands import (
    FULL,
    LANES,
    TRUE,
    UNIFORM_ZERO,
    ZERO_REGISTER,
    NotUnderstood,
    Place,
    Value,
    active,
    condition,
    first,
    lanes_of,
    source,
)
from .table import DATA, Step, nothing, step_of

STACK = 1 << 24  # where a thread's own memory ends
RESERVED_SHARED = {"80": 0, "90": 1024, "90a": 1024}  # bytes before those of the kernel
FIRST_ARGUMENT = {"80": 0x160, "90": 0x210, "90a": 0x210}  # in constant bank 0
MOST_INSTRUCTIONS = 5_000_000  # of a warp


@dataclass(frozen=True)
class Region:
    """Memory of a tensor, filled with one 32-bit word, or with 0, 1, ... up to a period, again and again."""

    name: str
    address: int
    bytes: int
    word: int = DATA
    period: int = 0  # 0: the one word

    def read(self, place: int) -> int:
        """The word at an address."""
        return (place - self.address) // 4 % self.period if self.period else self.word


@dataclass(frozen=True)
class Launch:
    kernel: str  # mangled name
    blocks: int
    threads: int
    shared_bytes: int
    arguments: bytes
    regions: tuple[Region, ...] = ()


# --- warps and blocks ------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Lanes of a warp that are at the same instruction."""

    index: int
    mask: int


class Warp:
    def __init__(self, block: Block, number: int) -> None:
        self.block, self.number = block, number
        self.registers: list[Value] = [0] * 256
        self.uniform: list[int] = [0] * 64
        self.predicates = [0] * 7 + [FULL]
        self.uniform_predicates = [0] * 7 + [FULL]
        self.convergence: dict[str, int] = {}  # lanes that meet at a BSYNC, by barrier register
        self.own_memory: dict[int, Value] = {}
        self.groups = [Group(0, FULL)]
        self.waiting: list[tuple[str, Group]] = []  # at a BSYNC, with its barrier register
        # Indices of the instructions in the order of their issue, complemented where no lane did what they say.
        self.trace: list[int] = []

    def write(self, to: Place, value: Value, mask: int, offset: int = 0) -> None:
        if to.predicate:
            if to.index != TRUE:
                file = self.uniform_predicates if to.uniform else self.predicates
                if to.uniform:
                    value, mask = (FULL if value & mask else 0), FULL
                file[to.index] = file[to.index] & ~mask | value & mask
        elif to.uniform:
            if to.index != UNIFORM_ZERO:
                self.uniform[to.index + offset] = first(value, mask)
        elif to.index != ZERO_REGISTER:
            index = to.index + offset
            if mask != FULL:
                before, after = lanes_of(self.registers[index]), lanes_of(value)
                value = [after[lane] if mask >> lane & 1 else before[lane] for lane in range(LANES)]
            self.registers[index] = value

    def live(self) -> int:
        return sum(group.mask for group in self.groups) + sum(group.mask for _, group in self.waiting)

    def run(self) -> tuple[str, int] | None:
        """Run to the next barrier and return its number and how many threads it waits for, or None at the end."""
        program, trace = self.block.program, self.trace
        decoded = program.decoded
        while self.groups:
            group = self.groups[0] if len(self.groups) == 1 else min(self.groups, key=lambda group: group.index)
            instruction, guard, flow, step = decoded[group.index] or program.decode(group.index)
            lanes = group.mask & guard(self) if guard else group.mask
            trace.append(group.index if lanes else ~group.index)
            if flow is None:
                if lanes:
                    step(self, lanes)
                group.index += 1
            elif (barrier := flow(self, group, lanes)) is not None:
                return barrier
            if len(self.groups) > 1:
                self._merge()
            if len(trace) > MOST_INSTRUCTIONS:
                raise NotUnderstood(f"more than {MOST_INSTRUCTIONS} instructions, now at {instruction.text!r}")
        if self.waiting:
            raise NotUnderstood("lanes wait for others that have ended")
        return None

    def _merge(self) -> None:
        by_index: dict[int, Group] = {}
        for group in self.groups:
            if group.index in by_index:
                by_index[group.index].mask |= group.mask
            else:
                by_index[group.index] = group
        self.groups = list(by_index.values())

    def jump(self, group: Group, lanes: int, target: int) -> None:
        """Send some lanes of a group elsewhere, and the others to the next instruction."""
        rest = group.mask & ~lanes
        group.index += 1
        if not lanes:
            return
        if rest:
            group.mask = rest
            self.groups.append(Group(target, lanes))
        else:
            group.index = target

    def end(self, group: Group, lanes: int) -> None:
        group.mask &= ~lanes
        group.index += 1
        if not group.mask:
            self.groups.remove(group)
        for register in self.convergence:
            self.convergence[register] &= ~lanes
        self.release()

    def meet(self, register: str, group: Group) -> None:
        """BSYNC: go on when all lanes of the barrier register are here."""
        group.index += 1
        if self.convergence.get(register, 0) & ~group.mask:
            self.groups.remove(group)
            self.waiting.append((register, group))
            self.release()

    def release(self) -> None:
        for register in {name for name, _ in self.waiting}:
            arrived = [group for name, group in self.waiting if name == register]
            if not self.convergence[register] & ~sum(group.mask for group in arrived):
                self.groups += arrived
                self.waiting = [(name, group) for name, group in self.waiting if name != register]
                self._merge()


Flow = Callable[[Warp, Group, int], "tuple[str, int] | None"]
Decoded = tuple[Instruction, "Callable[[Warp], int] | None", "Flow | None", Step]


class Program:
    """A kernel, with the meaning of each instruction that has been executed."""

    def __init__(self, kernel: Kernel, architecture: str) -> None:
        self.kernel, self.architecture = kernel, architecture
        self.decoded: list[Decoded | None] = [None] * len(kernel.instructions)

    def decode(self, index: int) -> Decoded:
        instruction = self.kernel.instructions[index]
        try:
            guard = condition(instruction.guard) if instruction.guard else None
            flow = flow_of(instruction, self.kernel.labels)
            step = step_of(instruction) if flow is None else nothing
        except (NotUnderstood, KeyError, ValueError, IndexError) as error:
            raise NotUnderstood(f"{self.kernel.name}: {instruction.text!r} has no meaning here: {error!r}") from error
        decoded = self.decoded[index] = (instruction, guard, flow, step)
        return decoded


class Block:
    """One block of threads, with its shared memory."""

    def __init__(self, program: Program, launch: Launch, index: int) -> None:
        self.program, self.index = program, index
        first_argument = FIRST_ARGUMENT[program.architecture]
        start = program.kernel.constant_bytes - len(launch.arguments)
        if start not in (first_argument, -(-first_argument // 128) * 128):  # as tensor maps are aligned
            expected = program.kernel.constant_bytes - first_argument
            raise NotUnderstood(f"{launch.kernel} takes {expected} bytes of arguments, not {len(launch.arguments)}")
        bank = bytearray(start) + launch.arguments
        bank[0:4], bank[12:16] = launch.threads.to_bytes(4, "little"), launch.blocks.to_bytes(4, "little")
        bank[4:12] = bank[16:24] = (1).to_bytes(4, "little") * 2
        bank[0x28:0x2C] = STACK.to_bytes(4, "little")
        self.bank = bytes(bank)
        shared = RESERVED_SHARED[program.architecture] + program.kernel.shared_bytes + launch.shared_bytes
        self.shared = bytearray(DATA.to_bytes(4, "little") * (shared // 4 + 1))
        self.shared_bytes = shared
        self.regions = sorted(launch.regions, key=lambda region: region.address)
        self.starts = [region.address for region in self.regions]
        self.warps = [Warp(self, number) for number in range(launch.threads // LANES)]

    def constant(self, bank: int, at: int, size: int) -> int:
        content = {0: self.bank, 2: self.program.kernel.literals}.get(bank, b"")
        return int.from_bytes(content[at : at + size], "little")  # 0 for a lane that is elsewhere

    def region(self, place: int, size: int) -> Region:
        index = bisect_right(self.starts, place) - 1
        if index >= 0 and place + size <= self.regions[index].address + self.regions[index].bytes:
            return self.regions[index]
        raise NotUnderstood(f"an access of {size} bytes at {place:#x}, outside of the memory of the call")

    def run(self) -> list[list[int]]:
        """Run all warps and return their traces."""
        runnable, left = list(self.warps), len(self.warps)
        waiting: dict[str, list[tuple[Warp, int]]] = {}
        while runnable:
            warp = runnable.pop(0)
            stopped = warp.run()
            if stopped is None:
                left -= 1
            else:
                waiting.setdefault(stopped[0], []).append((warp, stopped[1]))
            for name, warps in list(waiting.items()):
                needed = warps[0][1] or left
                if warps and len(warps) >= needed:
                    runnable += [warp for warp, _ in warps]
                    del waiting[name]
        if waiting:
            raise NotUnderstood(f"warps wait for ever at barrier {', '.join(waiting)}")
        return [warp.trace for warp in self.warps]


# --- control flow ----------------------------------------------------------------------------------------------------


def flow_of(instruction: Instruction, labels: dict[str, int]) -> Flow | None:
    """What an instruction does to the groups of a warp, or None where it only computes."""
    name, operands = instruction.name, instruction.operands

    def target() -> int:
        return labels[operands[-1].removeprefix("`(").removesuffix(")")]

    if name == "BRA" and ".DIV" in instruction.opcode:
        to, together = target(), source(operands[0])
        return lambda warp, group, lanes: warp.jump(group, lanes if together(warp) & ~group.mask else 0, to)
    if name == "BRA" and ".CONV" in instruction.opcode:
        to, together = target(), source(operands[0])
        return lambda warp, group, lanes: warp.jump(group, 0 if together(warp) & ~group.mask else lanes, to)
    if name in ("BRA", "CALL", "JMP"):
        to, conditions = target(), [condition(operand) for operand in operands[:-1]]

        def branch(warp: Warp, group: Group, lanes: int) -> None:
            for asked in conditions:
                lanes &= asked(warp)
            warp.jump(group, lanes, to)

        return branch
    if name == "RET":
        where = source(operands[0])

        def back(warp: Warp, group: Group, lanes: int) -> None:
            targets = set(active(where(warp), lanes))
            if len(targets) != 1 or lanes != group.mask:
                raise NotUnderstood(f"{instruction.text!r} returns to several places")
            warp.jump(group, lanes, targets.pop() // INSTRUCTION_BYTES)

        return back
    if name == "EXIT":
        return lambda warp, group, lanes: warp.end(group, lanes)
    if name == "BSSY":

        def gather(warp: Warp, group: Group, lanes: int) -> None:
            warp.convergence[operands[0]] = lanes
            group.index += 1

        return gather
    if name == "BSYNC":
        return lambda warp, group, lanes: warp.meet(operands[0], group)
    if name == "BREAK":

        def leave(warp: Warp, group: Group, lanes: int) -> None:
            warp.convergence[operands[-1]] &= ~lanes
            group.index += 1
            warp.release()

        return leave
    if name == "WARPSYNC":
        if instruction.opcode != "WARPSYNC.ALL":
            return None

        def together_again(warp: Warp, group: Group, lanes: int) -> None:
            warp.convergence["all"] = warp.live()
            warp.meet("all", group)

        return together_again
    if name == "BAR":
        if "SYNC" not in instruction.opcode:
            raise NotUnderstood("only BAR.SYNC is")
        threads = source(operands[1]) if len(operands) > 1 else None

        def barrier(warp: Warp, group: Group, lanes: int) -> tuple[str, int] | None:
            if not lanes:
                group.index += 1
                return None
            if group.mask != warp.live() or lanes != group.mask:
                raise NotUnderstood(f"{instruction.text!r} while lanes of a warp are elsewhere")
            group.index += 1
            return operands[0], first(threads(warp), lanes) // LANES if threads else 0

        return barrier
    return None
