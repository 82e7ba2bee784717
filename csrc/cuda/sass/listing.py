"""The instructions of each kernel of a cubin, out of the text that ``nvdisasm -hex`` prints.

Beside each instruction stands its encoding. The upper word holds the control fields that ptxas wrote: how many cycles
the warp must wait (stall), which of six scoreboards the instruction sets, and which it waits for.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

INSTRUCTION_BYTES = 16
NO_SCOREBOARD = 7
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/")
_CONTROL = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^([.$][\w$.]+):\s*$")
_REMARK = re.compile(r"\s*\(\*.*?\*\)")  # such as (*"SpillRefill"*)
_ZEROS = re.compile(r"\s+\.zero\s+(\d+)")
_BYTES = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+\.byte\s+(.*)")
_GUARD = re.compile(r"@(!?)(U?P[\dT])\s+")


@dataclass(frozen=True)
class Instruction:
    text: str
    guard: str  # "", or the predicate without which it does nothing, such as "!P0"
    opcode: str  # with its modifiers: "IADD3.X"
    operands: tuple[str, ...]
    stall: int
    sets_on_write: int  # the scoreboard that clears when the result is there, or NO_SCOREBOARD
    sets_on_read: int  # the scoreboard that clears when the operands are read, or NO_SCOREBOARD
    waits_for: int  # a bit for each scoreboard

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


@dataclass
class Kernel:
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction
    constant_bytes: int = 0  # of bank 0, which ends with the arguments
    literals: bytes = b""  # bank 2, where ptxas keeps numbers
    shared_bytes: int = 0  # static


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a listing by their mangled names."""
    kernels: dict[str, Kernel] = {}
    kernel: Kernel | None = None
    low = ""
    section = ""
    sizes: Counter[str] = Counter()  # of the sections that hold nothing but zeros
    data: dict[str, bytes] = {}  # of the other sections
    for line in text.splitlines():
        if line.startswith("//---"):
            kernel = None
        elif label := _LABEL.match(line):
            section = label[1]
            if section.startswith(".text."):
                kernel = kernels[section[6:]] = Kernel(section[6:])
                kernel.labels[section[6:]] = 0
            elif kernel is not None:
                kernel.labels[section] = len(kernel.instructions)
        elif kernel is not None:
            if match := _INSTRUCTION.match(line):
                low = _REMARK.sub("", match[2])
                if int(match[1], 16) != INSTRUCTION_BYTES * len(kernel.instructions):
                    raise ValueError(f"the listing of {kernel.name} has a gap before {line.strip()!r}")
            elif low and (match := _CONTROL.match(line)):
                kernel.instructions.append(_instruction(low, int(match[1], 16)))
                low = ""
        elif match := _ZEROS.match(line):
            sizes[section] += int(match[1])
        elif match := _BYTES.match(line):
            data[section] = data.get(section, b"") + bytes(int(byte, 16) for byte in match[1].split(","))
    for name, kernel in kernels.items():
        kernel.literals = data.get(f".nv.constant2.{name}", b"")
        kernel.constant_bytes = sizes[f".nv.constant0.{name}"]
        kernel.shared_bytes = sizes[f".nv.shared.{name}"]
    return kernels


def _instruction(text: str, control: int) -> Instruction:
    guard = _GUARD.match(text)
    body = text[guard.end() :] if guard else text
    opcode, _, operands = body.partition(" ")
    return Instruction(
        text=text,
        guard=guard[1] + guard[2] if guard else "",
        opcode=opcode,
        operands=tuple(operand.strip().replace(".reuse", "") for operand in operands.split(",") if operand.strip()),
        stall=control >> 41 & 15,
        sets_on_write=control >> 46 & 7,
        sets_on_read=control >> 49 & 7,
        waits_for=control >> 52 & 63,
    )
