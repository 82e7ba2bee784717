"""Embeddings of two views, pooled over their tokens."""

from __future__ import annotations

from torch import Tensor

from ear_ops.ops.pooled_distance import POOLED_DISTANCE, pooled_problem
from ear_ops.ops.reductions import check_reduction, reduce_pooled


def pooled_distance(
    hidden: Tensor,
    hidden_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Squared distance between the mean-pooled hidden states of two views: ``sum (M(E) - M(E^a))^2``, reduced.

    M is the mean over real tokens. Its negative is Embedding-Push (Ding et al. 2022, eq. 1), itself the sentence pull
    (section 4.3).

    Args:
        hidden: ``[B, L, C]``, or ``[2B, L, C]`` with both views.
        hidden_aug: ``[B, L, C]`` or None.
        attention_mask, attention_mask_aug: ``[B, L]`` (``[2B, L]``) bool or integer, 1 = real. A sequence without any
            real token pools to the zero vector.
        reduction, backend: as for :func:`qk_attention_mse`.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailableError: the backend asked for cannot run.
    """
    check_reduction(reduction)
    problem = pooled_problem(hidden, hidden_aug, attention_mask=attention_mask, attention_mask_aug=attention_mask_aug)
    return reduce_pooled(POOLED_DISTANCE.sums(problem, backend), reduction, hidden.shape[2])
