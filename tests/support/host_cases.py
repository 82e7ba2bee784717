"""Cases for the CUDA kernels on the host."""

from __future__ import annotations

import torch

from .cases import Case, lengths_mask
from .rules import check_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAUSAL = {"is_causal": True, "window": 30}


def check(case: Case, dtype: torch.dtype) -> None:
    # One rounded score spreads over a whole row of gradients, so the errors of so few rows do not average out.
    check_case(case, dtype, "cpu", slack=2.0)


def all_queries(queries: int) -> dict[str, torch.Tensor]:
    """Query masks of two pairs, needed where there are key masks and another number of keys."""
    return {name: torch.ones(2, queries, dtype=torch.bool) for name in ("query_mask", "query_mask_aug")}


def ragged(lengths: list[int], queries: int, keys: int) -> dict[str, torch.Tensor]:
    """The same padding in both views, and a query that does not count."""
    masks = {
        **all_queries(queries),
        **dict.fromkeys(("attention_mask", "attention_mask_aug"), lengths_mask(lengths, keys)),
    }
    masks["query_mask"][1, 2] = False
    return masks
