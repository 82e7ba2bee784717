"""The table of instructions: what each does for some lanes of a warp.

``integers.py``, ``floats.py`` and ``memory.py`` fill it. To add an instruction, write a function in one of them that
takes the instruction and returns what it does, and name it in ``@meaning``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .listing import Instruction
from .operands import (
    NotUnderstood,
    Place,
    Value,
    lift,
)

if TYPE_CHECKING:
    from .machine import Warp


Step = Callable[["Warp", int], None]
DATA = 0x3F003F00  # what tensors hold: 0.5, as two bfloat16 as well as, nearly, one float
PRODUCT = 0x3F000000  # what a matrix product gives: 0.5


def nothing(warp: Warp, mask: int) -> None:
    pass


# Instructions that change nothing that is kept here.
SILENT = ("NOP", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "ENDCOLLECTIVE", "MEMBAR", "ERRBAR", "CCTL", "YIELD", "NANOSLEEP")
# Copies of tiles bring nothing, and barriers in shared memory never make a warp wait.
SILENT += ("FENCE", "UTMALDG", "WARPGROUP", "USETMAXREG")


def step_of(instruction: Instruction) -> Step:
    """What an instruction does for some lanes of a warp."""
    name = instruction.name
    if name in SILENT:
        return nothing
    maker = MAKERS.get(name) or (MAKERS.get(name[1:]) if name[0] == "U" else None)
    if maker is None:
        raise NotUnderstood(f"{name} has no meaning in integers.py, floats.py or memory.py")
    return maker(instruction)


MAKERS: dict[str, Callable[[Instruction], Step]] = {}


def meaning(*names: str) -> Callable[[Callable[[Instruction], Step]], Callable[[Instruction], Step]]:
    def register(maker: Callable[[Instruction], Step]) -> Callable[[Instruction], Step]:
        for name in names:
            MAKERS[name] = maker
        return maker

    return register


def apply(
    to: Place, function: Callable[..., int], sources: Sequence[Callable[[Warp], Value]]
) -> Callable[[Warp, int], None]:
    def step(warp: Warp, mask: int) -> None:
        warp.write(to, lift(function, *(read(warp) for read in sources)), mask)

    return step


def modifiers_of(instruction: Instruction) -> list[str]:
    return instruction.opcode.split(".")[1:]
