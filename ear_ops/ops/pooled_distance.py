"""The operator ``pooled_distance``: squared distance between the mean-pooled hidden states of two views."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ear_ops.ops.masks import check_two_views, join_views, split_views
from ear_ops.ops.operator import Operator
from ear_ops.ops.probabilities import compute_dtype


class PooledProblem(NamedTuple):
    """Hidden states of two views, in one tensor (x first, ``hidden_aug`` None) or in two, and their masks."""

    hidden: Tensor  # [B, L, C], or [2B, L, C] with both views
    hidden_aug: Tensor | None  # [B, L, C]
    mask: Tensor | None  # [2B, L] bool, the tokens that are real in each view


def pooled_problem(
    hidden: Tensor, hidden_aug: Tensor | None, *, attention_mask: Tensor | None, attention_mask_aug: Tensor | None
) -> PooledProblem:
    """The problem that a user's arguments describe; arguments as for :func:`ear_ops.pooled_distance`."""
    stacked = check_two_views("hidden", hidden, hidden_aug, ndim=3, layout="[B, L, C]")
    pairs = hidden.shape[0] // 2 if stacked else hidden.shape[0]
    masks = attention_mask, attention_mask_aug
    mask = join_views("attention_mask", *masks, pairs, hidden.shape[1], stacked, hidden.device)
    return PooledProblem(hidden, hidden_aug, mask)


def reference(problem: PooledProblem) -> Tensor:
    """``[B]`` sums over C of ``(M(E) - M(E^a))^2``, M the masked mean (Ding et al. 2022, eq. 1 without its sign)."""
    hidden, hidden_aug = split_views(problem.hidden, problem.hidden_aug)
    mask, mask_aug = (None, None) if problem.mask is None else split_views(problem.mask, None)
    return (masked_mean(hidden, mask) - masked_mean(hidden_aug, mask_aug)).square().sum(dim=-1)


def masked_mean(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[B, C]`` mean over the real tokens of ``hidden`` ``[B, L, C]``; a sequence without any is the zero vector."""
    hidden = hidden.to(compute_dtype(hidden.dtype))
    if mask is None:
        return hidden.sum(dim=1) / max(hidden.shape[1], 1)
    total = hidden.masked_fill(~mask[:, :, None], 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _fake(problem: PooledProblem) -> tuple[Tensor, Tensor]:
    rows, _, features = problem.hidden.shape
    pairs, dtype = rows // 2 if problem.hidden_aug is None else rows, compute_dtype(problem.hidden.dtype)
    return problem.hidden.new_empty((pairs,), dtype=dtype), problem.hidden.new_empty((pairs, features), dtype=dtype)


POOLED_DISTANCE = Operator(
    "pooled_distance", PooledProblem, reference=reference, fake=_fake, saved=("difference",), differentiable=2
)
