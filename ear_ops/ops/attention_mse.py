"""The operator ``attention_mse``: squared differences of two sets of attention probabilities that already exist."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ear_ops.ops.masks import check_two_views, resolve_attention_masks, split_views
from ear_ops.ops.operator import Operator
from ear_ops.ops.probabilities import compute_dtype


class MapsProblem(NamedTuple):
    """Attention probabilities of two views, in one tensor (x first, ``attn_aug`` None) or in two, and their masks."""

    attn: Tensor  # [B, H, L, S], or [2B, H, L, S] with both views
    attn_aug: Tensor | None  # [B, H, L, S]
    key_mask: Tensor | None  # [2B, S] bool, the keys that are real in each view
    counted_queries: Tensor | None  # [B, L] bool, the rows that enter the sum


def maps_problem(
    attn: Tensor,
    attn_aug: Tensor | None,
    *,
    attention_mask: Tensor | None,
    attention_mask_aug: Tensor | None,
    query_mask: Tensor | None,
    query_mask_aug: Tensor | None,
    count_padded_queries: bool,
) -> tuple[MapsProblem, Tensor | None]:
    """The problem that a user's arguments describe, and the ``[B]`` number of counted (query, key) pairs of each head.

    The number is None where all pairs count. Arguments as for :func:`ear_ops.attention_mse`.
    """
    stacked = check_two_views("attn", attn, attn_aug, ndim=4, layout="[B, H, L, S]")
    masks = resolve_attention_masks(
        attention_mask,
        attention_mask_aug,
        query_mask,
        query_mask_aug,
        batch=attn.shape[0] // 2 if stacked else attn.shape[0],
        query_length=attn.shape[2],
        key_length=attn.shape[3],
        stacked=stacked,
        count_padded_queries=count_padded_queries,
    )
    return MapsProblem(attn, attn_aug, masks.key_mask, masks.counted_queries), masks.counted_pairs


def reference(problem: MapsProblem) -> Tensor:
    """``[B, H]`` sums of ``(P - T)^2`` over counted queries and all keys; padded keys have probability zero."""
    dtype = compute_dtype(problem.attn.dtype)
    attn, attn_aug = (view.to(dtype) for view in split_views(problem.attn, problem.attn_aug))
    if problem.key_mask is not None:
        key_mask, key_mask_aug = split_views(problem.key_mask, None)
        attn = attn.masked_fill(~key_mask[:, None, None, :], 0.0)
        attn_aug = attn_aug.masked_fill(~key_mask_aug[:, None, None, :], 0.0)
    return squared_difference_sums(attn, attn_aug, problem.counted_queries)


def squared_difference_sums(attn: Tensor, attn_aug: Tensor, counted_queries: Tensor | None = None) -> Tensor:
    """``[B, H]`` sums over counted queries and all keys of ``(P - T)^2``; ``attn``, ``attn_aug``: ``[B, H, L, S]``.

    ``counted_queries``: ``[B, L]`` bool.
    """
    difference = attn - attn_aug
    if counted_queries is not None:  # before squaring, so that NaN in a row that does not count has no gradient
        difference = difference.masked_fill(~counted_queries[:, None, :, None], 0.0)
    return difference.square().sum(dim=(-2, -1))


def _fake(problem: MapsProblem) -> tuple[Tensor]:
    rows, heads = problem.attn.shape[:2]
    pairs = rows // 2 if problem.attn_aug is None else rows
    return (problem.attn.new_empty((pairs, heads), dtype=compute_dtype(problem.attn.dtype)),)


ATTENTION_MSE = Operator("attention_mse", MapsProblem, reference=reference, fake=_fake, differentiable=2)
