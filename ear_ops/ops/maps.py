"""Given attention probabilities of two views: the problem that they make, their averages, their shared keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ear_ops.ops.masks import check_two_views, resolve_attention_masks, split_views
from ear_ops.ops.probabilities import compute_dtype


class MapsProblem(NamedTuple):
    """Attention probabilities of two views, in one tensor (x first, ``attn_aug`` None) or in two, and their masks."""

    attn: Tensor  # [B, H, L, S], or [2B, H, L, S] with both views
    attn_aug: Tensor | None  # [B, H, L, S]
    key_mask: Tensor | None  # [2B, S] bool, the keys that are real in each view
    counted_queries: Tensor | None  # [B, L] bool, the rows that enter the sum

    @property
    def pairs(self) -> int:
        """B, the number of pairs (x, x^a)."""
        return self.attn.shape[0] // 2 if self.attn_aug is None else self.attn.shape[0]

    def probabilities(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """P and T ``[B, H, rows, S]`` in the compute dtype, zero at padded keys and in rows that do not count."""
        dtype = compute_dtype(self.attn.dtype)
        key_masks = (None, None) if self.key_mask is None else split_views(self.key_mask, None)
        attn, attn_aug = (
            self._masked(view[:, :, rows].to(dtype), key_mask, rows)
            for view, key_mask in zip(split_views(self.attn, self.attn_aug), key_masks, strict=True)
        )
        return attn, attn_aug

    def averaged(self, weights: Tensor | None, support: str = "all") -> MapsProblem:
        """The averages ``[B, 1, L, S]`` over the heads of both views.

        Args:
            weights: ``[H]``, which add up to 1; None: all heads alike.
            support: ``"shared"``: each head is first renormalised over the keys at which both averages are positive.
        """
        views = self.probabilities()
        first, second = (mean_over_heads(view, weights) for view in views)
        if support == "shared":
            unshared = (first == 0) | (second == 0)
            masked = [view.masked_fill(unshared, 0.0) for view in views]
            sums = [view.sum(-1, keepdim=True) for view in masked]
            first, second = (
                mean_over_heads(view / total.masked_fill(total == 0, 1.0), weights)
                for view, total in zip(masked, sums, strict=True)
            )
        return self._replace(attn=first, attn_aug=second)

    def on_shared_keys(self) -> MapsProblem:
        """The same with each row renormalised over the keys at which both views are positive."""
        first, second = on_shared_keys(*self.probabilities())
        return self._replace(attn=first, attn_aug=second)

    def _masked(self, view: Tensor, key_mask: Tensor | None, rows: slice) -> Tensor:
        if key_mask is not None:
            view = view.masked_fill(~key_mask[:, None, None, :], 0.0)
        if self.counted_queries is not None:  # so that NaN in a row that does not count has no gradient
            view = view.masked_fill(~self.counted_queries[:, None, rows, None], 0.0)
        return view


def on_shared_keys(attn: Tensor, attn_aug: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[B, H, L, S]`` with each row renormalised over the keys at which both views are positive."""
    unshared = (attn == 0) | (attn_aug == 0)
    masked = (view.masked_fill(unshared, 0.0) for view in (attn, attn_aug))
    first, second = (view / view.sum(-1, keepdim=True).masked_fill(unshared.all(-1, True), 1.0) for view in masked)
    return first, second


def maps_problem(
    attn: Tensor,
    attn_aug: Tensor | None,
    *,
    attention_mask: Tensor | None,
    attention_mask_aug: Tensor | None,
    query_mask: Tensor | None,
    query_mask_aug: Tensor | None,
    count_padded_queries: bool,
    heads: str = "each",
) -> tuple[MapsProblem, Tensor | None]:
    """The problem that a user's arguments describe, and the ``[B]`` number of counted (query, key) pairs of each head.

    The number is None where all pairs count. Arguments as for :func:`ear_ops.attention_mse`; with ``heads="mean"`` the
    views may have different numbers of heads.
    """
    may_differ = (1,) if heads == "mean" else ()
    stacked = check_two_views("attn", attn, attn_aug, ndim=4, layout="[B, H, L, S]", may_differ=may_differ)
    for name, view in (("attn", attn), ("attn_aug", attn_aug)):
        if heads == "mean" and view is not None and view.shape[1] == 0:
            raise ValueError(f"{name}: expected at least one head to average, got shape {list(view.shape)}")
    masks = resolve_attention_masks(
        attention_mask,
        attention_mask_aug,
        query_mask,
        query_mask_aug,
        batch=attn.shape[0] // 2 if stacked else attn.shape[0],
        query_length=attn.shape[2],
        key_length=attn.shape[3],
        stacked=stacked,
        device=attn.device,
        count_padded_queries=count_padded_queries,
    )
    return MapsProblem(attn, attn_aug, masks.key_mask, masks.counted_queries), masks.counted_pairs


def mean_over_heads(attn: Tensor, weights: Tensor | None) -> Tensor:
    """The average ``[B, 1, L, S]`` of ``attn`` ``[B, H, L, S]``; ``weights`` ``[H]`` add up to 1, None: all alike."""
    return attn.mean(1, keepdim=True) if weights is None else (attn * weights[:, None, None]).sum(1, keepdim=True)


def squared_difference_sums(attn: Tensor, attn_aug: Tensor) -> Tensor:
    """``[B, H]`` sums over queries and keys of ``(P - T)^2``; ``attn``, ``attn_aug``: ``[B, H, L, S]``."""
    return (attn - attn_aug).square().sum(dim=(-2, -1))
