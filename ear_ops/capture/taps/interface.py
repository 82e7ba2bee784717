"""The attention functions of transformers, made to report to the taps while any recorder is attached.

transformers looks an attention function up by name (``sdpa``, ``eager``, ``flash_attention_2``, ...) and calls it as
``function(module, query, key, value, attention_mask, ...)``. Every registered function is replaced *under the same
name* by one that hands the arguments to the module's taps and then calls it unchanged. Under a new name, the model
would build other masks. The lookup is wrapped too, for the eager function of each modeling file and for kernels that
are registered later.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ear_ops.capture.records import AttentionCall, Listener, TensorCall
from ear_ops.capture.taps.hooks import TAPS

_lock = threading.Lock()
_users = 0  # recorders attached now
_undo: list[Callable[[], None]] = []


def uses_interface(module: nn.Module) -> bool:
    """Whether ``module`` itself (not a child) looks its attention function up in the registry of transformers."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def acquire() -> None:
    """Wrap the attention functions, unless another recorder already did."""
    global _users
    with _lock:
        if _users == 0:
            _wrap_all()
        _users += 1


def release() -> None:
    """Undo :func:`acquire`; the last release puts every function back."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            while _undo:
                _undo.pop()()


def _wrap_all() -> None:
    from transformers.modeling_utils import AttentionInterface

    registered = AttentionInterface()  # a fresh instance shows what is registered for all models
    for name, function in list(registered.items()):
        reporting = functools.wraps(function)(_reporting(name, function))
        reporting._reports_to_taps = True  # type: ignore[attr-defined]
        AttentionInterface.register(name, reporting)
        _undo.append(functools.partial(_put_back, name, reporting, function))

    lookup = AttentionInterface.get_interface

    @functools.wraps(lookup)
    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = lookup(self, attn_implementation, default)
        if getattr(function, "_reports_to_taps", False):
            return function
        return _reporting("eager" if function is default else attn_implementation, function)

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]

    def restore_lookup() -> None:
        if AttentionInterface.get_interface is get_interface:  # else someone wrapped it again, which hides ours
            AttentionInterface.get_interface = lookup  # type: ignore[method-assign]

    _undo.append(restore_lookup)


def _put_back(name: str, reporting: Callable[..., Any], function: Callable[..., Any]) -> None:
    from transformers.modeling_utils import AttentionInterface

    if AttentionInterface().get(name) is reporting:  # else registered anew in the meantime: leave that
        AttentionInterface.register(name, function)


def _reporting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which reports its arguments to the taps of the module that calls it."""

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for tap in getattr(module, TAPS, ()):  # which compiled graphs of other layers look at, as not at __dict__
            tap.report(name, module, *args, **kwargs)
        return function(module, *args, **kwargs)

    return attention


class _InterfaceTap:
    """Found on its attention module by the attention function. ``key``: under which the record keeps what it takes."""

    def __init__(self, listener: Listener, key: str) -> None:
        self.listener, self.key = listener, key


class AttentionTap(_InterfaceTap):
    """Takes all that an attention function is called with."""

    def report(self, implementation: str, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        record = self.listener.record
        if record is not None:
            record.add(self.key, AttentionCall(implementation, module, *args, **kwargs))


class ValueTap(_InterfaceTap):
    """Takes the values alone."""

    def report(
        self,
        implementation: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        record = self.listener.record
        if record is not None:
            record.add(self.key, TensorCall(value))
