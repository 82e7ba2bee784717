"""Values of a warp, and what reads and names the operands of an instruction.

A value is an integer where all 32 lanes agree, and a list of 32 where they do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import meanings as m

if TYPE_CHECKING:
    from .machine import Warp

LANES = 32
FULL = (1 << LANES) - 1  # a mask of all lanes; also the largest word
Value = Any  # int | list[int]
ZERO_REGISTER, UNIFORM_ZERO, TRUE = 255, 63, 7


class NotUnderstood(Exception):
    """The machine met something that it does not know, or that a kernel must not do."""


# --- values ----------------------------------------------------------------------------------------------------------


def lanes_of(value: Value) -> list[int]:
    return value if type(value) is list else [value] * LANES


def lift(function: Callable[..., int], *values: Value) -> Value:
    """Apply a function to the operands of every lane, once where all lanes agree."""
    if list not in map(type, values):
        return function(*values)
    result = [function(*operands) for operands in zip(*map(lanes_of, values), strict=True)]
    return result[0] if result.count(result[0]) == LANES else result


def compare(function: Callable[..., bool], *values: Value) -> int:
    """A mask of the lanes for which the function holds."""
    if list not in map(type, values):
        return FULL if function(*values) else 0
    operands = zip(*map(lanes_of, values), strict=True)
    return sum(1 << lane for lane, operand in enumerate(operands) if function(*operand))


def bits_of(mask: int) -> Value:
    """0 or 1 a lane."""
    return mask & 1 if mask in (0, FULL) else [mask >> lane & 1 for lane in range(LANES)]


def active(value: Value, mask: int) -> list[int]:
    """The values of the lanes in a mask, without repeating one that all have."""
    return [value[lane] for lane in range(LANES) if mask >> lane & 1] if type(value) is list else [value]


def first(value: Value, mask: int) -> int:
    return active(value, mask)[0]


# --- operands --------------------------------------------------------------------------------------------------------

REGISTER = re.compile(r"(U?)R(Z|\d+)(?:\.(\w+))?$")
PREDICATE = re.compile(r"(!?)(U?)P(T|\d)$")
CONSTANT = re.compile(r"c\[0x(\w+)\]\[(?:(U?R\w+)\+?)?(?:0x(\w+))?\]$")
_MEMORY = re.compile(r"(?:desc\[UR\d+\])?\[(.*)\]$")


@dataclass(frozen=True)
class Place:
    """A register or a predicate, in the warp's own file or in the uniform one."""

    uniform: bool
    predicate: bool
    index: int


def place(text: str) -> Place:
    if match := PREDICATE.match(text):
        return Place(bool(match[2]), True, TRUE if match[3] == "T" else int(match[3]))
    match = REGISTER.match(text)
    if not match:
        raise NotUnderstood(f"{text!r} is no register")
    uniform = bool(match[1])
    zero = UNIFORM_ZERO if uniform else ZERO_REGISTER
    return Place(uniform, False, zero if match[2] == "Z" else int(match[2]))


def source(text: str, is_float: bool = False, offset: int = 0) -> Callable[[Warp], Value]:
    """What reads an operand. With an offset of 1 it is the word after the operand's first."""
    sign, absolute, plain = "", False, text.strip()
    if plain[0] in "-~" and (plain[1] in "|Rc" or plain[1:3] == "UR"):
        sign, plain = plain[0], plain[1:]
    if plain[0] == "|":
        absolute, plain = True, plain.strip("|")
    get: Callable[[Warp], Value]
    if match := CONSTANT.match(plain):
        bank, at = int(match[1], 16), int(match[3] or "0", 16) + 4 * offset
        if match[2]:
            base = source(match[2])
            get = lambda warp: lift(lambda r: warp.block.constant(bank, r + at, 4), base(warp))  # noqa: E731
        else:
            get = lambda warp: warp.block.constant(bank, at, 4)  # noqa: E731
    elif match := REGISTER.match(plain):
        register = place(plain)
        zero = UNIFORM_ZERO if register.uniform else ZERO_REGISTER
        index = zero if register.index == zero else register.index + offset
        get = (lambda warp: warp.uniform[index]) if register.uniform else (lambda warp: warp.registers[index])
    else:
        literal = m.immediate(plain) if offset == 0 else 0
        get = lambda warp: literal  # noqa: E731
    change: Callable[[int], int] | None = None
    if is_float and (sign or absolute):
        flip, keep = (1 << 31 if sign else 0), (FULL >> 1 if absolute else FULL)
        change = lambda word: word & keep ^ flip  # noqa: E731
    elif absolute:
        change = (lambda w: -abs(m.signed(w)) & FULL) if sign else (lambda w: abs(m.signed(w)))
    elif sign == "-":
        change = lambda word: -word & FULL  # noqa: E731
    elif sign == "~":
        change = lambda word: ~word & FULL  # noqa: E731
    if change is None:
        return get
    changed = change
    return lambda warp: lift(changed, get(warp))


def condition(text: str) -> Callable[[Warp], int]:
    """What reads a predicate, as a mask of lanes."""
    match = PREDICATE.match(text)
    if not match:
        raise NotUnderstood(f"{text!r} is no predicate")
    flip, uniform, index = FULL if match[1] else 0, bool(match[2]), TRUE if match[3] == "T" else int(match[3])
    if uniform:
        return lambda warp: warp.uniform_predicates[index] ^ flip
    return lambda warp: warp.predicates[index] ^ flip


def address(text: str, wide: bool) -> Callable[[Warp], Value]:
    """What reads an address such as ``[R6.64+UR4+0x20]``. A wide one has 64 bits."""
    match = _MEMORY.match(text)
    if not match:
        raise NotUnderstood(f"{text!r} is no address")
    parts: list[Callable[[Warp], Value]] = []
    added = 0
    for term in filter(None, re.split(r"\+(?=[-\w])", match[1])):
        register = REGISTER.match(term)
        if not register:
            added += int(term, 16)
            continue
        if wide and register[3] != "32":
            parts.append(pair(term.partition(".")[0]))
            continue
        read, scale = source(term.partition(".")[0]), {"X4": 4, "X8": 8, "X16": 16}.get(register[3] or "", 1)
        parts.append(lambda warp, read=read, scale=scale: lift(lambda word: word * scale, read(warp)))  # type: ignore[misc]
    limit = (1 << 64) - 1 if wide else FULL

    def read_all(warp: Warp) -> Value:
        return lift(lambda *words: (sum(words) + added) & limit, *(part(warp) for part in parts)) if parts else added

    return read_all


def pair(text: str) -> Callable[[Warp], Value]:
    """A register and the one after it, as 64 bits."""
    low, high = source(text), source(text, offset=1)
    return lambda warp: lift(lambda a, b: b << 32 | a, low(warp), high(warp))


def is_predicate(text: str) -> bool:
    return bool(PREDICATE.match(text))
