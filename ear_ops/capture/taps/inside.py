"""Attention that a module computes by itself, seen through the torch functions that it calls.

While the forward of such a module runs, a ``TorchFunctionMode`` watches two functions. The arguments of
``scaled_dot_product_attention`` are queries and keys. The result of ``softmax`` is the attention matrix before dropout.
A mode belongs to one thread, and ``torch.compile`` traces through it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ear_ops.capture.records import AttentionCall, Record, SoftmaxCall
from ear_ops.capture.taps.hooks import ModelHook

_FUNCTIONS = ("softmax", "Softmax", "scaled_dot_product_attention")


def computes_attention(name: str, module: nn.Module) -> bool:
    """Whether the name of ``module``, at the path ``name``, says attention and its code calls one of the functions.

    Its code is its forward, with the methods and the functions of the same file that the forward mentions. The name
    decides too because a router of experts also calls softmax.
    """
    described = f"{name.rsplit('.', 2)[-1]}.{type(module).__name__}".lower()
    if "att" not in described and "attn" not in name.lower():
        return False
    pending, seen = [inspect.unwrap(type(module).forward)], set()
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        for mentioned in function.__code__.co_names:
            if mentioned in _FUNCTIONS:
                return True
            callee = getattr(type(module), mentioned, None) or function.__globals__.get(mentioned)
            if inspect.isfunction(callee) and callee.__module__ == function.__module__:
                pending.append(callee)
    return False


def other_softmax(key: str) -> str:
    """The key of the softmax calls inside the module ``key`` that are no attention of all positions of its input."""
    return f"{key}: other softmax"


class Watch:
    """Opens a mode when the forward of its module begins, and closes it when the forward ends.

    Args:
        listener: its ``record`` is None while nothing is recorded; then no mode is opened.
        key: of the calls in the record.
    """

    def __init__(self, listener: Any, key: str) -> None:
        self.listener, self.key = listener, key
        self.mode: _Mode | None = None

    def install(self, module: nn.Module) -> list[Any]:
        opening = module.register_forward_pre_hook(_Open(self), with_kwargs=True)
        # Modes are a stack: what was opened last is closed first.
        closing = module.register_forward_hook(_Close(self), always_call=True, prepend=True)
        return [self.close, closing.remove, opening.remove]

    def open(self, shape: tuple[int, ...] | None) -> None:
        self.close()  # an interrupted forward left it open: KeyboardInterrupt runs no hook
        if self.listener.record is not None:
            self.mode = _Mode(self.listener.record, self.key, shape)
            self.mode.__enter__()

    def close(self) -> None:
        mode, self.mode = self.mode, None
        if mode is not None and (torch.compiler.is_compiling() or mode in _get_current_function_mode_stack()):
            mode.__exit__(None, None, None)


class _Mode(TorchFunctionMode):
    def __init__(self, record: Record, key: str, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.record, self.key, self.shape = record, key, shape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.record.add(self.key, _attention_call(*args, **kwargs))
        elif func is F.softmax or func is torch.softmax or func is Tensor.softmax:
            dim = kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None
            call = SoftmaxCall(result, self.shape)
            is_matrix = dim in (-1, result.dim() - 1) and call.maps() is not None
            self.record.add(self.key if is_matrix else other_softmax(self.key), call)
        return result


class _Open(ModelHook):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self.watch.open(None if hidden is None else tuple(hidden.shape))


class _Close(ModelHook):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.watch.close()


def _attention_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """The arguments of ``F.scaled_dot_product_attention`` as the interface would have reported them."""
    if attn_mask is not None and attn_mask.dim() < 4:  # broadcast against [B, H, L, S], no mask of padded keys
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    return AttentionCall("sdpa", nn.Identity(), query, key, value, attn_mask, scaling=scale, is_causal=is_causal)
