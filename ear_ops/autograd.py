"""``torch.autograd.Function`` wrappers that pair each forward operator with its backward operator.

Only the gradients asked for are worked out. Gradients of gradients are not on offer: the reference has them, so the
error says to use it. The parameters of ``forward`` are spelled out: torch.compile miscounts ``*inputs`` where no
gradient is wanted. ``forward`` saves for the backward itself, because with a ``setup_context`` every call binds its
arguments by the signature, which takes longer than a small loss.
"""

from __future__ import annotations

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
            f"use backend='reference', or EAR_OPS_BACKEND=reference for regularisers on a model"
        )


class QKAttentionMSE(Function):
    """``[B, H]`` sums of ``(P - T)^2``; inputs as ``torch.ops.ear_ops.qk_attention_mse``."""

    @staticmethod
    def forward(
        ctx: Any,
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
        tensors = (query, key, query_aug, key_aug, key_mask, counted_queries, attn_bias, attn_bias_aug)
        ctx.options = (scale, is_causal, window)
        sums, row_stats = torch.ops.ear_ops.qk_attention_mse(*tensors, *ctx.options)
        ctx.save_for_backward(*tensors, row_stats)
        ctx.mark_non_differentiable(row_stats)
        return sums, row_stats

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
        ctx: Any, attn: Tensor, attn_aug: Tensor | None, key_mask: Tensor | None, counted_queries: Tensor | None
    ) -> Tensor:
        inputs = (attn, attn_aug, key_mask, counted_queries)
        ctx.save_for_backward(*inputs)
        return torch.ops.ear_ops.attention_mse(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        _no_double_backward("attention_mse")
        needs = list(ctx.needs_input_grad[:2])
        gradients = torch.ops.ear_ops.attention_mse_backward(grad_sums, *ctx.saved_tensors, needs)
        return _scatter(gradients, needs, len(ctx.saved_tensors))


class PooledDistance(Function):
    """``[B]`` sums over C of ``(M(E) - M(E^a))^2``; inputs as ``torch.ops.ear_ops.pooled_distance``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, hidden_aug: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = (hidden, hidden_aug, mask)
        sums, difference = torch.ops.ear_ops.pooled_distance(*inputs)
        ctx.save_for_backward(*inputs, difference)
        ctx.mark_non_differentiable(difference)
        return sums, difference

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _no_double_backward("pooled_distance")
        *inputs, difference = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        gradients = torch.ops.ear_ops.pooled_distance_backward(grad_sums, difference, *inputs, needs)
        return _scatter(gradients, needs, len(inputs))
