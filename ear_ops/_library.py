"""The operators ``torch.ops.ear_ops.*``: their schemas, their fake kernels, and which backend runs a call.

Schemas and fakes are defined here once, for forward and backward operators, so that ``torch.compile`` and
``torch.library.opcheck`` cover both; the binaries only register implementations for their device.

Both views come in one tensor (``*_aug`` None) or in two. ``key_mask`` is ``[2B, S]``, ``counted_queries`` ``[B, L]``,
biases are expanded to ``[B, H, L, S]`` in the compute dtype, and a ``window`` of 0 means none. Backward operators
return the gradients asked for by ``needs``, in the order of the inputs, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import _extension
from .reference import compute_dtype

BACKENDS = ("auto", "reference", "cpu", "cuda")
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_EXTENSIONS = {"cpu": _extension.CPU, "cuda": _extension.CUDA}

_QK_INPUTS = (
    "Tensor query, Tensor key, Tensor? query_aug, Tensor? key_aug, Tensor? key_mask, Tensor? counted_queries, "
    "Tensor? attn_bias, Tensor? attn_bias_aug, float scale, bool is_causal, int window"
)
SCHEMAS = {
    "qk_attention_mse": f"({_QK_INPUTS}) -> (Tensor sums, Tensor row_stats)",
    "qk_attention_mse_backward": f"(Tensor grad_sums, {_QK_INPUTS}, Tensor row_stats, bool[] needs) -> Tensor[]",
    "attention_mse": "(Tensor attn, Tensor? attn_aug, Tensor? key_mask, Tensor? counted_queries) -> Tensor",
    "attention_mse_backward": (
        "(Tensor grad_sums, Tensor attn, Tensor? attn_aug, Tensor? key_mask, Tensor? counted_queries, bool[] needs) "
        "-> Tensor[]"
    ),
    "pooled_distance": "(Tensor hidden, Tensor? hidden_aug, Tensor? mask) -> (Tensor sums, Tensor difference)",
    "pooled_distance_backward": (
        "(Tensor grad_sums, Tensor difference, Tensor hidden, Tensor? hidden_aug, Tensor? mask, bool[] needs) "
        "-> Tensor[]"
    ),
}


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


for _name, _schema in SCHEMAS.items():
    torch.library.define(f"ear_ops::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _pairs(tensor: Tensor, tensor_aug: Tensor | None) -> int:
    """B, whether both views came in one tensor or in two."""
    return tensor.shape[0] // 2 if tensor_aug is None else tensor.shape[0]


def _like_needed(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor, needed in zip(inputs, needs, strict=True)
        if tensor is not None and needed
    ]


@torch.library.register_fake("ear_ops::qk_attention_mse")
def _(query, key, query_aug, key_aug, key_mask, counted_queries, attn_bias, attn_bias_aug, scale, is_causal, window):  # type: ignore[no-untyped-def]
    batch, (_, heads, length, _) = _pairs(query, query_aug), query.shape
    dtype = compute_dtype(query.dtype)
    return query.new_empty((batch, heads), dtype=dtype), query.new_empty((6, batch, heads, length), dtype=dtype)


@torch.library.register_fake("ear_ops::qk_attention_mse_backward")
def _(  # type: ignore[no-untyped-def]
    grad_sums,
    query,
    key,
    query_aug,
    key_aug,
    key_mask,
    counted_queries,
    attn_bias,
    attn_bias_aug,
    scale,
    is_causal,
    window,
    row_stats,
    needs,
):
    return _like_needed((query, key, query_aug, key_aug), needs)


@torch.library.register_fake("ear_ops::attention_mse")
def _(attn, attn_aug, key_mask, counted_queries):  # type: ignore[no-untyped-def]
    return attn.new_empty((_pairs(attn, attn_aug), attn.shape[1]), dtype=compute_dtype(attn.dtype))


@torch.library.register_fake("ear_ops::attention_mse_backward")
def _(grad_sums, attn, attn_aug, key_mask, counted_queries, needs):  # type: ignore[no-untyped-def]
    return _like_needed((attn, attn_aug), needs)


@torch.library.register_fake("ear_ops::pooled_distance")
def _(hidden, hidden_aug, mask):  # type: ignore[no-untyped-def]
    batch, dtype = _pairs(hidden, hidden_aug), compute_dtype(hidden.dtype)
    return hidden.new_empty((batch,), dtype=dtype), hidden.new_empty((batch, hidden.shape[2]), dtype=dtype)


@torch.library.register_fake("ear_ops::pooled_distance_backward")
def _(grad_sums, difference, hidden, hidden_aug, mask, needs):  # type: ignore[no-untyped-def]
    return _like_needed((hidden, hidden_aug), needs)


# Read once, after the binaries have registered: asking the dispatcher is nothing that a compiled graph can trace.
_IMPLEMENTED = {
    op: frozenset(
        backend
        for backend in _EXTENSIONS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"ear_ops::{op}", backend.upper())
    )
    for op in SCHEMAS
}


def why_unavailable(backend: str, op: str) -> str | None:
    """Why ``op`` has no kernel of ``backend`` here, None where it has one."""
    if backend in _IMPLEMENTED[op]:
        return None
    extension = _EXTENSIONS[backend]
    return f"{extension.name} kernels hold no {op}" if extension.loaded else extension.reason


def why_no_gpu() -> str:
    """What to say where ``torch.cuda.is_available()`` is false."""
    return "torch finds no GPU" if torch.version.cuda else f"this torch ({torch.__version__}) was built without CUDA"


def select_backend(requested: str | None, tensor: Tensor, op: str, unsupported: str | None = None) -> str:
    """The backend that runs ``op`` on ``tensor``: ``"reference"``, ``"cpu"`` or ``"cuda"``.

    ``requested``: what the caller asked for, None for the environment's ``EAR_OPS_BACKEND``. ``unsupported``: why no
    kernel can take this call, if so.
    """
    if requested is None:
        requested = os.environ.get("EAR_OPS_BACKEND") or "auto"
    if requested not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {requested!r}")
    if requested == "reference":
        return "reference"
    backend = tensor.device.type if requested == "auto" else requested
    reason = _why_not(backend, tensor, op, unsupported)
    if reason is None:
        return backend
    if requested == "auto":
        return "reference"
    raise BackendUnavailableError(f"backend {requested!r} cannot run {op}: {reason}; use backend='auto' or 'reference'")


def _why_not(backend: str, tensor: Tensor, op: str, unsupported: str | None) -> str | None:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "its kernels cannot be taken through torch.func (grad, vmap, ...)"
    if backend not in _EXTENSIONS:
        return f"there are no kernels for device {backend!r}"
    if tensor.device.type != backend:
        no_device = f", and {why_no_gpu()}" if backend == "cuda" and not torch.cuda.is_available() else ""
        return f"the tensors are on {tensor.device}{no_device}"
    if tensor.dtype not in _DTYPES[backend]:
        return f"it takes {', '.join(str(dtype) for dtype in _DTYPES[backend])}, got {tensor.dtype}"
    if reason := unsupported or why_unavailable(backend, op):
        return reason
    # A compiled graph cannot ask the device; there the launch says that it did not start.
    return why_not_this_gpu(tensor.device.index) if backend == "cuda" and not torch.compiler.is_compiling() else None


@cache
def why_not_this_gpu(index: int) -> str | None:
    """Why kernels that were built do not run on this GPU, None where they do: machine code runs on later GPUs of its
    own generation, and for the last architecture there is code to be translated for any later one, too."""
    if not torch.cuda.is_available():  # fake tensors of a GPU that is elsewhere
        return None
    info = _extension.build_info()
    built = [int(name.removeprefix("sm_")) for name in info["cuda_architectures"].split()] if info else []
    major, minor = torch.cuda.get_device_capability(index)
    here = 10 * major + minor
    if not built or here >= built[-1] or any(each // 10 == major and each <= here for each in built):
        return None
    return f"its kernels were built for {', '.join(f'sm_{each}' for each in built)} and the GPU is sm_{here}"
