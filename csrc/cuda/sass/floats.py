"""Floating-point numbers and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import meanings as m
from .listing import Instruction
from .operands import (
    FULL,
    lift,
    pair,
    place,
    source,
)
from .table import DATA, PRODUCT, Step, apply, meaning, modifiers_of

if TYPE_CHECKING:
    from .machine import Warp


@meaning("FADD", "FMUL", "FFMA")
def _arithmetic(instruction: Instruction) -> Step:
    to, *rest = instruction.operands
    function: Callable[..., float] = m.ARITHMETIC[instruction.name]
    sources = [source(text, True) for text in rest]
    return apply(place(to), lambda *words: m.as_bits(function(*map(m.as_float, words))), sources)


@meaning("MUFU")
def _function(instruction: Instruction) -> Step:
    function = m.FUNCTIONS[modifiers_of(instruction)[0]]
    to, read = instruction.operands
    return apply(place(to), lambda word: m.as_bits(function(m.as_float(word))), [source(read, True)])


@meaning("FCHK")
def _check_division(instruction: Instruction) -> Step:
    to = place(instruction.operands[0])
    return lambda warp, mask: warp.write(to, 0, mask)  # the quotient needs no slow path


@meaning("I2F", "I2FP")
def _from_integer(instruction: Instruction) -> Step:
    modifiers = modifiers_of(instruction)
    to, text = instruction.operands
    read = pair(text) if {"U64", "S64"} & set(modifiers) else source(text)
    is_signed = not {"U32", "U64", "U16", "U8"} & set(modifiers)

    def convert(word: int) -> int:
        value = m.signed(word) if is_signed else word
        bits = m.as_bits(float(value))
        return bits + 1 if "RP" in modifiers and m.as_float(bits) < value else bits

    return apply(place(to), convert, [read])


@meaning("F2I")
def _to_integer(instruction: Instruction) -> Step:
    modifiers = modifiers_of(instruction)
    to, text = instruction.operands
    bits = 64 if {"U64", "S64"} & set(modifiers) else 32
    is_signed = not {"U32", "U64"} & set(modifiers)
    destination, read = place(to), source(text, True)

    def step(warp: Warp, mask: int) -> None:
        result = lift(lambda word: m.to_integer(m.as_float(word), bits, is_signed), read(warp))
        for word in range(bits // 32):
            warp.write(destination, lift(lambda x: x >> 32 * word & FULL, result), mask, word)  # noqa: B023

    return step


@meaning("F2FP", "F2F")
def _narrow(instruction: Instruction) -> Step:
    to, *rest = instruction.operands
    modifiers = modifiers_of(instruction)
    sources = [source(text, True) for text in rest]

    def convert(*words: int) -> int:
        if "BF16" in modifiers:
            halves = [word >> 16 for word in words]
        else:
            halves = [m.half_bits(m.as_float(word)) for word in words]
        return halves[0] if len(halves) == 1 else halves[0] << 16 | halves[1]

    return apply(place(to), convert, sources)


@meaning("HADD2", "HMUL2", "HFMA2")
def _halves(instruction: Instruction) -> Step:
    """Of these, only the conversion of a half to a float and the loading of two constants occur where values matter."""
    to, *rest = instruction.operands
    if "F32" in modifiers_of(instruction):
        upper = rest[-1].endswith("H1_H1")
        return apply(
            place(to),
            lambda word: m.as_bits(m.half_value(word >> 16 if upper else word)),
            [source(rest[-1].partition(".")[0])],
        )
    word = DATA
    if instruction.name == "HFMA2" and rest[0].lstrip("-") == rest[1].lstrip("-") == "RZ":
        halves = [m.half_bits(m.as_float(m.immediate(text))) for text in rest[2:4]]
        word = halves[0] << 16 | halves[1]
    return apply(place(to), lambda: word, [])


@meaning("HGMMA")
def _product_of_a_group(instruction: Instruction) -> Step:
    """The part of one warp: 16 rows of as many columns as the opcode says."""
    to, columns = place(instruction.operands[0]), int(instruction.opcode.split(".")[1].split("x")[1])

    def step(warp: Warp, mask: int) -> None:
        for word in range(columns // 2):
            warp.write(to, PRODUCT, mask, word)

    return step


@meaning("HMMA")
def _matrix_product(instruction: Instruction) -> Step:
    to, words = place(instruction.operands[0]), 4 if "F32" in modifiers_of(instruction) else 2

    def step(warp: Warp, mask: int) -> None:
        for word in range(words):
            warp.write(to, PRODUCT, mask, word)

    return step
