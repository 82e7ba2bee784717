"""Moves, integers, predicates, votes, shuffles and barriers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import meanings as m
from .listing import Instruction
from .operands import (
    CONSTANT,
    FULL,
    LANES,
    TRUE,
    NotUnderstood,
    Place,
    Value,
    bits_of,
    compare,
    condition,
    first,
    is_predicate,
    lanes_of,
    lift,
    pair,
    place,
    source,
)
from .table import Step, apply, meaning, modifiers_of, nothing

if TYPE_CHECKING:
    from .machine import Warp


@meaning("MOV")
def _mov(instruction: Instruction) -> Step:
    return apply(place(instruction.operands[0]), lambda a: a, [source(instruction.operands[1])])


@meaning("S2R", "S2UR", "CS2R")
def _special(instruction: Instruction) -> Step:
    to, name = place(instruction.operands[0]), instruction.operands[1]
    words = 2 if instruction.name == "CS2R" and ".32" not in instruction.opcode else 1
    known = ("SR_LANEID", "SRZ", "SR_CgaCtaId", "SR_LTMASK", "SR_CLOCKLO")
    if name not in known and not name.startswith(("SR_TID", "SR_CTAID")):
        raise NotUnderstood(f"no special register {name}")

    def step(warp: Warp, mask: int) -> None:
        value: Value = 0
        if name == "SR_TID.X":
            value = [LANES * warp.number + lane for lane in range(LANES)]
        elif name == "SR_LANEID":
            value = list(range(LANES))
        elif name == "SR_LTMASK":
            value = [(1 << lane) - 1 for lane in range(LANES)]
        elif name == "SR_CTAID.X":
            value = warp.block.index
        for word in range(words):
            warp.write(to, value if word == 0 else 0, mask, word)

    return step


@meaning("LDC")
def _load_constant(instruction: Instruction) -> Step:
    to, modifiers = place(instruction.operands[0]), modifiers_of(instruction)
    match = CONSTANT.match(instruction.operands[1])
    if not match:
        raise NotUnderstood("its source is no constant")
    bank, at, base = int(match[1], 16), int(match[3] or "0", 16), source(match[2]) if match[2] else None
    size = {"U8": 1, "U16": 2, "64": 8, "128": 16}.get(modifiers[-1] if modifiers else "", 4)

    def step(warp: Warp, mask: int) -> None:
        register = base(warp) if base else 0  # before the first word takes its place
        for word in range(max(1, size // 4)):
            offset, count = at + 4 * word, min(size, 4)
            warp.write(to, lift(lambda r: warp.block.constant(bank, r + offset, count), register), mask, word)  # noqa: B023

    return step


@meaning("R2UR")
def _to_uniform(instruction: Instruction) -> Step:
    to, read = place(instruction.operands[0]), source(instruction.operands[-1])
    return lambda warp, mask: warp.write(to, first(read(warp), mask), FULL)


@meaning("IADD3", "VIADD")
def _add(instruction: Instruction) -> Step:
    to, *rest = instruction.operands
    carries_out = []
    while is_predicate(rest[0]):
        carries_out.append(place(rest.pop(0)))
    carries_in = []
    while is_predicate(rest[-1]):
        carries_in.append(condition(rest.pop()))
    destination = place(to)
    if not carries_out and not carries_in:
        return apply(destination, lambda *words: sum(words) & FULL, [source(text) for text in rest])
    # With a carry, -x is the complement of x and one more: 2^32 where x is 0.
    negative = [text.startswith("-") for text in rest]
    sources = [source(text.removeprefix("-")) for text in rest]

    def total(*words: int) -> int:
        signs = zip(words, negative, strict=False)
        return sum((1 << 32) - word if minus else word for word, minus in signs) + sum(words[len(negative) :])

    def step(warp: Warp, mask: int) -> None:
        values = [read(warp) for read in sources] + [bits_of(carry(warp)) for carry in carries_in]
        result = lift(total, *values)
        if carries_out:
            warp.write(carries_out[0], compare(lambda x: x >> 32 > 0, result), mask)
        for extra in carries_out[1:]:
            warp.write(extra, compare(lambda x: x >> 32 > 1, result), mask)
        warp.write(destination, lift(lambda x: x & FULL, result), mask)

    return step


@meaning("IMAD")
def _multiply_add(instruction: Instruction) -> Step:
    to, *rest = instruction.operands
    modifiers = modifiers_of(instruction)
    carry_out = place(rest.pop(0)) if is_predicate(rest[0]) else None
    carry_in = condition(rest.pop()) if is_predicate(rest[-1]) else None
    destination = place(to)
    is_signed = "U32" not in modifiers
    wide, high = "WIDE" in modifiers, "HI" in modifiers
    factors = [source(rest[0]), source(rest[1])]
    added = pair(rest[2]) if (wide or high) and not rest[2].startswith(("0x", "-", "~")) else source(rest[2])

    def product(a: int, b: int, c: int, carry: int = 0) -> int:
        if (wide or high) and is_signed:
            a, b = m.signed(a), m.signed(b)
        return a * b + c + carry

    def step(warp: Warp, mask: int) -> None:
        values = [factors[0](warp), factors[1](warp), added(warp)]
        if carry_in:
            values.append(bits_of(carry_in(warp)))
        result = lift(product, *values)
        if carry_out:
            limit = 64 if wide else 32
            warp.write(carry_out, compare(lambda x: x >> limit != 0, result), mask)
        if wide:
            warp.write(destination, lift(lambda x: x & FULL, result), mask)
            warp.write(destination, lift(lambda x: x >> 32 & FULL, result), mask, 1)
        else:
            warp.write(destination, lift(lambda x: (x >> 32 if high else x) & FULL, result), mask)

    return step


@meaning("LEA")
def _scaled_add(instruction: Instruction) -> Step:
    to, *rest = instruction.operands
    modifiers = modifiers_of(instruction)
    carry_out = place(rest.pop(0)) if is_predicate(rest[0]) else None
    carry_in = condition(rest.pop()) if is_predicate(rest[-1]) else None
    count = int(rest.pop(), 16)
    destination, high, extended = place(to), "HI" in modifiers, "SX32" in modifiers
    negative = rest[0].startswith("-")
    sources = [source(rest[0].removeprefix("-")), source(rest[1])]
    sources.append(source(rest[2]) if len(rest) > 2 else source("RZ"))

    def total(low: int, base: int, upper: int, carry: int = 0) -> int:
        whole = m.signed(low) if extended else upper << 32 | low
        whole = (-whole if negative else whole) << count
        return ((whole >> 32 if high else whole) & FULL) + base + carry

    def step(warp: Warp, mask: int) -> None:
        values = [read(warp) for read in sources]
        if carry_in:
            values.append(bits_of(carry_in(warp)))
        result = lift(total, *values)
        if carry_out:
            warp.write(carry_out, compare(lambda x: x >> 32 != 0, result), mask)
        warp.write(destination, lift(lambda x: x & FULL, result), mask)

    return step


@meaning("LOP3")
def _logic(instruction: Instruction) -> Step:
    rest = list(instruction.operands)
    truth = place(rest.pop(0)) if is_predicate(rest[0]) else None
    extra = condition(rest.pop())
    table = int(rest.pop(), 16)
    destination, sources, function = place(rest[0]), [source(text) for text in rest[1:]], m.logic3(table)

    def step(warp: Warp, mask: int) -> None:
        result = lift(function, *(read(warp) for read in sources))
        if truth:
            warp.write(truth, compare(lambda x: x != 0, result) | extra(warp), mask)
        warp.write(destination, result, mask)

    return step


@meaning("PLOP3")
def _predicate_logic(instruction: Instruction) -> Step:
    first_to, second_to, *rest = instruction.operands
    tables = [int(rest[3], 16), int(rest[4], 16)]
    sources = [condition(text) for text in rest[:3]]
    targets = list(zip((place(first_to), place(second_to)), map(m.logic3, tables), strict=True))

    def step(warp: Warp, mask: int) -> None:
        values = [read(warp) for read in sources]
        for to, function in targets:
            if to.index != TRUE:
                warp.write(to, function(*values), mask)

    return step


@meaning("SHF")
def _shift(instruction: Instruction) -> Step:
    modifiers = modifiers_of(instruction)
    to, low, count, upper = instruction.operands
    function = m.shift(
        left="L" in modifiers,
        high="HI" in modifiers,
        is_signed=bool({"S32", "S64"} & set(modifiers)),
        bits=64 if {"U64", "S64"} & set(modifiers) else 32,
        wraps="W" in modifiers,
    )
    return apply(place(to), function, [source(low), source(count), source(upper)])


@meaning("ISETP", "FSETP")
def _set_predicate(instruction: Instruction) -> Step:
    modifiers = modifiers_of(instruction)
    yes, no, left, right, combined, *lower = instruction.operands
    floats = instruction.name == "FSETP"
    sources = [source(left, floats), source(right, floats)]
    ask, joined = m.COMPARISONS[modifiers[0]], condition(combined)
    operator = next(name for name in modifiers if name in ("AND", "OR", "XOR"))
    decided = condition(lower[0]) if lower and "EX" in modifiers else None
    convert: Callable[[int], float] = m.as_float if floats else (lambda word: word) if "U32" in modifiers else m.signed
    targets = place(yes), place(no)

    def join(result: int, other: int) -> int:
        return result & other if operator == "AND" else result | other if operator == "OR" else result ^ other

    def step(warp: Warp, mask: int) -> None:
        values = [read(warp) for read in sources]
        result = compare(lambda a, b: ask(convert(a), convert(b)), *values)
        if decided:  # the upper words decide, unless they are equal
            equal = compare(lambda a, b: a == b, *values)
            result = result & ~equal | decided(warp) & equal
        other = joined(warp)
        warp.write(targets[0], join(result, other), mask)
        warp.write(targets[1], join(~result & FULL, other), mask)

    return step


@meaning("SEL", "FSEL")
def _select(instruction: Instruction) -> Step:
    to, yes, no, asked = instruction.operands
    floats = instruction.name == "FSEL"
    sources, chosen = [source(yes, floats), source(no, floats)], condition(asked)
    destination = place(to)

    def step(warp: Warp, mask: int) -> None:
        values = [read(warp) for read in sources]
        warp.write(destination, lift(lambda a, b, c: a if c else b, *values, bits_of(chosen(warp))), mask)

    return step


@meaning("IMNMX", "VIMNMX", "FMNMX")
def _extreme(instruction: Instruction) -> Step:
    to, left, right, asked = instruction.operands
    floats = instruction.name == "FMNMX"
    convert: Callable[[int], float] = (
        m.as_float if floats else (lambda word: word) if "U32" in instruction.opcode else m.signed
    )
    sources, least, destination = [source(left, floats), source(right, floats)], condition(asked), place(to)

    def pick(a: int, b: int, smaller: int) -> int:
        return (a if convert(a) <= convert(b) else b) if smaller else (a if convert(a) >= convert(b) else b)

    def step(warp: Warp, mask: int) -> None:
        warp.write(destination, lift(pick, *(read(warp) for read in sources), bits_of(least(warp))), mask)

    return step


@meaning("VIMNMX3")
def _extreme_of_three(instruction: Instruction) -> Step:
    to, *three, asked = instruction.operands
    convert: Callable[[int], int] = (lambda word: word) if "U32" in instruction.opcode else m.signed
    sources, least, destination = list(map(source, three)), condition(asked), place(to)

    def pick(a: int, b: int, c: int, smaller: int) -> int:
        return min(a, b, c, key=convert) if smaller else max(a, b, c, key=convert)

    def step(warp: Warp, mask: int) -> None:
        warp.write(destination, lift(pick, *(read(warp) for read in sources), bits_of(least(warp))), mask)

    return step


@meaning("VIADDMNMX")
def _add_extreme(instruction: Instruction) -> Step:
    to, left, right, limit, asked = instruction.operands
    convert: Callable[[int], int] = (lambda word: word) if "U32" in instruction.opcode else m.signed
    least = condition(asked)
    sources, destination = [source(left), source(right), source(limit)], place(to)

    def pick(a: int, b: int, c: int, smaller: int) -> int:
        total = (a + b) & FULL
        return min(total, c, key=convert) if smaller else max(total, c, key=convert)

    def step(warp: Warp, mask: int) -> None:
        warp.write(destination, lift(pick, *(read(warp) for read in sources), bits_of(least(warp))), mask)

    return step


@meaning("IABS")
def _absolute(instruction: Instruction) -> Step:
    return apply(place(instruction.operands[0]), lambda a: abs(m.signed(a)), [source(instruction.operands[1])])


@meaning("POPC", "FLO", "BREV")
def _bit_counts(instruction: Instruction) -> Step:
    functions: dict[str, Callable[[int], int]] = {
        "POPC": lambda a: bin(a).count("1"),
        "FLO": lambda a: a.bit_length() - 1 & FULL,
        "BREV": lambda a: int(f"{a:032b}"[::-1], 2),
    }
    function = functions[instruction.name.removeprefix("U")]
    if "SH" in modifiers_of(instruction):
        function = lambda a: 32 - a.bit_length() & FULL  # noqa: E731
    return apply(place(instruction.operands[0]), function, [source(instruction.operands[-1])])


@meaning("PRMT")
def _permute(instruction: Instruction) -> Step:
    to, *rest = instruction.operands
    return apply(place(to), m.permute, [source(text) for text in rest])


@meaning("P2R")
def _from_predicates(instruction: Instruction) -> Step:
    to, _, other, picked = instruction.operands
    destination, read, chosen = place(to), source(other), int(picked, 16)

    def step(warp: Warp, mask: int) -> None:
        words = [sum((warp.predicates[i] >> lane & 1) << i for i in range(7)) & chosen for lane in range(LANES)]
        warp.write(destination, lift(lambda a, b: a & ~chosen | b, read(warp), words), mask)

    return step


@meaning("R2P")
def _to_predicates(instruction: Instruction) -> Step:
    _, register, picked = instruction.operands
    read, chosen = source(register), int(picked, 16)

    def step(warp: Warp, mask: int) -> None:
        value = read(warp)
        for i in range(7):
            if chosen >> i & 1:
                warp.write(Place(False, True, i), compare(lambda a: a >> i & 1 == 1, value), mask)  # noqa: B023

    return step


@meaning("VOTE", "VOTEU")
def _vote(instruction: Instruction) -> Step:
    *targets, asked = instruction.operands
    votes, everyone = condition(asked), "ALL" in instruction.opcode

    def step(warp: Warp, mask: int) -> None:
        ballot = votes(warp) & mask
        for text in targets:
            to = place(text)
            result = (ballot == mask if everyone else ballot != 0) * FULL if to.predicate else ballot
            warp.write(to, result, mask)

    return step


@meaning("SHFL")
def _shuffle(instruction: Instruction) -> Step:
    _, to, value, offset, limit = instruction.operands
    destination, sources = place(to), [source(value), source(offset), source(limit)]
    kind = modifiers_of(instruction)[0]

    def step(warp: Warp, mask: int) -> None:
        words, by, clamp = (lanes_of(read(warp)) for read in sources)
        result = []
        for lane in range(LANES):
            segment = clamp[lane] >> 8 & 31
            most = lane & segment | clamp[lane] & 31 & ~segment
            lane_of = {"BFLY": lane ^ by[lane], "UP": lane - by[lane], "DOWN": lane + by[lane]}
            other = lane_of.get(kind, lane & segment | by[lane] & 31 & ~segment)
            result.append(words[other if (other >= most if kind == "UP" else other <= most) else lane])
        warp.write(destination, lift(lambda word: word, result), mask)

    return step


@meaning("SYNCS")
def _phase(instruction: Instruction) -> Step:
    """A phase has always ended; an arrival changes nothing."""
    if "PHASECHK" not in instruction.opcode:
        return nothing
    to = place(instruction.operands[0])
    return lambda warp, mask: warp.write(to, FULL, mask)


@meaning("ELECT")
def _elect(instruction: Instruction) -> Step:
    to = place(instruction.operands[0])
    return lambda warp, mask: warp.write(to, mask & -mask, mask)
