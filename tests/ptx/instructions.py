"""What each thread does alone: arithmetic, comparisons, conversions, moves, loads, stores and asynchronous copies.

To add an instruction, write one function that takes the instruction and returns what it does, and name its opcode in
``@instruction``. The longest name that begins the opcode wins; :func:`modifiers` refuses what it does not know.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from ptx import rounding
from ptx.faults import Fault, UnknownInstruction
from ptx.operands import Lanes, address, dtype_of, reader, writer
from ptx.parser import Instruction, Kernel, elements

if TYPE_CHECKING:
    from ptx.machine import Machine

Step = Callable[["Machine", Lanes], None]
Builder = Callable[[Kernel, Instruction], Step]

TABLE: dict[str, Builder] = {}


def instruction(*names: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        TABLE.update(dict.fromkeys(names, builder))
        return builder

    return register


Entry = TypeVar("Entry")


def find(table: dict[str, Entry], opcode: str) -> Entry | None:
    """The entry whose name is the longest beginning of an opcode."""
    parts = opcode.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((table[name] for name in names if name in table), None)


def modifiers(of: Instruction, name: str, known: str = "") -> list[str]:
    """What follows the name in the opcode; ``known`` lists what may.

    Raises:
        UnknownInstruction: for any other.
    """
    rest = of.opcode.removeprefix(name).split(".")[1:]
    unknown = [modifier for modifier in rest if modifier not in known.split()]
    if unknown:
        raise UnknownInstruction(f".{unknown[0]} of {of}")
    return rest


INTEGERS = "u16 u32 u64 s16 s32 s64"
BITS = "b16 b32 b64"
FLOATS = "f32 f64"


def elementwise(kernel: Kernel, of: Instruction, kind: str, compute: Callable[..., Any], result: str = "") -> Step:
    """``result = compute(operands)`` where all have one type."""
    sources = [reader(kernel, operand, kind) for operand in of.operands[1:]]
    write = writer(kernel, of.operands[0], result or kind)

    def step(machine: Machine, lanes: Lanes) -> None:
        write(machine, lanes, compute(*[source(machine, lanes) for source in sources]))

    return step


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _divide(a: Any, b: Any) -> Any:
    """The quotient, truncated; dividing by zero gives the ISA's unspecified number, here one with all bits set."""
    if a.dtype.kind == "f":
        return a / b
    divisor = np.where(b == 0, np.ones_like(b), b)
    quotient = np.floor_divide(a, divisor)
    quotient = quotient + ((quotient < 0) & (quotient * divisor != a)).astype(a.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient)


def _remainder(a: Any, b: Any) -> Any:
    return a - _divide(a, b) * b


_ARITHMETIC: dict[str, tuple[str, Callable[..., Any]]] = {
    "add": (f"rn {INTEGERS} {FLOATS}", operator.add),
    "sub": (f"rn {INTEGERS} {FLOATS}", operator.sub),
    "min": (f"{INTEGERS} {FLOATS}", np.fmin),  # a number wins over NaN
    "max": (f"{INTEGERS} {FLOATS}", np.fmax),
    "div": (f"rn {INTEGERS} {FLOATS}", _divide),
    "rem": (INTEGERS, _remainder),
    "neg": (f"s16 s32 s64 {FLOATS}", operator.neg),
    "abs": (f"s16 s32 s64 {FLOATS}", np.abs),
    "rcp.rn": (FLOATS, lambda a: a.dtype.type(1) / a),
    "and": (f"pred {BITS}", operator.and_),
    "or": (f"pred {BITS}", operator.or_),
    "xor": (f"pred {BITS}", operator.xor),
    "not": (f"pred {BITS}", operator.invert),
    "mul.lo": (INTEGERS, operator.mul),
    "mad.lo": (INTEGERS, lambda a, b, c: a * b + c),
    "mul": (f"rn {FLOATS}", operator.mul),
}


@instruction(*_ARITHMETIC)
def _arithmetic(kernel: Kernel, of: Instruction) -> Step:
    name = max((name for name in _ARITHMETIC if f"{of.opcode}.".startswith(f"{name}.")), key=len)
    known, compute = _ARITHMETIC[name]
    return elementwise(kernel, of, modifiers(of, name, known)[-1], compute)


@instruction("mul.hi")
def _high(kernel: Kernel, of: Instruction) -> Step:
    """The upper half of the whole product."""
    (kind,) = modifiers(of, "mul.hi", "u16 u32 s16 s32")
    dtype = dtype_of(kind)
    wide = dtype_of(f"{kind[0]}{2 * int(kind[1:])}")
    bits = 8 * dtype.itemsize
    return elementwise(kernel, of, kind, lambda a, b: (a.astype(wide) * b.astype(wide) >> bits).astype(dtype))


@instruction("mul.wide", "mad.wide")
def _wide(kernel: Kernel, of: Instruction) -> Step:
    """The whole product, twice as long as the factors."""
    (kind,) = modifiers(of, of.opcode[:8], "u16 u32 s16 s32")
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    a, b = (reader(kernel, operand, kind) for operand in of.operands[1:3])
    addend = reader(kernel, of.operands[3], wide) if len(of.operands) == 4 else None
    write, dtype = writer(kernel, of.operands[0], wide), dtype_of(wide)

    def step(machine: Machine, lanes: Lanes) -> None:
        product = a(machine, lanes).astype(dtype) * b(machine, lanes).astype(dtype)
        write(machine, lanes, product if addend is None else product + addend(machine, lanes))

    return step


@instruction("fma.rn")
def _fma(kernel: Kernel, of: Instruction) -> Step:
    """The product is exact; the sum is rounded to float64 and then to float32, once too often in rare cases."""
    (kind,) = modifiers(of, "fma.rn", "f32")
    return elementwise(
        kernel,
        of,
        kind,
        lambda a, b, c: (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32),
    )


@instruction("ex2.approx.ftz")
def _ex2(kernel: Kernel, of: Instruction) -> Step:
    (kind,) = modifiers(of, "ex2.approx.ftz", "f32")
    smallest = np.finfo(np.float32).tiny

    def compute(x: Any) -> Any:
        power = np.exp2(x.astype(np.float64)).astype(np.float32)
        return np.where(power < smallest, np.float32(0), power)

    return elementwise(kernel, of, kind, compute)


_FUNCTIONS: dict[str, Callable[..., Any]] = {"lg2.approx.ftz": np.log2, "rcp.approx.ftz": np.reciprocal}


@instruction(*_FUNCTIONS)
def _function(kernel: Kernel, of: Instruction) -> Step:
    """Rounded from float64; subnormal numbers count as zero, before and after."""
    (kind,) = modifiers(of, of.opcode[: len("lg2.approx.ftz")], "f32")
    function = _FUNCTIONS[of.opcode[: len("lg2.approx.ftz")]]

    def flushed(x: Any) -> Any:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)

    def compute(x: Any) -> Any:
        return flushed(function(flushed(x).astype(np.float64)).astype(np.float32))

    return elementwise(kernel, of, kind, compute)


@instruction("shl", "shr")
def _shift(kernel: Kernel, of: Instruction) -> Step:
    """Bits move; of more places than there are, all leave."""
    kind = modifiers(of, of.opcode[:3], f"{INTEGERS} {BITS}")[-1]
    dtype, left = dtype_of(kind), of.opcode.startswith("shl")
    value, places = reader(kernel, of.operands[1], kind), reader(kernel, of.operands[2], "u32")
    write, width = writer(kernel, of.operands[0], kind), 8 * dtype.itemsize

    def step(machine: Machine, lanes: Lanes) -> None:
        number, count = value(machine, lanes), places(machine, lanes)
        moved = (np.left_shift if left else np.right_shift)(number, np.minimum(count, width - 1).astype(dtype))
        if left or dtype.kind == "u":
            moved = np.where(count >= width, dtype.type(0), moved)
        write(machine, lanes, moved)

    return step


@instruction("bfi")
def _insert(kernel: Kernel, of: Instruction) -> Step:
    """The lowest bits of the first number take the place of some bits of the second."""
    (kind,) = modifiers(of, "bfi", "b32 b64")
    dtype = dtype_of(kind)
    first, count = (int(operand) for operand in of.operands[3:])
    mask = dtype.type(((1 << count) - 1) << first & (1 << 8 * dtype.itemsize) - 1)
    narrow = Instruction(of.opcode, of.operands[:3], of.predicate, of.place, of.text)
    return elementwise(kernel, narrow, kind, lambda a, b: a << dtype.type(first) & mask | b & ~mask)


# --- comparisons ----------------------------------------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "num": lambda a, b: np.full(np.broadcast(a, b).shape, True),  # where neither is NaN
}
_COMBINATIONS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


@instruction("setp")
def _setp(kernel: Kernel, of: Instruction) -> Step:
    """``p = a ? b``, combined with another predicate if there is one; with ``u``, NaN makes it true."""
    comparisons = [*_COMPARISONS, *(f"{name}u" for name in _COMPARISONS if name != "num")]
    known = f"{' '.join([*comparisons, *_COMBINATIONS])} {INTEGERS} {BITS} {FLOATS}"
    name, *combination, kind = modifiers(of, "setp", known)
    unordered = name not in _COMPARISONS
    compare = _COMPARISONS[name.removesuffix("u") if unordered else name]
    a, b = reader(kernel, of.operands[1], kind), reader(kernel, of.operands[2], kind)
    also = reader(kernel, of.operands[3], "pred") if combination else None
    write = writer(kernel, of.operands[0], "pred")

    def step(machine: Machine, lanes: Lanes) -> None:
        left, right = a(machine, lanes), b(machine, lanes)
        result = compare(left, right)
        if kind in FLOATS.split():
            no_number = np.isnan(left) | np.isnan(right)
            result = result | no_number if unordered else result & ~no_number
        if also is not None:
            result = _COMBINATIONS[combination[0]](result, also(machine, lanes))
        write(machine, lanes, np.asarray(result))

    return step


@instruction("selp")
def _selp(kernel: Kernel, of: Instruction) -> Step:
    (kind,) = modifiers(of, "selp", f"{INTEGERS} {BITS} {FLOATS}")
    a, b = (reader(kernel, operand, kind) for operand in of.operands[1:3])
    condition, write = reader(kernel, of.operands[3], "pred"), writer(kernel, of.operands[0], kind)

    def step(machine: Machine, lanes: Lanes) -> None:
        write(machine, lanes, np.where(condition(machine, lanes), a(machine, lanes), b(machine, lanes)))

    return step


# --- moves and conversions ------------------------------------------------------------------------------------------


@instruction("mov")
def _mov(kernel: Kernel, of: Instruction) -> Step:
    """A copy; with braces, several short registers make a long one, or the other way round, lowest bits first."""
    (kind,) = modifiers(of, "mov", f"pred {INTEGERS} {BITS} {FLOATS}")
    results, sources = elements(of.operands[0]), elements(of.operands[1])
    if len(results) == len(sources) == 1:
        return elementwise(kernel, of, kind, lambda value: value)
    dtype = dtype_of(kind)
    part = f"b{8 * dtype.itemsize // max(len(results), len(sources))}"
    if len(sources) > 1:
        parts, write = [reader(kernel, source, part) for source in sources], writer(kernel, results[0], kind)

        def join(machine: Machine, lanes: Lanes) -> None:
            count = len(machine.numbers(lanes))
            columns = [np.broadcast_to(source(machine, lanes), count) for source in parts]
            write(machine, lanes, np.stack(columns, axis=1).view(dtype)[:, 0])

        return join
    whole, writers = reader(kernel, sources[0], kind), [writer(kernel, result, part) for result in results]

    def split(machine: Machine, lanes: Lanes) -> None:
        columns = np.atleast_1d(whole(machine, lanes))[:, None].view(dtype_of(part))
        for number, write in enumerate(writers):
            write(machine, lanes, np.ascontiguousarray(columns[:, number]))

    return split


@instruction("cvta")
def _cvta(kernel: Kernel, of: Instruction) -> Step:
    """Addresses of all spaces are the same numbers here."""
    kind = modifiers(of, "cvta", "to global shared param u32 u64")[-1]
    return elementwise(kernel, of, kind, lambda value: value)


_ROUNDED: dict[str, Callable[[Any, str], Any]] = {
    "bf16": rounding.to_bfloat16,
    "f16": rounding.to_float16,
}


@instruction("cvt")
def _cvt(kernel: Kernel, of: Instruction) -> Step:
    known = f"rn rz u8 s8 f16 bf16 f16x2 bf16x2 {INTEGERS} {FLOATS}"
    *modes, result, kind = modifiers(of, "cvt", known)
    mode = modes[0] if modes else ""
    if result.endswith("x2"):  # the first operand comes into the upper half
        upper, lower = (reader(kernel, operand, "f32") for operand in of.operands[1:])
        write, to_half = writer(kernel, of.operands[0], "b32"), _ROUNDED[result.removesuffix("x2")]

        def pack(machine: Machine, lanes: Lanes) -> None:
            high, low = (to_half(np.atleast_1d(value(machine, lanes)), mode) for value in (upper, lower))
            write(machine, lanes, high.astype(np.uint32) << np.uint32(16) | low)

        return pack
    if result in _ROUNDED:
        return elementwise(kernel, of, kind, lambda x: _ROUNDED[result](np.atleast_1d(x), mode), "b16")
    if kind == "f16":
        return elementwise(kernel, of, kind, lambda x: x.view(np.float16).astype(dtype_of(result)), result)
    if kind == "bf16":
        return elementwise(kernel, of, kind, lambda x: rounding.bfloat16_to_float(x).astype(dtype_of(result)), result)
    from_float, to_float = kind[0] == "f", result[0] == "f"
    if (from_float and not to_float) or mode not in ("", "rn"):
        raise UnknownInstruction(str(of))
    return elementwise(kernel, of, kind, lambda x: x.astype(dtype_of(result)), result)


# --- memory ---------------------------------------------------------------------------------------------------------


def _layout(of: Instruction) -> tuple[str, int, str]:
    """The space, how many registers one access moves, and their type."""
    known = f"param global shared nc ca cg v2 v4 u8 s8 {INTEGERS} {BITS} {FLOATS}"
    space, *rest, kind = modifiers(of, of.opcode[:2], known)
    count = next((int(modifier[1:]) for modifier in rest if modifier.startswith("v")), 1)
    return space, count, kind


@instruction("ld")
def _ld(kernel: Kernel, of: Instruction) -> Step:
    space, count, kind = _layout(of)
    dtype, at = dtype_of(kind), address(kernel, of.operands[1])
    writers = [writer(kernel, result, kind) for result in elements(of.operands[0])]
    assert len(writers) == count

    def step(machine: Machine, lanes: Lanes) -> None:
        values = machine.load(space, at(machine, lanes), count * dtype.itemsize, machine.numbers(lanes)).view(dtype)
        for number, write in enumerate(writers):
            write(machine, lanes, np.ascontiguousarray(values[:, number]))

    return step


@instruction("st")
def _st(kernel: Kernel, of: Instruction) -> Step:
    space, count, kind = _layout(of)
    dtype, at = dtype_of(kind), address(kernel, of.operands[0])
    sources = [reader(kernel, source, kind) for source in elements(of.operands[1])]
    assert len(sources) == count

    def step(machine: Machine, lanes: Lanes) -> None:
        numbers = machine.numbers(lanes)
        values = np.empty((len(numbers), count), dtype)
        for number, source in enumerate(sources):
            values[:, number] = source(machine, lanes)
        machine.store(space, at(machine, lanes), values.view(np.uint8), numbers)

    return step


@instruction("cp.async.ca.shared.global", "cp.async.cg.shared.global")
def _cp_async(kernel: Kernel, of: Instruction) -> Step:
    """Copies the first bytes, as many as the last operand says, and fills the rest with zeros."""
    if len(of.operands) not in (3, 4) or of.opcode.count(".") != 4:
        raise UnknownInstruction(str(of))
    to, source, size = address(kernel, of.operands[0]), address(kernel, of.operands[1]), int(of.operands[2])
    count = reader(kernel, of.operands[3] if len(of.operands) == 4 else of.operands[2], "u32")

    def step(machine: Machine, lanes: Lanes) -> None:
        numbers = machine.numbers(lanes)
        real = np.broadcast_to(count(machine, lanes), numbers.shape)
        if not np.isin(real, (0, size)).all():
            raise Fault(f"cp.async: expected all {size} bytes or none, got {int(real.max())}")
        sources, values = source(machine, lanes), np.zeros((len(numbers), size), np.uint8)
        if (some := real != 0).any():
            values[some] = machine.memory.load(sources[some], size, numbers[some])
        machine.copies.begin(to(machine, lanes), values, numbers)

    return step


@instruction("cp.async.commit_group")
def _commit(kernel: Kernel, of: Instruction) -> Step:
    return lambda machine, lanes: machine.copies.commit(machine.numbers(lanes))


@instruction("cp.async.wait_group")
def _wait(kernel: Kernel, of: Instruction) -> Step:
    groups = int(of.operands[0])
    return lambda machine, lanes: machine.copies.wait(machine.numbers(lanes), groups)
