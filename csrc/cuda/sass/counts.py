"""What the kernels execute for one tile of 64 x 64 pairs, and the gate that keeps it from growing.

The host code of the kernels is run with the CUDA runtime replaced (runtime.h), so that it says which kernels a call
starts and with which arguments. The machine then runs some of their blocks, and the issue model gives them cycles.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import issue
from .listing import Kernel
from .machine import DATA, Block, Launch, Program, Region

HERE = Path(__file__).parent
TILE = 64  # queries and keys of a tile
WARPS_OF_TILE = 4  # that share a tile: 16 queries each
WORSE = 0.03  # what is allowed
ELEMENT_BYTES = {"float": 4, "bfloat16": 2, "float16": 2}
MSE = "kMse"  # of csrc/comparison.h
MASKS = 0x01010101  # every key real, every query counted


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    pass_: str  # forward, backward, or gradients: a forward that makes them, too
    pairs: int
    heads: int
    length: int
    kind: str  # plain, padded or causal

    @property
    def name(self) -> str:
        return f"{self.pass_} {self.length} {self.kind}"

    @property
    def tiles(self) -> int:
        return self.pairs * self.heads * math.ceil(self.length / TILE) ** 2


# Every tensor-core kernel must be started by one of these. 128 is the longest row of forward_short.
CASES = [
    *(Case(pass_, 32, 12, 128, kind) for pass_ in ("forward", "backward") for kind in ("plain", "padded", "causal")),
    *(Case(pass_, 32, 12, length, "plain") for pass_ in ("forward", "backward") for length in (64, 192)),
    Case("forward", 32, 12, 192, "padded"),
]

# Of the comparisons but the MSE. Their kernels for long rows take every mask.
DIVERGENCE_CASES = [
    *(Case(pass_, 32, 12, 128, kind) for pass_ in ("forward", "backward") for kind in ("plain", "padded", "causal")),
    *(Case(pass_, 32, 12, 64, "plain") for pass_ in ("forward", "backward")),
]

# Of the averages over heads. Only the kernel that compares averages differs from one comparison to another.
MEAN_CASES = [Case(pass_, 32, 12, 128, kind) for pass_ in ("forward", "gradients") for kind in ("plain", "causal")]

# Of words that are one token each.
WORD_CASES = [Case(pass_, 32, 12, 128, "plain") for pass_ in ("forward", "backward")]

# Of the kernels for Hopper, in bfloat16 with 64 features.
HOPPER_CASES = [
    Case("forward", 1, 12, 4096, "plain"),
    Case("backward", 1, 12, 4096, "plain"),
    Case("forward", 2, 12, 2048, "padded"),
]

OPCODES = {
    "products": "HMMA HGMMA",
    "LDSM": "LDSM",
    "LDS": "LDS",
    "STS": "STS",
    "functions": "MUFU",
    "float": "FADD FMUL FFMA",
    "integer": "IMAD IADD3 LEA LOP3 SHF MOV VIADD VIADDMNMX PRMT IABS CS2R POPC FLO BREV HFMA2 R2UR UIADD3 UIMAD ULEA"
    " ULOP3 USHF UMOV UPRMT",
    "compare": "ISETP FSETP PLOP3 SEL FSEL FMNMX IMNMX VIMNMX VIMNMX3 P2R R2P VOTE VOTEU UISETP USEL UPLOP3",
    "branch": "BRA BSSY BSYNC BREAK CALL RET EXIT JMP WARPSYNC",
    "memory": "LDG STG LDGSTS LDL STL LDC ULDC ATOMG RED LDGDEPBAR DEPBAR UTMALDG",
    "barrier": "BAR SYNCS WARPGROUP FENCE",
}
OTHER = "other"
KINDS = {opcode: kind for kind, opcodes in OPCODES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Host:
    """The host code of some kernels, as a program that prints what a call starts."""

    program: str  # its file
    element: str
    features: int
    comparison: str = MSE
    hopper: bool = False

    def build(self, objects: Path, folder: Path) -> Path:
        """Link it with the object file of the kernels."""
        program = folder / f"launches_{self.element}_{self.comparison}"
        defines = [f"-DELEMENT={self.element}", f"-DELEMENT_BYTES={ELEMENT_BYTES[self.element]}"]
        defines += [f"-DFEATURES={self.features}", f"-DCOMPARISON={self.comparison}"]
        defines += ["-DHOPPER"] if self.hopper else []
        command = ["c++", "-std=c++17", *defines, str(HERE / self.program), str(objects), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the launches of {self.element} {self.features} cannot be built:\n{done.stderr}")
        return program


def launches_of(program: Path, case: Case, features: int, device: issue.Device) -> list[Launch]:
    """What a call starts, in order."""
    words = [case.pass_, case.pairs, case.heads, case.length, features, case.kind, device.shared_bytes - 1024]
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case.name}: the host code failed: {done.stderr}")
    said = json.loads(done.stdout)
    regions = tuple(
        Region(row["name"], row["address"], row["bytes"], MASKS if row["content"] == "ones" else DATA, row["period"])
        for row in said["regions"]
    )
    return [
        Launch(
            row["kernel"], row["blocks"], row["threads"], row["shared_bytes"], bytes.fromhex(row["arguments"]), regions
        )
        for row in said["launches"]
    ]


@dataclass(frozen=True)
class Counts:
    """Of one call."""

    kernels: list[str]
    warp: int  # instructions of the longest warp
    instructions: float  # of a warp for a tile
    kinds: dict[str, float]
    best_cycles: float  # of the whole call on the device
    worst_cycles: float
    bytes: int  # that the call must read and write
    tiles: int

    def row(self, device: issue.Device) -> dict[str, Any]:
        """What is written down. Cycles are those of a multiprocessor for a tile."""
        share = self.tiles / device.multiprocessors
        return {
            "kernels": self.kernels,
            "instructions": round(self.instructions, 1),
            "best_cycles": round(self.best_cycles / share, 1),
            "worst_cycles": round(self.worst_cycles / share, 1),
            "kinds": {kind: round(count, 1) for kind, count in sorted(self.kinds.items())},
        }


def sample(launch: Launch, case: Case) -> list[int]:
    """The first and the last block of the first head, where heads have blocks of their own, else of the grid."""
    heads = case.pairs * case.heads
    of_head = launch.blocks // heads if launch.blocks % heads == 0 else launch.blocks
    return sorted({0, of_head - 1})


def count(
    case: Case,
    launches: Sequence[Launch],
    kernels: Mapping[str, Kernel],
    registers: Mapping[str, int],
    architecture: str,
) -> Counts:
    """Run a sample of the blocks of a call, and count."""
    device = issue.DEVICES[architecture]
    kinds: dict[str, float] = dict.fromkeys((*OPCODES, OTHER), 0.0)
    longest, best, worst = 0, 0.0, 0.0
    for launch in launches:
        kernel = kernels[launch.kernel]
        program = Program(kernel, architecture)
        resident = issue.resident_blocks(
            registers[launch.kernel], launch.threads, launch.shared_bytes + kernel.shared_bytes, device
        )
        if resident == 0:
            raise SystemExit(f"{launch.kernel}: no block of it fits on a multiprocessor of sm_{architecture}")
        indices = sample(launch, case)
        seen: dict[int, tuple[float, float]] = {}
        for index in indices:
            traces = Block(program, launch, index).run()
            longest = max(longest, *map(len, traces))
            for trace in traces:
                for at, times in Counter(trace).items():
                    name = kernel.instructions[max(at, ~at)].name
                    kinds[KINDS.get(name, OTHER)] += times * launch.blocks / len(indices)
            key = hash(tuple(map(tuple, traces)))
            if key not in seen:
                best_and_worst = [
                    issue.launch_cycles(kernel, traces, launch.blocks, resident, device, assumed)
                    for assumed in (issue.BEST, issue.WORST)
                ]
                seen[key] = best_and_worst[0], best_and_worst[1]
            best, worst = best + seen[key][0] / len(indices), worst + seen[key][1] / len(indices)
    scale = case.tiles * WARPS_OF_TILE
    per_tile = {kind: number / scale for kind, number in kinds.items()}
    moved = sum(region.bytes for region in launches[0].regions)
    names = [launch.kernel for launch in launches]
    return Counts(names, longest, sum(per_tile.values()), per_tile, best, worst, moved, case.tiles)


GATED = ("instructions", "best_cycles", "worst_cycles")


def complaints(recorded: Mapping[str, Any], measured: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    """Compare the rows of the files that were compiled with those that are written down."""
    worse = []
    expected = {name: row for name, row in recorded.items() if name.split(",")[0] in files}
    for name in sorted(expected.keys() - measured.keys()):
        worse.append(f"{name}: it is written down but was not counted; record again if it has gone")
    for name in sorted(measured.keys() - expected.keys()):
        worse.append(f"{name}: it is not written down; record it")
    for name in sorted(measured.keys() & expected.keys()):
        for key in GATED:
            before, now = expected[name][key], measured[name][key]
            if now > before * (1 + WORSE):
                worse.append(f"{name}: {key} a tile went from {before} to {now}, by more than {WORSE:.0%}")
    return worse
