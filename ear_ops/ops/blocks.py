"""Sums over blocks of queries: the memory that a reference needs then grows with L, not with L * S."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_ENTRIES = 2**24
"""How many entries ``[B, H, rows, S]`` a block holds at most, unless one query has more."""


def sum_over_blocks(sums_of: Callable[[slice], Tensor], queries: int, entries: int) -> Tensor:
    """The sum of ``sums_of(rows)`` over blocks of rows that together are all ``queries``.

    Args:
        sums_of: the sums ``[B, H]`` of a slice of the queries, differentiable. The backward calls it again, so that no
            block keeps its entries.
        queries: L.
        entries: how many each query has: B * H * S.
    """
    rows = max(BLOCK_ENTRIES // max(entries, 1), 1)
    # A compiled graph and the transforms of torch.func cannot take a checkpoint.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or rows >= queries:
        return sums_of(slice(0, queries))
    blocks = [slice(start, min(start + rows, queries)) for start in range(0, queries, rows)]
    return sum(
        (checkpoint(sums_of, block, use_reentrant=False, preserve_rng_state=False) for block in blocks[1:]),
        start=checkpoint(sums_of, blocks[0], use_reentrant=False, preserve_rng_state=False),
    )
