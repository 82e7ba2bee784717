"""The options that several losses have, and what they do to the sums of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ear_ops.arguments import check_choice, check_temperature, check_tensor
from ear_ops.functional.values import can_be_read
from ear_ops.ops.divergences import InfiniteDivergenceError
from ear_ops.ops.reductions import reduce_attention

HEADS = ("each", "mean")


def check_divergence_options(
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    support: str = "all",
    heads: str = "each",
    **others: Any,
) -> None:
    """Raises ValueError where an option of a divergence is wrong; ``others`` are not looked at."""
    check_temperature(temperature)
    check_choice("direction", direction, ("forward", "reverse"))
    check_choice("support", support, ("all", "shared"))
    check_choice("heads", heads, HEADS)


def kl_name(direction: str) -> str:
    check_divergence_options(direction=direction)
    return "kl" if direction == "forward" else "reverse_kl"


def check_head_weights(head_weights: Any) -> None:
    if head_weights is not None:
        check_tensor("head_weights", head_weights, "pass torch.tensor(head_weights)")


def weigh_heads(sums: Tensor, head_weights: Tensor | None) -> Tensor:
    """``sums`` ``[B, H]`` times ``head_weights`` ``[H]``."""
    if head_weights is None:
        return sums
    check_head_weights(head_weights)
    if list(head_weights.shape) != [sums.shape[1]]:
        raise ValueError(
            f"head_weights: expected one number for each of the {sums.shape[1]} heads, got shape "
            f"{list(head_weights.shape)}"
        )
    weights = head_weights.to(sums.dtype)
    return sums.masked_fill((weights == 0) & torch.isinf(sums), 0.0) * weights


def reduce_rows(
    sums: Tensor,
    name: str,
    counted_queries: Tensor | None,
    reduction: str,
    query_length: int,
    *,
    of_maps: bool = False,
) -> Tensor:
    """Reduce the sums ``[B, H]`` or ``[B]`` of a divergence, of which a row counts; raises where KL is infinite.

    ``of_maps``: probabilities were compared, which may have underflowed.
    """
    if can_be_read(sums) and torch.isinf(sums).any():
        target, other = ("first view", "second") if name == "reverse_kl" else ("second view", "first")
        reason = (
            f"expected the views to have the same keys, got a key that the {target} attends to and the {other} does "
            f"not, where KL is infinite"
        )
        if of_maps:
            reason += "; a probability of exactly 0 may also have underflowed, so compute the maps in float32"
        raise InfiniteDivergenceError(reason)
    counted_rows = None if counted_queries is None else counted_queries.sum(dim=1)
    return reduce_attention(sums, reduction, query_length, 1, counted_rows)
