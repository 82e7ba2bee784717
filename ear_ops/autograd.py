"""``torch.autograd.Function`` wrappers that pair each forward operator with its backward operator.

Only the gradients asked for are worked out. Gradients of gradients are not on offer: the reference has them, so the
error says to use it. The parameters of ``forward`` are spelled out: torch.compile miscounts ``*inputs`` where no
gradient is wanted.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def _scatter(gradients: Sequence[Tensor], needs: Sequence[bool], inputs: int) -> tuple[Tensor | None, ...]:
    """One entry per input of the Function: the gradients that were asked for at their places, None elsewhere."""
    remaining = iter(gradients)
    placed = [next(remaining) if needed else None for needed in needs]
    return (*placed, *[None] * (inputs - len(placed)))


def _no_double_backward(op: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # grad mode is on in backward only for this
        raise RuntimeError(
            f"{op}: its kernels have no second derivative (backward was called with create_graph=True); "
            f"use backend='reference'"
        )


class QKAttentionMSE(Function):
    """``[B, H]`` sums of ``(P - T)^2``; inputs as ``torch.ops.ear_ops.qk_attention_mse``."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        query_aug: Tensor | None,
        key_aug: Tensor | None,
        key_mask: Tensor | None,
        counted_queries: Tensor | None,
        attn_bias: Tensor | None,
        attn_bias_aug: Tensor | None,
        scale: float,
        is_causal: bool,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.ear_ops.qk_attention_mse(
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
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, scale, is_causal, window = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.options = (scale, is_causal, window)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _no_double_backward("qk_attention_mse")
        *tensors, row_stats = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        gradients = torch.ops.ear_ops.qk_attention_mse_backward(grad_sums, *tensors, *ctx.options, row_stats, needs)
        return _scatter(gradients, needs, len(tensors) + len(ctx.options))


class AttentionMSE(Function):
    """``[B, H]`` sums of ``(P - T)^2`` of given probabilities; inputs as ``torch.ops.ear_ops.attention_mse``."""

    @staticmethod
    def forward(
        attn: Tensor, attn_aug: Tensor | None, key_mask: Tensor | None, counted_queries: Tensor | None
    ) -> Tensor:
        return torch.ops.ear_ops.attention_mse(attn, attn_aug, key_mask, counted_queries)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        _no_double_backward("attention_mse")
        needs = list(ctx.needs_input_grad[:2])
        gradients = torch.ops.ear_ops.attention_mse_backward(grad_sums, *ctx.saved_tensors, needs)
        return _scatter(gradients, needs, len(ctx.saved_tensors))


class PooledDistance(Function):
    """``[B]`` sums over C of ``(M(E) - M(E^a))^2``; inputs as ``torch.ops.ear_ops.pooled_distance``."""

    @staticmethod
    def forward(hidden: Tensor, hidden_aug: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.ear_ops.pooled_distance(hidden, hidden_aug, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _no_double_backward("pooled_distance")
        *inputs, difference = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        gradients = torch.ops.ear_ops.pooled_distance_backward(grad_sums, difference, *inputs, needs)
        return _scatter(gradients, needs, len(inputs))


for _function in (QKAttentionMSE, AttentionMSE, PooledDistance):
    # `apply` binds its arguments by the signature; kept here, it is not worked out anew at every call.
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]
