"""Taps at a module: hooks that take what enters it, what leaves it, and the masks that it receives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ear_ops.capture.records import Listener, TensorCall, may_be_padding
from ear_ops.capture.taps.hooks import ModelHook


class _ModuleTap(ModelHook):
    """``key``: under which the record keeps what the tap takes."""

    def __init__(self, listener: Listener, key: str) -> None:
        self.listener, self.key = listener, key


class InputTap(_ModuleTap):
    """Forward pre-hook of a block; transformers pass the hidden states first or by keyword."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        record = self.listener.record
        if record is not None:
            record.add(self.key, TensorCall(args[0] if args else kwargs.get("hidden_states")))


class OutputTap(_ModuleTap):
    """Forward hook; blocks of older design return a tuple with the hidden states first."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record = self.listener.record
        if record is not None:
            source = next((value for value in args if isinstance(value, Tensor)), None)
            record.add(self.key, TensorCall(output[0] if isinstance(output, tuple) else output, source))


class MaskTap(_ModuleTap):
    """Forward pre-hook of a block, or of what is around it: the masks that it received by name."""

    def __init__(self, listener: Listener, key: str, block: nn.Module) -> None:
        super().__init__(listener, key)
        self.names = list(inspect.signature(block.forward).parameters)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        record = self.listener.record
        if record is None or self.key in record.masks:
            return
        received = {**dict(zip(self.names, args, strict=False)), **kwargs}
        record.masks[self.key] = {
            name: TensorCall(value)
            for name, value in received.items()
            if name == "attention_mask" or may_be_padding(name, module)
        }


class LogitsTap(_ModuleTap):
    """Forward hook of a model; ``takes_tuples``: whether the logits may be in a tuple that it returns."""

    def __init__(self, listener: Listener, key: str, takes_tuples: bool) -> None:
        super().__init__(listener, key)
        self.takes_tuples = takes_tuples

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record = self.listener.record
        if record is None:
            return
        if isinstance(output, Mapping):
            output = output.get("logits")
        elif isinstance(output, tuple):  # with return_dict=False; the loss, where there is one, comes first
            tensors = output if self.takes_tuples else ()
            output = next((value for value in tensors if isinstance(value, Tensor) and value.dim() > 1), None)
        record.add(self.key, TensorCall(getattr(output, "logits", output)))
