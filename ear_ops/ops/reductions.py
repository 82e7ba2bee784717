"""How the per-head and per-pair sums become a loss: five reductions, named the same for every loss of the package.

Ding et al. (COLING 2022) print one normalisation, their released code computes another, and ``mse_loss`` is a third;
all are on offer, by name, so that a result always says which one it used.

==================  =====================================================  ===================
``reduction``       attention losses                                       pooled losses
==================  =====================================================  ===================
``"mean"``          / number of counted (head, query, key) triples         / (B * C)
``"padded_mean"``   / (B * H * L * S), padded query rows counted too       as ``"mean"``
``"equations"``     / (B * H)                                              / B
``"sum"``           the sum                                                the sum
``"none"``          ``[B, H]`` sums                                        ``[B]`` sums
==================  =====================================================  ===================

Divergences of rows (KL, JS) divide by what a row counts once: ``"mean"`` by the counted (head, query) rows and
``"padded_mean"`` by B * H * L. Errors of scores count the triples that both views allow. Where averages over the heads
are compared (``heads="mean"``), these count as one head: H is 1 in all that divides, and ``"none"`` gives ``[B]``.

A query counts when it is real in both views, a key when it is real in at least one. Causality, windows and biases do
not change the count. An empty count gives 0.
"""

from __future__ import annotations

from torch import Tensor

from ear_ops.arguments import check_choice

REDUCTIONS = ("mean", "padded_mean", "equations", "sum", "none")


def check_reduction(reduction: str) -> None:
    """Raises ``ValueError`` with the known names unless ``reduction`` is one of them."""
    check_choice("reduction", reduction, REDUCTIONS)


def reduce_attention(
    sums: Tensor, reduction: str, query_length: int, key_length: int, counted_pairs: Tensor | None
) -> Tensor:
    """Reduce the sums of one attention loss.

    Args:
        sums: ``[B, H]``, sums over the counted queries and keys of each head; or ``[B]``, those of the average over
            the heads, which counts as one head.
        reduction: one of :data:`REDUCTIONS`.
        query_length: L, padding included.
        key_length: S, padding included.
        counted_pairs: ``[B]`` number of counted (query, key) pairs per head, or ``[B, H]`` of each head, or None where
            all L * S count.
    """
    batch, heads = (*sums.shape, 1)[:2]
    if reduction == "none":
        return sums
    total = sums.sum()
    if reduction == "sum":
        return total
    if reduction == "equations":
        return total / max(batch * heads, 1)
    if reduction == "padded_mean" or counted_pairs is None:
        return total / max(batch * heads * query_length * key_length, 1)
    counted = counted_pairs.sum() * heads if counted_pairs.dim() == 1 else counted_pairs.sum()
    return total / counted.clamp(min=1)


def reduce_pooled(sums: Tensor, reduction: str, hidden_size: int) -> Tensor:
    """Reduce the ``[B]`` sums of squares over the C = ``hidden_size`` features of one pooled loss."""
    if reduction == "none":
        return sums
    total = sums.sum()
    if reduction == "sum":
        return total
    if reduction == "equations":
        return total / max(sums.numel(), 1)
    return total / max(sums.numel() * hidden_size, 1)
