"""Finds and loads the compiled kernels, and says why not.

Two kinds of binaries lie beside this file when they were built: ``_build_info`` (build facts, no torch) and ``_C_cpu``,
``_C_cuda`` (kernels that register themselves with torch). Kernels belong to the torch they were built for, so the build
facts are read first and a binary for another torch is not loaded. Nothing is ever compiled here.
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
    """One binary: loaded, or the reason why not. ``built``: it lies beside this file."""

    name: str
    loaded: bool
    reason: str
    built: bool


def build_info() -> dict[str, Any] | None:
    """The facts recorded at build time (torch, compiler, CUDA architectures), None where nothing was built."""
    try:
        return dict(importlib.import_module("ear_ops._build_info").facts())
    except ImportError:
        return None


def _release(version: str) -> tuple[str, ...]:
    """The part of a torch version that binaries depend on: "2.13.0+cpu" -> ("2", "13")."""
    return tuple(version.split("+")[0].split(".")[:2])


def load(name: str) -> Extension:
    """Load ``ear_ops._C_<name>`` and so register its kernels; never raises."""
    spec = importlib.util.find_spec(f"ear_ops._C_{name}")
    if spec is None or spec.origin is None:
        reason = (build_info() or {}).get("not_built", {}).get(name, "see EAR_OPS_BUILD in the README")
        return Extension(name, False, f"no {name} kernels were built ({reason})", built=False)
    info = build_info()
    if info is None:
        return Extension(name, False, f"{spec.origin} has no build facts beside it; {rebuild()}", built=True)
    if _release(info["torch"]) != _release(torch.__version__):
        return Extension(
            name,
            False,
            f"built for torch {info['torch']}, running torch {torch.__version__}; {rebuild()}",
            built=True,
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return Extension(name, False, f"{spec.origin} did not load: {error}", built=True)
    return Extension(name, True, f"loaded from {spec.origin}", built=True)


CPU = load("cpu")
CUDA = load("cuda")
