"""What is hung on a user's modules; a copy or a pickle of the model leaves it behind.

A deep copy must not copy the recorder and its tensors. A pickled model must load in a process without ear_ops. So
pickling turns both kinds of object below into something of the standard library that does nothing.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

TAPS = "_ear_taps"  # the attribute of an attention module that holds its Taps


class ModelHook:
    """Base class of the module hooks; called as ``hook(module, args, kwargs)`` or ``hook(module, args, output)``."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs_or_output: Any) -> None:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        # A callable that takes any three arguments and returns None: the copy's hook does nothing.
        return getattr, (contextlib.nullcontext(), "__exit__")


def run_last(handle: RemovableHandle) -> None:
    """Move a hook behind those that users registered later, so that it sees the tensors that these put in place."""
    hooks: dict[int, Any] = handle.hooks_dict_ref() or {}
    order = list(hooks)
    if any(not isinstance(hooks[other], ModelHook) for other in order[order.index(handle.id) + 1 :]):
        hooks[handle.id] = hooks.pop(handle.id)


class Taps(tuple[Any, ...]):
    """The taps of one attention module, found by the attention interface; empty in a copy of the module."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, ()


def add_tap(module: nn.Module, tap: Any) -> None:
    setattr(module, TAPS, Taps((*module.__dict__.get(TAPS, ()), tap)))


def remove_tap(module: nn.Module, tap: Any) -> None:
    left = Taps(other for other in module.__dict__.get(TAPS, ()) if other is not tap)
    if left:
        setattr(module, TAPS, left)
    else:
        module.__dict__.pop(TAPS, None)
