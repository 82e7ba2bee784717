"""PTX text as data: the kernels of a file, their instructions, labels, registers and shared variables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ptx.faults import UnknownInstruction

SHARED_BASE = 1024  # where shared memory begins, so that no address in it is null


@dataclass(frozen=True)
class Instruction:
    """``@predicate opcode.modifiers operands``."""

    opcode: str  # with its modifiers: "add.s32"
    operands: tuple[str, ...]  # as written: "%r1", "-4", "{%r1, %r2}", "[%rd1+8]"
    predicate: str | None  # "%p1", or "!%p1" where it runs if that is false
    place: str  # "qk_steps.cuh:117", empty where the file has no lines
    text: str

    def __str__(self) -> str:
        return f"`{self.text}`" + (f" ({self.place})" if self.place else "")


@dataclass
class Kernel:
    """One entry of a PTX file."""

    name: str  # mangled
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the number of the instruction that follows
    registers: dict[str, str] = field(default_factory=dict)  # their types: "pred", "b32"
    symbols: dict[str, int] = field(default_factory=dict)  # addresses of parameters and shared variables
    parameter_bytes: int = 0
    static_shared_bytes: int = 0


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX file by their mangled names.

    Raises:
        UnknownInstruction: the file holds a declaration that is not modelled.
    """
    files = {
        number: path.rpartition("/")[2] for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)
    }
    shared = re.findall(r"^\.(?:extern|visible|weak)?\s*\.?shared (?:\.align (\d+) )?\.b8 (\w+)\[(\d*)\];", text, re.M)
    entries = re.finditer(r"^(?:\.visible|\.weak) \.entry (\w+)\((.*?)\)(.*?)^\{$(.*?)^\}$", text, re.M | re.S)
    kernels = {}
    for name, parameters, _, body in (entry.groups() for entry in entries):
        kernel = kernels[name] = Kernel(name)
        _declare_parameters(kernel, parameters)
        _declare_shared(kernel, shared)
        for place, statement in _statements(body, files):
            _add_statement(kernel, statement, place)
    return kernels


def _declare_parameters(kernel: Kernel, text: str) -> None:
    for align, symbol, count in re.findall(r"\.param (?:\.align (\d+) )?\.\w+ (\w+)(?:\[(\d+)\])?", text):
        if not count or kernel.symbols:
            raise UnknownInstruction(f"a kernel with other parameters than one struct: {text.strip()}")
        assert int(align) <= 128
        kernel.symbols[symbol] = 0
        kernel.parameter_bytes = int(count)


def _declare_shared(kernel: Kernel, variables: list[tuple[str, str, str]]) -> None:
    """Static variables come first; the dynamic one, which has no size, takes what follows."""
    end = 0
    for align, symbol, count in sorted(variables, key=lambda variable: not variable[2]):
        end = -(-end // int(align or 1)) * int(align or 1)
        kernel.symbols[symbol] = SHARED_BASE + end
        end += int(count or 0)
    kernel.static_shared_bytes = end


def _statements(body: str, files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Every label and statement of a body without braces of scopes, and the place in the source that it comes from."""
    place, rest = "", ""
    for raw in body.splitlines():
        line = raw.partition("//")[0].strip()
        if line.startswith(".loc"):
            place = _place(line, files)
            continue
        if label := re.fullmatch(r"([$\w]+):", line):
            yield place, label[0]
            continue
        rest += f" {line}"
        *complete, rest = rest.split(";")
        for statement in complete:
            statement = re.sub(r"^[{}\s]+", "", statement).strip()
            if statement:
                yield place, statement


def _place(line: str, files: dict[str, str]) -> str:
    numbers = re.findall(r"(?:\.loc|inlined_at) (\d+) (\d+)", line)
    places = [f"{files.get(number, '?')}:{row}" for number, row in numbers]
    return ", called from ".join(dict.fromkeys(places))


def _add_statement(kernel: Kernel, statement: str, place: str) -> None:
    if statement.endswith(":"):
        kernel.labels[statement[:-1]] = len(kernel.instructions)
    elif registers := re.fullmatch(r"\.reg\s+\.(\w+)\s+([%\w]+)(?:<(\d+)>)?", statement):
        kind, name, count = registers.groups()
        names = [name] if count is None else [f"{name}{number}" for number in range(int(count))]
        if any(kernel.registers.get(name, kind) != kind for name in names):
            raise UnknownInstruction(f"two registers of one name and different types: {statement}")
        kernel.registers.update(dict.fromkeys(names, kind))
    elif statement.startswith("."):
        if not statement.startswith(".pragma"):
            raise UnknownInstruction(f"the declaration {statement!r}")
    else:
        kernel.instructions.append(_instruction(statement, place))


def _instruction(statement: str, place: str) -> Instruction:
    text = re.sub(r"\s+", " ", statement)
    match = re.fullmatch(r"(?:@(!?[%\w]+) )?(\S+)(?: (.*))?", text)
    assert match is not None, text
    predicate, opcode, operands = match.groups()
    split = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands or "")
    return Instruction(opcode, tuple(split), predicate, place, text)


def elements(operand: str) -> list[str]:
    """``["%r1", "%r2"]`` out of ``{%r1, %r2}``; any other operand alone."""
    return re.findall(r"[^{},\s]+", operand) if operand.startswith("{") else [operand]
