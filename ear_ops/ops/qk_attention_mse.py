"""The operator ``qk_attention_mse``: squared differences of two attention matrices, straight from Q and K."""

from __future__ import annotations

from torch import Tensor

from ear_ops.ops.maps import squared_difference_sums
from ear_ops.ops.operator import Operator
from ear_ops.ops.problem import AttentionProblem, fake_outputs

ROW_STATS = 6  # of a query: maximum, 1 / sum of exponentials, and sum P (P - T) or sum T (T - P), each of both views


def reference(problem: AttentionProblem) -> Tensor:
    """``[B, H]`` sums of ``(P - T)^2``, P and T the attention probabilities of the two views (Ding et al. 2022, eq. 2).

    The sum runs over counted queries and all keys; a key that is padding in a view has probability zero there.
    """
    return problem.sum_over_queries(lambda rows: squared_difference_sums(*problem.probabilities(rows)))


QK_ATTENTION_MSE = Operator(
    "qk_attention_mse",
    AttentionProblem,
    reference=reference,
    fake=lambda problem: fake_outputs(problem, ROW_STATS),
    saved=("row_stats",),
    differentiable=4,
)
