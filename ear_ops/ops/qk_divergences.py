"""The operators that compare attention straight from Q and K by a divergence, or by the scores before the softmax.

Their references work on blocks of queries, so their memory grows with L.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from ear_ops.ops.blocks import sum_over_blocks
from ear_ops.ops.divergences import DIVERGENCES, divergence_of_scores
from ear_ops.ops.operator import ReferenceOperator
from ear_ops.ops.problem import AttentionProblem


def divergence_reference(name: str, problem: AttentionProblem) -> Tensor:
    """``[B, H]`` sums over counted queries and all keys of the divergence called ``name``."""

    def sums_of(rows: slice) -> Tensor:
        (scores, allowed), (scores_aug, allowed_aug) = problem.scores(rows)
        return divergence_of_scores(name, scores, scores_aug, allowed, allowed_aug)

    return _over_blocks(problem, sums_of)


def scores_reference(problem: AttentionProblem) -> Tensor:
    """``[B, H]`` sums of the squared differences of the scores, over pairs of counted queries that both views allow."""

    def sums_of(rows: slice) -> Tensor:
        (scores, allowed), (scores_aug, allowed_aug) = problem.scores(rows)
        difference = scores - scores_aug
        if allowed is not None and allowed_aug is not None:
            difference = difference.masked_fill(~(allowed & allowed_aug), 0.0)
        return difference.square().sum((-2, -1))

    return _over_blocks(problem, sums_of)


def _over_blocks(problem: AttentionProblem, sums_of: Callable[[slice], Tensor]) -> Tensor:
    entries = problem.pairs * problem.query.shape[1] * problem.key.shape[2]
    return sum_over_blocks(sums_of, problem.query.shape[2], entries)


QK_DIVERGENCES = {
    name: ReferenceOperator(f"qk_attention_{name}", functools.partial(divergence_reference, name))
    for name in DIVERGENCES
}
QK_SCORES_MSE = ReferenceOperator("qk_scores_mse", scores_reference)
