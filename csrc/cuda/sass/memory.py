"""Loads, stores and copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .listing import Instruction
from .operands import (
    FULL,
    REGISTER,
    NotUnderstood,
    Value,
    active,
    address,
    is_predicate,
    lanes_of,
    lift,
    place,
    source,
)
from .table import DATA, Step, meaning, modifiers_of

if TYPE_CHECKING:
    from .machine import Region, Warp


def _size(instruction: Instruction) -> int:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((sizes[name] for name in reversed(modifiers_of(instruction)) if name in sizes), 4)


def _regions(warp: Warp, places: Value, mask: int, size: int) -> list[Region]:
    """The regions that the active lanes touch, one for each lane or one for all."""
    block, touched = warp.block, active(places, mask)
    lowest = block.region(min(touched), size)
    if block.region(max(touched), size) is lowest:
        return [lowest]
    return [block.region(place, size) for place in touched]


@meaning("LDG", "LD")
def _load_global(instruction: Instruction) -> Step:
    to = place(instruction.operands[0])
    where, size = address(instruction.operands[1], True), _size(instruction)

    def step(warp: Warp, mask: int) -> None:
        places = where(warp)
        regions = _regions(warp, places, mask, size)
        if len({(region.word, region.period) for region in regions}) > 1:
            raise NotUnderstood(f"{instruction.text!r} reads numbers and masks at once")
        for word in range(max(1, size // 4)):
            read = lambda at: regions[0].read(at + 4 * word) & (1 << 8 * min(size, 4)) - 1  # noqa: B023, E731
            warp.write(to, lift(read, places) if regions[0].period else read(0), mask, word)

    return step


@meaning("STG", "ST", "RED")
def _store_global(instruction: Instruction) -> Step:
    where, size = address(instruction.operands[0], True), _size(instruction)

    def step(warp: Warp, mask: int) -> None:
        _regions(warp, where(warp), mask, size)

    return step


@meaning("ATOMG", "ATOM")
def _atomic(instruction: Instruction) -> Step:
    """What it finds in memory is 0, so that a block that counts itself is the first."""
    targets = [place(text) for text in instruction.operands if is_predicate(text) or REGISTER.match(text)]
    to = next(target for target in targets if not target.predicate)
    return lambda warp, mask: warp.write(to, 0, mask)


def _inside(warp: Warp, places: Value, mask: int, size: int, text: str) -> None:
    if max(active(places, mask)) + size > warp.block.shared_bytes:
        raise NotUnderstood(f"{text!r} is outside of the {warp.block.shared_bytes} bytes of shared memory")


@meaning("LDS")
def _load_shared(instruction: Instruction) -> Step:
    to, where, size = place(instruction.operands[0]), address(instruction.operands[1], False), _size(instruction)

    def step(warp: Warp, mask: int) -> None:
        places, shared = where(warp), warp.block.shared
        _inside(warp, places, mask, size, instruction.text)
        for word in range(max(1, size // 4)):
            read = lambda at: int.from_bytes(shared[at + 4 * word : at + 4 * word + min(size, 4)], "little")  # noqa: B023, E731
            warp.write(to, lift(read, places), mask, word)

    return step


@meaning("STS")
def _store_shared(instruction: Instruction) -> Step:
    where, size, text = address(instruction.operands[0], False), _size(instruction), instruction.operands[1]
    sources = [source(text, offset=word) for word in range(max(1, size // 4))]

    def step(warp: Warp, mask: int) -> None:
        places, shared = where(warp), warp.block.shared
        _inside(warp, places, mask, size, instruction.text)
        count = min(size, 4)
        for word, read in enumerate(sources):
            values = lanes_of(read(warp))
            for lane, at in enumerate(lanes_of(places)):
                if mask >> lane & 1:
                    content = values[lane] & (1 << 8 * count) - 1
                    shared[at + 4 * word : at + 4 * word + count] = content.to_bytes(count, "little")

    return step


@meaning("LDSM")
def _load_matrices(instruction: Instruction) -> Step:
    to, where = place(instruction.operands[0]), address(instruction.operands[1], False)
    words = {"4": 4, "2": 2}.get(modifiers_of(instruction)[-1], 1)

    def step(warp: Warp, mask: int) -> None:
        _inside(warp, where(warp), mask, 16, instruction.text)
        for word in range(words):
            warp.write(to, DATA, mask, word)

    return step


@meaning("LDGSTS")
def _copy(instruction: Instruction) -> Step:
    """A copy brings what its source is filled with, whether or not the lane asks for zeros."""
    to, where, size = (
        address(instruction.operands[0], False),
        address(instruction.operands[1], True),
        _size(instruction),
    )

    def step(warp: Warp, mask: int) -> None:
        places, shared = to(warp), warp.block.shared
        _inside(warp, places, mask, size, instruction.text)
        for region in _regions(warp, where(warp), mask, size):
            if region.word != DATA:
                content = region.word.to_bytes(4, "little") * (size // 4)
                for at in active(places, mask):
                    shared[at : at + size] = content

    return step


@meaning("LDL", "STL")
def _own_memory(instruction: Instruction) -> Step:
    loads, size = instruction.name == "LDL", _size(instruction)
    register, where = instruction.operands if loads else instruction.operands[::-1]
    to, at = place(register), address(where, False)
    words = max(1, size // 4)
    sources = [] if loads else [source(register, offset=word) for word in range(words)]

    def step(warp: Warp, mask: int) -> None:
        places = set(active(at(warp), mask))
        if len(places) != 1:
            raise NotUnderstood(f"{instruction.text!r} has another address in each lane")
        start = places.pop()
        for word in range(words):
            if loads:
                warp.write(to, warp.own_memory.get(start + 4 * word, 0), mask, word)
            else:
                before, now = warp.own_memory.get(start + 4 * word, 0), sources[word](warp)
                kept = zip(lanes_of(before), lanes_of(now), strict=True)
                merged = [new if mask >> lane & 1 else old for lane, (old, new) in enumerate(kept)]
                warp.own_memory[start + 4 * word] = now if mask == FULL else merged

    return step
