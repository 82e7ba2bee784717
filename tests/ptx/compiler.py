"""The PTX that nvcc makes of the kernels, and which file holds which kernel."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

from ptx.parser import Kernel, parse
from ptx.program import Program

HOPPER = "qk_hopper.cu"  # a file for sm_90a alone
SOURCES = Path(__file__).parents[2] / "csrc"


class CompileError(Exception):
    """nvcc refuses a file."""


class Compiler:
    """Compiles a file once, when a kernel of it is first asked for.

    Args:
        architecture: such as ``sm_80``.
        folder: where PTX is kept.
        sources: ``csrc``, or a changed copy of it.
    """

    def __init__(self, architecture: str, folder: Path, sources: Path = SOURCES) -> None:
        self.architecture, self._folder, self._sources = architecture, folder, sources
        self._kernels: dict[Path, dict[str, Kernel]] = {}
        self._programs: dict[str, Program] = {}

    def program(self, name: str) -> Program:
        """The kernel of a mangled name."""
        if name not in self._programs:
            source = self._sources / "cuda" / source_of(name)
            kernels = self.kernels(source)
            if name not in kernels:
                raise CompileError(f"{source.name}: expected the kernel {demangled(name)}, found {sorted(kernels)}")
            self._programs[name] = Program(kernels[name])
        return self._programs[name]

    def programs(self, source: Path) -> list[Program]:
        """All kernels of a file."""
        return [Program(kernel) for kernel in self.kernels(source).values()]

    def kernels(self, source: Path) -> dict[str, Kernel]:
        if source not in self._kernels:
            architecture = "sm_90a" if source.name == HOPPER else self.architecture
            target = self._folder / f"{source.stem}.{architecture}.ptx"
            if not target.exists():
                command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", f"-arch={architecture}", "-ptx"]
                command += [f"-I{self._sources / 'cuda'}", str(source), "-o", str(target)]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    raise CompileError(f"{source.name}, {architecture}: nvcc failed\n{result.stderr}")
            self._kernels[source] = parse(target.read_text())
        return self._kernels[source]


@cache
def demangled(name: str) -> str:
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


def source_of(name: str) -> str:
    """The file below ``csrc/cuda`` that instantiates a kernel, from its argument and template arguments."""
    if "(ear_ops::cuda::HopperArgs)" in demangled(name):
        return HOPPER
    match = re.search(r"<(?:ear_ops::cuda::)?(\w+), (?:\(\w+\))?(\w+)[^<>]*>\(ear_ops::cuda::(\w+)\)", demangled(name))
    if match is None:
        raise CompileError(f"expected a kernel with an element type and a number or bool, got {demangled(name)}")
    element, number, arguments = match.groups()
    divergences = "divergences_" if re.search(r"::(Kl|Js|SquaredScores)>\(", demangled(name)) else ""
    files = {
        "QKArgs": f"instances/qk_{divergences}{element}_{number}.cu",
        **dict.fromkeys(("MeanArgs", "MeanViewArgs"), f"instances/mean_{element}_{number}.cu"),
        "MapsArgs": "attention_mse.cu",
        "PooledArgs": "pooled_distance.cu",
        "WordArgs": "qk_words.cu",
    }
    return files[arguments]
