"""A model of one sub-core of a multiprocessor: when it issues the instructions of the warps that live on it.

A sub-core issues one instruction a cycle. A warp's next one may go when the cycles are over that ptxas wrote behind the
one before (stall), when the scoreboards that it waits for are clear, and when its unit is free. How long results take,
and how often a unit takes an instruction, are tables below, put together from published measurements. The two numbers
that are least certain have a best and a worst case: see ``Assumptions``.

Not in the model: memory (a load takes 500 cycles, a copy to shared memory none), bank conflicts, the instruction cache,
and waiting at barriers for warps of other sub-cores or for copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .listing import NO_SCOREBOARD, Instruction, Kernel

SUB_CORES = 4
WARP = 32


@dataclass(frozen=True)
class Assumptions:
    product: int  # cycles for which a matrix product of 16 x 8 x 16 holds its unit
    branch: int  # cycles until a warp goes on after a taken branch


BEST, WORST = Assumptions(product=4, branch=4), Assumptions(product=8, branch=16)


@dataclass(frozen=True)
class Device:
    name: str
    multiprocessors: int
    hertz: float
    bytes_per_second: float
    shared_bytes: int  # of a multiprocessor
    float_interval: int  # cycles between two float instructions of a sub-core


DEVICES = {
    "80": Device("A100", 108, 1.41e9, 1.555e12, 164 * 1024, 2),
    "90": Device("H100", 132, 1.755e9, 3.35e12, 228 * 1024, 1),
}
DEVICES["90a"] = DEVICES["90"]
REGISTERS = 65536  # of a multiprocessor
RESERVED_SHARED = 1024  # bytes that a block takes beside what it asks for
BLOCKS_AT_MOST, WARPS_AT_MOST = 32, 64

# Cycles from the issue to the result, for instructions whose time ptxas leaves to a scoreboard.
LATENCY = {"LDC": 38, "LDS": 30, "LDSM": 33, "MUFU": 24, "SHFL": 25, "LDG": 500, "ATOMG": 500, "S2R": 25, "S2UR": 25}
LATENCY |= {
    "HMMA": 33,
    "HGMMA": 33,
    "VOTE": 10,
    "R2UR": 12,
    "LDGSTS": 20,
    "I2F": 20,
    "F2I": 20,
    "POPC": 20,
    "BAR": 20,
    "STS": 20,
}
LATENCY |= {"STG": 20, "CALL": 20, "F2F": 20, "LDL": 30, "STL": 20}
OTHER_LATENCY = 12
GROUPS = 6  # the scoreboard that stands for the products of warp groups, for which WARPGROUP.DEPBAR waits
READ_AT_MOST = 14  # cycles until the operands are read

INTEGER = "IADD3 LOP3 SHF ISETP LEA SEL FSEL FSETP FMNMX PLOP3 MOV VIADD PRMT P2R R2P IABS CS2R IMNMX VIMNMX"
INTEGER += " VIMNMX3 I2FP F2FP"
SHARED_MEMORY = "LDS LDSM STS LDG STG LDGSTS SHFL LDC"


def intervals(device: Device, assumed: Assumptions) -> dict[str, tuple[str, int]]:
    """The unit of each opcode, and for how many cycles one instruction holds it."""
    table = {name: ("integer", 2) for name in INTEGER.split()}
    table |= {name: ("memory", 4) for name in SHARED_MEMORY.split()}
    table |= {name: ("float", device.float_interval) for name in ("FADD", "FMUL", "FFMA")}
    return table | {"IMAD": ("multiply", 2), "MUFU": ("functions", 8), "HMMA": ("products", assumed.product)}


def held_by_group(instruction: Instruction, assumed: Assumptions) -> int:
    """For how many cycles a product of a warp group holds the unit of each sub-core, 16 of its rows."""
    rows, columns, depth = map(int, instruction.opcode.split(".")[1].split("x"))
    return assumed.product * (rows * columns * depth) // (4 * 16 * 8 * 16)


def cycles(kernel: Kernel, traces: Sequence[Sequence[int]], device: Device, assumed: Assumptions) -> int:
    """Return after how many cycles a sub-core has issued the traces of the warps that live on it."""
    units = intervals(device, assumed)
    facts: dict[int, tuple[str, int, int, int, int, list[int], int, int]] = {}
    for entry in set().union(*traces):
        index = max(entry, ~entry)
        instruction = kernel.instructions[index]
        unit, held = units.get(instruction.name, ("", 0))
        latency = LATENCY.get(instruction.name, OTHER_LATENCY)
        if entry < 0:  # no lane does it
            unit, held, latency = "", 0, min(latency, OTHER_LATENCY)
        waits = [board for board in range(6) if instruction.waits_for >> board & 1]
        on_write = instruction.sets_on_write
        if instruction.name == "HGMMA":
            unit, held, on_write = "products", held_by_group(instruction, assumed), GROUPS
            latency += held
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            waits.append(GROUPS)
        branch = assumed.branch if instruction.name in ("BRA", "CALL", "RET") else 0
        facts[entry] = (
            unit, held, max(1, instruction.stall), on_write, instruction.sets_on_read, waits,
            latency, branch,
        )  # fmt: skip
    count = len(traces)
    at, ready = [0] * count, [0] * count
    boards = [[0] * 7 for _ in traces]
    free: dict[str, int] = {"": 0}
    now = 0
    order = [warp for warp in range(count) if traces[warp]]
    while order:
        chosen, soonest = order[0], 1 << 62
        for warp in order:
            unit, _, _, _, _, waits, _, _ = facts[traces[warp][at[warp]]]
            time = ready[warp]
            for board in waits:
                if boards[warp][board] > time:
                    time = boards[warp][board]
            if unit and free.get(unit, 0) > time:
                time = free[unit]
            if time < soonest:
                chosen, soonest = warp, time
                if time <= now:
                    break
        now = max(now, soonest)
        trace = traces[chosen]
        entry = trace[at[chosen]]
        unit, held, stall, on_write, on_read, _, latency, branch = facts[entry]
        if unit:
            free[unit] = now + held
        at[chosen] += 1
        ready[chosen] = now + stall
        if branch and at[chosen] < len(trace) and max(after := trace[at[chosen]], ~after) != max(entry, ~entry) + 1:
            ready[chosen] = max(ready[chosen], now + branch)
        mine = boards[chosen]
        if on_write != NO_SCOREBOARD:
            mine[on_write] = max(mine[on_write], now + latency)
        if on_read != NO_SCOREBOARD:
            mine[on_read] = max(mine[on_read], now + min(latency, READ_AT_MOST))
        now += 1
        order.remove(chosen)  # the one that has just issued comes last
        if at[chosen] < len(trace):
            order.append(chosen)
    return now


def resident_blocks(registers: int, threads: int, shared_bytes: int, device: Device) -> int:
    """Return how many blocks fit on a multiprocessor at once."""
    warps = threads // WARP
    of_warp = math.ceil(registers * WARP / 256) * 256
    by_registers = SUB_CORES * (REGISTERS // SUB_CORES // of_warp) // warps
    by_shared = device.shared_bytes // (shared_bytes + RESERVED_SHARED)
    return min(by_registers, by_shared, BLOCKS_AT_MOST, WARPS_AT_MOST // warps)


def launch_cycles(
    kernel: Kernel,
    block: Sequence[Sequence[int]],
    blocks: int,
    resident: int,
    device: Device,
    assumed: Assumptions,
) -> int:
    """Return the cycles of a grid of equal blocks: full rounds of resident blocks, and one of those left over."""
    rounds, left = divmod(blocks, resident * device.multiprocessors)
    of_sub_core = [block[warp] for warp in range(0, len(block), SUB_CORES)]
    last = math.ceil(left / device.multiprocessors)
    of_count = {count: cycles(kernel, of_sub_core * count, device, assumed) for count in {resident, last} if count}
    return rounds * of_count[resident] + (of_count[last] if last else 0)
