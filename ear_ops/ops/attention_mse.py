"""The operator ``attention_mse``: squared differences of two sets of attention probabilities that already exist."""

from __future__ import annotations

from torch import Tensor

from ear_ops.ops.maps import MapsProblem, squared_difference_sums
from ear_ops.ops.operator import Operator
from ear_ops.ops.probabilities import compute_dtype


def reference(problem: MapsProblem) -> Tensor:
    """``[B, H]`` sums of ``(P - T)^2`` over counted queries and all keys; padded keys have probability zero."""
    return squared_difference_sums(*problem.probabilities())


def _fake(problem: MapsProblem) -> tuple[Tensor]:
    heads = problem.attn.shape[1]
    return (problem.attn.new_empty((problem.pairs, heads), dtype=compute_dtype(problem.attn.dtype)),)


ATTENTION_MSE = Operator("attention_mse", MapsProblem, reference=reference, fake=_fake, differentiable=2)
