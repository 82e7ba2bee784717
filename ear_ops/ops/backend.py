"""Which backend runs a call of an operator: compiled kernels for the tensors' device, or the reference."""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from ear_ops.errors import BackendUnavailableError
from ear_ops.ops import extension

BACKENDS = ("auto", "reference", "cpu", "cuda")
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_EXTENSIONS = {"cpu": extension.CPU, "cuda": extension.CUDA}


def kernels_of(op: str) -> frozenset[str]:
    """The devices, ``"cpu"`` or ``"cuda"``, that have a kernel for ``op``.

    Ask once, when the operator is defined: a compiled graph cannot trace a question to the dispatcher.
    """
    return frozenset(
        device
        for device in _EXTENSIONS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"ear_ops::{op}", device.upper())
    )


def why_no_gpu() -> str:
    """What to say where ``torch.cuda.is_available()`` is false."""
    return "torch finds no GPU" if torch.version.cuda else f"this torch ({torch.__version__}) was built without CUDA"


def select_backend(
    requested: str | None, tensor: Tensor, op: str, kernels: frozenset[str], unsupported: str | None = None
) -> str:
    """The backend that runs ``op`` on ``tensor``: ``"reference"``, ``"cpu"`` or ``"cuda"``.

    Args:
        requested: what the caller asked for, None for the environment's ``EAR_OPS_BACKEND``.
        kernels: the devices that have kernels for ``op``, see :func:`kernels_of`.
        unsupported: why no kernel can take this call, if so.

    Raises:
        ValueError: ``requested`` is no backend.
        BackendUnavailableError: the backend asked for by name cannot run.
    """
    if requested is None:
        requested = os.environ.get("EAR_OPS_BACKEND") or "auto"
    if requested not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {requested!r}")
    if requested == "reference":
        return "reference"
    backend = _device_of(tensor) if requested == "auto" else requested
    reason = _why_not(backend, tensor, op, kernels, unsupported)
    if reason is None:
        return backend
    if requested == "auto":
        if not torch.compiler.is_compiling() and reason == _why_idle(backend, tensor):
            _warn_of_idle_kernels(backend, reason)
        return "reference"
    raise BackendUnavailableError(f"backend {requested!r} cannot run {op}: {reason}; use backend='auto' or 'reference'")


def _device_of(tensor: Tensor) -> str:
    """``tensor.device.type``, which takes as long as a small operator, in a quick way for the usual devices."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def _why_not(backend: str, tensor: Tensor, op: str, kernels: frozenset[str], unsupported: str | None) -> str | None:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "its kernels cannot be taken through torch.func (grad, vmap, ...)"
    if backend not in _EXTENSIONS:
        return f"there are no kernels for device {backend!r}"
    if _device_of(tensor) != backend:
        no_device = f", and {why_no_gpu()}" if backend == "cuda" and not torch.cuda.is_available() else ""
        return f"the tensors are on {tensor.device}{no_device}"
    if tensor.dtype not in _DTYPES[backend]:
        return f"it takes {', '.join(str(dtype) for dtype in _DTYPES[backend])}, got {tensor.dtype}"
    if unsupported is not None:
        return unsupported
    if backend not in kernels:
        binary = _EXTENSIONS[backend]
        return f"{binary.name} kernels hold no {op}" if binary.loaded else binary.reason
    return None if backend == "cpu" else _why_idle(backend, tensor)


def _why_idle(backend: str, tensor: Tensor) -> str | None:
    """Why kernels that this installation was to have do not run on the device of ``tensor``; else None."""
    if backend not in _EXTENSIONS:
        return None
    binary = _EXTENSIONS[backend]
    if not binary.loaded:
        return binary.reason if binary.expected else None
    # A compiled graph cannot ask the device; there the launch says that it did not start.
    return why_not_this_gpu(tensor.device.index) if backend == "cuda" and not torch.compiler.is_compiling() else None


@cache
def _warn_of_idle_kernels(backend: str, reason: str) -> None:
    """Once for each reason: the reference computes the same, so nothing else tells that the kernels do not run."""
    warnings.warn(
        f"the {backend} kernels do not run, so the slower reference runs in their place: {reason}",
        stacklevel=5,
    )


@cache
def why_not_this_gpu(index: int) -> str | None:
    """Why the CUDA kernels do not run on this GPU, None where they do."""
    if not torch.cuda.is_available():  # fake tensors of a GPU that is elsewhere
        return None
    info = extension.build_info()
    architectures = info["cuda_architectures"].split() if info else []
    major, minor = torch.cuda.get_device_capability(index)
    if not architectures or _has_code_for(architectures, major, minor):
        return None
    return f"its kernels were built for {', '.join(architectures)} and the GPU is sm_{major}{minor}"


def _has_code_for(architectures: list[str], major: int, minor: int) -> bool:
    """Whether kernels built for ``architectures`` run on a GPU of this compute capability.

    Machine code for ``sm_90a`` runs on that capability alone. Code for ``sm_90`` and ``sm_100f`` also runs on later
    GPUs of its generation. The PTX of the last name without a letter is translated for any later GPU.
    """
    capability = 10 * major + minor
    numbers = {name: int(name.removeprefix("sm_").rstrip("af")) for name in architectures}
    plain = [name for name in architectures if name[-1].isdigit()]
    if plain and capability >= numbers[plain[-1]]:
        return True
    return any(
        number == capability or (not name.endswith("a") and number // 10 == major and number <= capability)
        for name, number in numbers.items()
    )
