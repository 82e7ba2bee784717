"""The operators that compare attention straight from Q and K by a divergence, or by the scores before the softmax."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from ear_ops.ops.divergences import DIVERGENCES, divergence_of_scores
from ear_ops.ops.operator import Operator
from ear_ops.ops.problem import AttentionProblem, fake_outputs


def divergence_reference(name: str, problem: AttentionProblem) -> Tensor:
    """``[B, H]`` sums over counted queries and all keys of the divergence called ``name``."""

    def sums_of(rows: slice) -> Tensor:
        (scores, allowed), (scores_aug, allowed_aug) = problem.scores(rows)
        return divergence_of_scores(name, scores, scores_aug, allowed, allowed_aug)

    return problem.sum_over_queries(sums_of)


def scores_reference(problem: AttentionProblem) -> Tensor:
    """``[B, H]`` sums of the squared differences of the scores, over pairs of counted queries that both views allow."""

    def sums_of(rows: slice) -> Tensor:
        (scores, allowed), (scores_aug, allowed_aug) = problem.scores(rows)
        difference = scores - scores_aug
        if allowed is not None and allowed_aug is not None:
            difference = difference.masked_fill(~(allowed & allowed_aug), 0.0)
        return difference.square().sum((-2, -1))

    return problem.sum_over_queries(sums_of)


def _operator(name: str, reference: Callable[[AttentionProblem], Tensor], row_stats: int) -> Operator:
    return Operator(
        name,
        AttentionProblem,
        reference=reference,
        fake=lambda problem: fake_outputs(problem, row_stats),
        saved=("row_stats",),
        differentiable=4,
    )


# Of a query, kernels keep maxima, inverse sums of exponentials and two numbers of the divergence; csrc/comparison.h.
QK_DIVERGENCES = {
    name: _operator(f"qk_attention_{name}", functools.partial(divergence_reference, name), row_stats=6)
    for name in DIVERGENCES
}
QK_SCORES_MSE = _operator("qk_scores_mse", scores_reference, row_stats=0)
