"""What the arithmetic instructions compute, on the 32 bits of each operand as a Python integer."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache

WORD = 0xFFFFFFFF
_ONE = struct.Struct("<f")
_BITS = struct.Struct("<I")
_HALF = struct.Struct("<e")


def as_float(bits: int) -> float:
    return _ONE.unpack(_BITS.pack(bits & WORD))[0]


def as_bits(value: float) -> int:
    try:
        return _BITS.unpack(_ONE.pack(value))[0]
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


def half_bits(value: float) -> int:
    try:
        return int.from_bytes(_HALF.pack(value), "little")
    except OverflowError:
        return 0x7C00 if value > 0 else 0xFC00


def half_value(bits: int) -> float:
    return _HALF.unpack((bits & 0xFFFF).to_bytes(2, "little"))[0]


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


@cache
def logic3(table: int) -> Callable[[int, int, int], int]:
    """Three words, bit by bit: bit i of the table is the result where the operands' bits spell i."""
    terms = [
        " & ".join(name if i & bit else f"~{name}" for name, bit in (("a", 4), ("b", 2), ("c", 1)))
        for i in range(8)
        if table >> i & 1
    ]
    return eval(f"lambda a, b, c: ({' | '.join(f'({term})' for term in terms) or '0'}) & {WORD}")


def shift(left: bool, high: bool, is_signed: bool, bits: int, wraps: bool) -> Callable[[int, int, int], int]:
    """SHF: the word pair (high, low) shifted, of which one word is the result."""

    def apply(low: int, count: int, upper: int) -> int:
        count = count % bits if wraps else min(count, bits)
        if is_signed:
            upper = signed(upper)
        pair = upper << 32 | low
        pair = pair << count if left else pair >> count
        return (pair >> 32 if high else pair) & WORD

    return apply


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b and a == a and b == b,
    "LTU": lambda a, b: not a >= b,
    "LEU": lambda a, b: not a > b,
    "GTU": lambda a, b: not a <= b,
    "GEU": lambda a, b: not a < b,
    "EQU": lambda a, b: a == b or a != a or b != b,
    "NEU": lambda a, b: a != b,
    "NUM": lambda a, b: a == a and b == b,
    "NAN": lambda a, b: a != a or b != b,
    "T": lambda a, b: True,
    "F": lambda a, b: False,
}


ARITHMETIC: dict[str, Callable[..., float]] = {
    "FADD": lambda a, b: a + b,
    "FMUL": lambda a, b: a * b,
    "FFMA": lambda a, b, c: a * b + c,
}


def permute(a: int, selector: int, b: int) -> int:
    """PRMT: each byte of the result is one of the eight bytes of b:a, or its sign."""
    source, result = b << 32 | a, 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = source >> 8 * (pick & 7) & 255
        result |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
    return result


def _exp2(x: float) -> float:
    try:
        return 2.0**x
    except OverflowError:
        return math.inf


def _reciprocal(x: float) -> float:
    return math.copysign(math.inf, x) if x == 0 else 1 / x


FUNCTIONS: dict[str, Callable[[float], float]] = {
    "EX2": _exp2,
    "RCP": _reciprocal,
    "RSQ": lambda x: _reciprocal(math.sqrt(x)) if x >= 0 else math.nan,
    "SQRT": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "LG2": lambda x: math.log2(x) if x > 0 else -math.inf if x == 0 else math.nan,
}


def to_integer(value: float, bits: int, is_signed: bool) -> int:
    """F2I, toward zero and held within the range."""
    if value != value:
        return 0
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    whole = most if value == math.inf else least if value == -math.inf else int(value)
    return min(max(whole, least), most) & ((1 << bits) - 1)


def immediate(text: str) -> int:
    """The bits of a literal: an integer as it is, a float as its 32 bits."""
    if text.lstrip("-").startswith("0x"):
        return int(text, 16) & WORD
    text = text.replace(" ", "")
    named = {"INF": math.inf, "QNAN": math.nan}
    plain = text.lstrip("+-")
    value = named[plain] if plain in named else float(plain)
    return as_bits(-value if text.startswith("-") else value)
