"""The places where something is taken: tap them, and read back what a record holds for them.

A site belongs to one attachment. ``install`` changes the model and returns how to undo it; ``read`` turns what one
forward recorded into what a loss takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .hooks import ModelHook, add_tap, remove_tap
from .masks import Structure, attention_structure, dense_bias, padding_mask
from .records import AttentionCall, Record, TensorCall
from .views import AttentionInputs, HiddenStates

Undo = Callable[[], None]


class Listener(Protocol):
    """What a tap reports to: the recorder, whose ``record`` is None while nothing is recorded."""

    record: Record | None


class Site(Protocol):
    """A place in a model."""

    model: str  # path of the model whose attention_mask says which tokens are real

    def install(self, listener: Listener) -> list[Undo]:
        """Tap the place; returns what undoes it."""

    def read(self, record: Record, what: str) -> tuple[Any, ...]:
        """What ``record`` holds of this place, its first field a tensor ``[B, ...]``; ``what`` names it in errors."""


class AttentionSite:
    """The attention module at ``path``, which calls through the attention interface of transformers."""

    def __init__(self, path: str, module: nn.Module, model: str) -> None:
        self.path, self.module, self.model = path, module, model
        self._checked: dict[tuple[int, int], Structure] = {}

    def install(self, listener: Listener) -> list[Undo]:
        tap = _AttentionTap(listener, self.path)
        add_tap(self.module, tap)
        return [lambda: remove_tap(self.module, tap)]

    def read(self, record: Record, what: str) -> AttentionInputs:
        call: AttentionCall = record.only_call(self.path, "query", what)
        if call.unsupported is not None:
            raise ValueError(
                f"{what}: the attention was called with {call.unsupported}, which the attention losses do not support"
            )
        query, key = _one_dtype(call.query, call.key)
        rows, lengths = query.shape[0], (query.shape[2], key.shape[2])
        received = record.masks.get(self.model)
        key_mask = padding_mask(received, call.attention_mask, rows, lengths[1], what)
        query_mask = _query_mask(key_mask, *lengths)
        structure = self._checked.get(lengths)
        if structure is None:
            structure = attention_structure(call, key_mask, query_mask, what)
            if isinstance(received, Tensor) and received.dim() == 2:
                # From a 2-D mask transformers builds the same structure for every batch of this length.
                self._checked[lengths] = structure
        bias = dense_bias(call, structure)
        scale, softcap = call.scaling, call.softcap
        return AttentionInputs(
            query, key, key_mask, query_mask, bias, scale, structure.is_causal, structure.window, softcap
        )


class ProjectionSite:
    """Two projection modules whose outputs, split into heads, are the queries and keys of a plain softmax attention."""

    def __init__(
        self,
        query: str,
        key: str,
        query_module: nn.Module,
        key_module: nn.Module,
        num_heads: int,
        num_key_value_heads: int,
        model: str,
    ) -> None:
        self.query, self.key = query, key
        self.query_module, self.key_module = query_module, key_module
        self.num_heads, self.num_key_value_heads = num_heads, num_key_value_heads
        self.model = model

    def install(self, listener: Listener) -> list[Undo]:
        return [
            module.register_forward_hook(_OutputTap(listener, f"projection:{path}")).remove
            for path, module in ((self.query, self.query_module), (self.key, self.key_module))
        ]

    def read(self, record: Record, what: str) -> AttentionInputs:
        query = self._heads(record, self.query, self.num_heads, what)
        key = self._heads(record, self.key, self.num_key_value_heads, what)
        query, key = _one_dtype(query, key)
        rows, lengths = query.shape[0], (query.shape[2], key.shape[2])
        key_mask = padding_mask(record.masks.get(self.model), None, rows, lengths[1], what)
        query_mask = _query_mask(key_mask, *lengths)
        return AttentionInputs(query, key, key_mask, query_mask, attn_bias=None)

    def _heads(self, record: Record, path: str, heads: int, what: str) -> Tensor:
        """The output ``[B, L, heads * D]`` of a projection as ``[B, heads, L, D]``, without a copy."""
        output = record.only_call(f"projection:{path}", "tensor", what).tensor
        output = _expect_tensor(output, "[B, L, heads * D]", f"{what}: the output of {path}")
        if output.shape[2] % heads:
            raise ValueError(f"{what}: the {output.shape[2]} features of {path} do not divide into {heads} heads")
        return output.unflatten(2, (heads, -1)).transpose(1, 2)


class HiddenSite:
    """The hidden states that enter (``"input"``) or leave (``"output"``) the block at ``path``."""

    def __init__(self, path: str, block: nn.Module, side: str, model: str) -> None:
        self.path, self.block, self.side, self.model = path, block, side, model

    @property
    def _tap_key(self) -> str:
        return f"{self.side}:{self.path}"

    def install(self, listener: Listener) -> list[Undo]:
        if self.side == "input":
            tap = _InputTap(listener, self._tap_key)
            return [self.block.register_forward_pre_hook(tap, with_kwargs=True).remove]
        return [self.block.register_forward_hook(_OutputTap(listener, self._tap_key)).remove]

    def read(self, record: Record, what: str) -> HiddenStates:
        tensor = record.only_call(self._tap_key, "tensor", what).tensor
        states = _expect_tensor(tensor, "[B, L, C]", f"{what}: the {self.side} of {self.path}")
        rows, length = states.shape[:2]
        return HiddenStates(states, padding_mask(record.masks.get(self.model), None, rows, length, what))


class _AttentionTap:
    """Found on its attention module by :mod:`.interface`."""

    def __init__(self, listener: Listener, key: str) -> None:
        self.listener, self.key = listener, key

    def report(self, implementation: str, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        record = self.listener.record
        if record is not None:
            record.add(self.key, AttentionCall(implementation, module, *args, **kwargs))


class _InputTap(ModelHook):
    """Forward pre-hook of a block; transformers pass the hidden states first or by keyword."""

    def __init__(self, listener: Listener, key: str) -> None:
        self.listener, self.key = listener, key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
        record = self.listener.record
        if record is not None:
            record.add(self.key, TensorCall(args[0] if args else given.get("hidden_states")))


class _OutputTap(ModelHook):
    """Forward hook; blocks of older design return a tuple with the hidden states first."""

    def __init__(self, listener: Listener, key: str) -> None:
        self.listener, self.key = listener, key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
        record = self.listener.record
        if record is not None:
            record.add(self.key, TensorCall(given[0] if isinstance(given, tuple) else given))


def _query_mask(key_mask: Tensor | None, query_length: int, key_length: int) -> Tensor | None:
    """In self-attention the queries are the last of the keys (the others were cached); ``key_mask``: ``[B, S]``."""
    return None if key_mask is None else key_mask[:, key_length - query_length :]


def _one_dtype(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast queries and keys may differ in dtype (a norm on one of them): the wider of the two for both."""
    dtype = torch.promote_types(query.dtype, key.dtype)
    return query.to(dtype), key.to(dtype)


def _expect_tensor(value: Any, layout: str, what: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != layout.count(",") + 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what}: expected a tensor {layout}, got {got}")
    return value
