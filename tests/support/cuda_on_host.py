"""The CUDA kernels on the host: ``tests/cuda_on_host`` compiled, and put in the place of the CPU kernels."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ear_ops.ops.operator import SCHEMAS

LIBRARY = Path(__file__).parents[2] / "build" / "cuda_on_host" / "ear_ops_cuda_on_host.so"
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}  # bytes that a block may ask for


def load() -> None:
    """Load the library; its operators take CPU tensors."""
    if not hasattr(torch.ops.ear_ops_cuda_on_host, "configure"):
        for name, schema in SCHEMAS.items():
            torch.library.define(f"ear_ops_cuda_on_host::{name}", schema)
        torch.ops.load_library(LIBRARY)


def configure(seed: int = 0, architecture: str = "sm_90") -> None:
    """The order in which threads and blocks run, and the device whose shared memory the kernels must do with."""
    torch.ops.ear_ops_cuda_on_host.configure(seed, SHARED_MEMORY[architecture], architecture == "sm_90")


@contextlib.contextmanager
def in_place_of_cpu_kernels(around: Callable[[Any], Callable[..., Any]] = lambda operator: operator) -> Iterator[None]:
    """``around`` makes of an operator of the library what is called in its place."""
    load()
    library = torch.library.Library("ear_ops", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name in SCHEMAS:
            operator = getattr(torch.ops.ear_ops_cuda_on_host, name).default
            library.impl(name, around(operator), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
