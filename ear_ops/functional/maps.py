"""Attention maps of two views that exist as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ear_ops.arguments import check_choice
from ear_ops.functional.options import (
    HEADS,
    check_divergence_options,
    check_head_weights,
    kl_name,
    reduce_rows,
    weigh_heads,
)
from ear_ops.functional.values import can_be_read
from ear_ops.ops.attention_divergences import ATTENTION_DIVERGENCES
from ear_ops.ops.attention_mse import ATTENTION_MSE
from ear_ops.ops.maps import MapsProblem, maps_problem
from ear_ops.ops.mean_heads import normalized_weights
from ear_ops.ops.reductions import check_reduction, reduce_attention


def attention_mse(
    attn: Tensor,
    attn_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    heads: str = "each",
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Mean squared error between two sets of attention probabilities that already exist.

    For models whose attention cannot be recomputed from Q and K (DeBERTa, ...), and for distilling from stored maps.

    Args:
        attn: ``[B, H, L, S]`` probabilities, or ``[2B, H, L, S]`` with both views.
        attn_aug: ``[B, H, L, S]`` or None.
        attention_mask, attention_mask_aug, query_mask, query_mask_aug, heads, head_weights, reduction, backend: as for
            :func:`qk_attention_mse`; probabilities at padded keys count as zero.

    Returns:
        A scalar, or ``[B, H]`` for ``"none"`` (``[B]`` with ``heads="mean"``); float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailableError: the backend asked for cannot run.
    """
    check_reduction(reduction)
    check_choice("heads", heads, HEADS)
    problem, counted_pairs = maps_problem(
        attn,
        attn_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=query_mask,
        query_mask_aug=query_mask_aug,
        count_padded_queries=reduction == "padded_mean",
        heads=heads,
    )
    if heads == "mean":
        sums = ATTENTION_MSE.sums(problem.averaged(_weights_of_maps(problem, head_weights)), backend)[:, 0]
    else:
        sums = weigh_heads(ATTENTION_MSE.sums(problem, backend), head_weights)
    return reduce_attention(sums, reduction, attn.shape[2], attn.shape[3], counted_pairs)


def attention_kl(
    attn: Tensor,
    attn_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    direction: str = "forward",
    support: str = "all",
    heads: str = "each",
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Kullback-Leibler divergence between two sets of attention probabilities that already exist.

    The sum of ``T log(T / P) - T + P``, which is KL(T || P) where rows sum to 1, and never negative where they do not.
    A probability of exactly 0 has the gradient 0. Where P is 0 and T is not, KL is infinite:
    :func:`qk_attention_kl` takes logarithms from scores, so it stays finite where P underflows.

    Args:
        attn: ``[B, H, L, S]`` probabilities, or ``[2B, H, L, S]`` with both views.
        attn_aug: ``[B, H, L, S]``, the target, or None.
        attention_mask, attention_mask_aug, query_mask, query_mask_aug, heads, head_weights, backend: as for
            :func:`attention_mse`.
        direction, reduction: as for :func:`qk_attention_kl`.
        support: ``"all"``, or ``"shared"``: rows are renormalised over the keys at which both views are positive.

    Returns:
        A scalar, or ``[B, H]`` for ``"none"`` (``[B]`` with ``heads="mean"``); float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: as for :func:`qk_attention_kl`. On the CPU also where a map holds numbers below 0, whose
            divergence is NaN.
    """
    return _maps_divergence(
        kl_name(direction),
        attn,
        attn_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=query_mask,
        query_mask_aug=query_mask_aug,
        support=support,
        heads=heads,
        head_weights=head_weights,
        reduction=reduction,
        backend=backend,
    )


def attention_js(
    attn: Tensor,
    attn_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    support: str = "all",
    heads: str = "each",
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Jensen-Shannon divergence between two sets of attention probabilities that already exist.

    The equation is that of :func:`qk_attention_js`. Arguments, results and errors are as for :func:`attention_kl`,
    without ``direction``.
    """
    return _maps_divergence(
        "js",
        attn,
        attn_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=query_mask,
        query_mask_aug=query_mask_aug,
        support=support,
        heads=heads,
        head_weights=head_weights,
        reduction=reduction,
        backend=backend,
    )


def _maps_divergence(
    name: str,
    *views: Any,
    support: str,
    heads: str,
    head_weights: Tensor | None,
    reduction: str,
    backend: str | None,
    **masks: Any,
) -> Tensor:
    """The divergence called ``name`` of maps; ``masks`` as for :func:`attention_mse`."""
    check_reduction(reduction)
    check_divergence_options(support=support, heads=heads)
    problem, _ = maps_problem(*views, count_padded_queries=reduction == "padded_mean", heads=heads, **masks)
    operator = ATTENTION_DIVERGENCES[name]
    if heads == "mean":
        problem = problem.averaged(_weights_of_maps(problem, head_weights), support)
        sums = operator.sums(problem, backend)[:, 0]
    else:
        problem = problem.on_shared_keys() if support == "shared" else problem
        sums = weigh_heads(operator.sums(problem, backend), head_weights)
    _check_probabilities(sums, views)
    length = problem.attn.shape[2]
    return reduce_rows(sums, name, problem.counted_queries, reduction, length, of_maps=True)


def _check_probabilities(sums: Tensor, views: Sequence[Tensor | None]) -> None:
    """Raises ValueError where ``sums`` are NaN because a map holds numbers below 0, such as scores."""
    if not can_be_read(sums) or not torch.isnan(sums).any():
        return
    for name, view in zip(("attn", "attn_aug"), views, strict=True):
        below = None if view is None else view[(view < 0) & torch.isfinite(view)]
        if below is not None and below.numel():
            raise ValueError(f"{name}: expected probabilities, got {below.min().item():.4g}; apply the softmax first")


def _weights_of_maps(problem: MapsProblem, head_weights: Tensor | None) -> Tensor | None:
    """The weights ``[H]`` of the averages over the heads of maps."""
    check_head_weights(head_weights)
    second = problem.attn if problem.attn_aug is None else problem.attn_aug
    heads, heads_aug = problem.attn.shape[1], second.shape[1]
    return normalized_weights(head_weights, heads, heads_aug, problem.attn, can_be_read(head_weights))
