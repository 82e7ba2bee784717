"""Finds and loads the compiled kernels, and says why not.

What was built lies in the package: ``_build_info`` (build facts, no torch) and ``_C_cpu``, ``_C_cuda`` (kernels that
register themselves with torch). Kernels belong to the torch they were built for, so the build facts are read first and
a binary for another torch is not loaded. Nothing is ever compiled here.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from ear_ops.installation import rebuild


@dataclass(frozen=True)
class Extension:
    """One binary: loaded, or the reason why not.

    ``expected``: whether the installation was to have these kernels. Where they do not run, that must be told. They are
    not expected where ``EAR_OPS_BUILD`` left them out, nor in source files that nothing was ever built from.
    """

    name: str
    loaded: bool
    reason: str
    expected: bool


def build_info() -> dict[str, Any] | None:
    """The facts recorded at build time (torch, compiler, CUDA architectures), None where no build was run.

    They may be those of an older checkout until an editable installation is built again.
    """
    try:
        return {"by_choice": [], **importlib.import_module("ear_ops._build_info").facts()}
    except ImportError:
        return None


def _release(version: str) -> tuple[str, ...]:
    """The part of a torch version that binaries depend on: "2.13.0+cpu" -> ("2", "13")."""
    return tuple(version.split("+")[0].split(".")[:2])


def load(name: str) -> Extension:
    """Load ``ear_ops._C_<name>`` and so register its kernels; never raises."""
    spec = importlib.util.find_spec(f"ear_ops._C_{name}")
    binary = spec.origin if spec is not None else None
    info = build_info()
    expected = binary is not None if info is None else name not in info["by_choice"]
    if binary is None:
        why = info["not_built"].get(name, "the file is missing") if info else "these are source files alone"
        useless = name == "cuda" and torch.version.cuda is None  # to build again, with a torch that has no CUDA
        reason = f"no {name} kernels were built ({why})" + ("" if useless else f"; {rebuild()}")
    elif info is None:
        reason = f"{binary} has no build facts beside it; {rebuild()}"
    elif _release(info["torch"]) != _release(torch.__version__):
        reason = f"built for torch {info['torch']}, running torch {torch.__version__}; {rebuild()}"
    else:
        try:
            torch.ops.load_library(binary)
            return Extension(name, True, f"loaded from {binary}", expected)
        except OSError as error:
            reason = f"{binary} did not load: {error}"
    return Extension(name, False, reason, expected)


CPU = load("cpu")
CUDA = load("cuda")
