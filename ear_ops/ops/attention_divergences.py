"""The operators that compare attention probabilities that already exist by a divergence."""

from __future__ import annotations

import functools

from torch import Tensor

from ear_ops.ops.blocks import sum_over_blocks
from ear_ops.ops.divergences import DIVERGENCES, divergence_of_maps
from ear_ops.ops.maps import MapsProblem
from ear_ops.ops.operator import ReferenceOperator


def reference(name: str, problem: MapsProblem) -> Tensor:
    """``[B, H]`` sums over counted queries and all keys of the divergence called ``name``."""

    def sums_of(rows: slice) -> Tensor:
        return divergence_of_maps(name, *problem.probabilities(rows))

    _, heads, queries, keys = problem.attn.shape
    return sum_over_blocks(sums_of, queries, problem.pairs * heads * keys)


ATTENTION_DIVERGENCES = {
    name: ReferenceOperator(f"attention_{name}", functools.partial(reference, name)) for name in DIVERGENCES
}
