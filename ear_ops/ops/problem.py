"""The inputs of every operator that compares attention straight from Q and K, checked once and kept in one object."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ear_ops.arguments import check_tensor, checked_number
from ear_ops.ops.blocks import sum_over_blocks
from ear_ops.ops.masks import check_two_views, resolve_attention_masks, split_views
from ear_ops.ops.probabilities import attendable_keys, attention_scores, compute_dtype, masked_softmax


class AttentionProblem(NamedTuple):
    """Queries, keys, masks and structure of two views; the order of the fields is the schema of the operators.

    Both views come in one tensor (``query_aug`` and ``key_aug`` None, x first) or in two. To add an input, add a field
    here, in ``csrc/problem.h`` and in :func:`attention_problem`, and use it in :meth:`scores` and the kernels.
    """

    query: Tensor  # [B, H, L, D], or [2B, H, L, D] with both views
    key: Tensor  # [B, H_kv, S, D], or [2B, H_kv, S, D]
    query_aug: Tensor | None  # [B, H, L, D]
    key_aug: Tensor | None  # [B, H_kv, S, D]
    key_mask: Tensor | None  # [2B, S] bool, the keys that are real in each view
    counted_queries: Tensor | None  # [B, L] bool, the rows that enter the sum
    attn_bias: Tensor | None  # [B, H, L, S] in the compute dtype, added to the scores; -inf masks
    attn_bias_aug: Tensor | None  # the same of the second view, None where both share one
    scale: float  # of the scores
    is_causal: bool  # the future is masked, aligned to the bottom right
    window: int  # keys less than this many positions away may be attended to; 0: all
    softcap: float | None  # c of c * tanh(scores / c), before the bias; kernels do not have it

    @property
    def pairs(self) -> int:
        """B, the number of pairs (x, x^a)."""
        return self.query.shape[0] // 2 if self.query_aug is None else self.query.shape[0]

    def probabilities(self, rows: slice) -> tuple[Tensor, Tensor]:
        """P and T: the attention probabilities ``[B, H, rows, S]`` of some queries; rows that do not count are zero."""
        first, second = (masked_softmax(*view) for view in self.scores(rows))
        return first, second

    def scores(self, rows: slice) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Of both views: the scores ``[B, H, rows, S]`` of some queries, and a mask of those that the softmax sees."""
        first_position = self.key.shape[2] - self.query.shape[2] + rows.start
        first, second = (
            attention_scores(*view, **self._structure, first_position=first_position) for view in views_of(self, rows)
        )
        return first, second

    def shared_pairs(self) -> Tensor:
        """The ``[B, H]`` number of (query, key) pairs of counted queries that both views allow."""
        length, keys = self.query.shape[2], self.key.shape[2]

        def of_rows(rows: slice) -> Tensor:
            shared = self.query.new_ones((1, 1, rows.stop - rows.start, keys), dtype=torch.bool)
            for _, _, key_mask, bias, counted in views_of(self, rows):
                masks = attendable_keys(
                    rows.stop - rows.start,
                    keys,
                    key_mask,
                    bias,
                    counted,
                    self.is_causal,
                    self.window or None,
                    self.query.device,
                    keys - length + rows.start,
                )
                shared = shared if masks is None else shared & masks
            return shared.sum((-2, -1)).expand(self.pairs, self.query.shape[1])

        return self.sum_over_queries(of_rows)

    def sum_over_queries(self, sums_of: Callable[[slice], Tensor]) -> Tensor:
        """The sum of ``sums_of(rows)``, ``[B, H]``, over blocks of the queries."""
        entries = self.pairs * self.query.shape[1] * self.key.shape[2]
        return sum_over_blocks(sums_of, self.query.shape[2], entries)

    def on_shared_keys(self) -> AttentionProblem:
        """The same with the keys masked in both views that one of them masks, by ``key_mask`` or a bias of -inf."""
        problem = self
        if self.key_mask is not None:
            shared = torch.logical_and(*split_views(self.key_mask, None))
            problem = problem._replace(key_mask=torch.cat([shared, shared]))
        if self.attn_bias is not None and self.attn_bias_aug is not None:
            masked = (self.attn_bias == -math.inf) | (self.attn_bias_aug == -math.inf)
            bias, bias_aug = (b.masked_fill(masked, -math.inf) for b in (self.attn_bias, self.attn_bias_aug))
            problem = problem._replace(attn_bias=bias, attn_bias_aug=bias_aug)
        return problem

    @property
    def _structure(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "is_causal": self.is_causal,
            "window": self.window or None,
            "softcap": self.softcap,
        }

    @property
    def unsupported(self) -> str | None:
        """Why no kernel can take this problem, None where they can."""
        return None if self.softcap is None else "softcap is computed by the reference only"


def views_of(problem: Any, rows: slice = slice(None)) -> Iterator[tuple[Any, ...]]:
    """Of each view query, key, key mask and bias, then the mask of the queries that count; of some queries.

    ``problem`` has the tensors of an :class:`AttentionProblem`.
    """
    key_masks = (None, None) if problem.key_mask is None else split_views(problem.key_mask, None)
    biases = (problem.attn_bias, problem.attn_bias if problem.attn_bias_aug is None else problem.attn_bias_aug)
    queries, keys = split_views(problem.query, problem.query_aug), split_views(problem.key, problem.key_aug)
    counted = None if problem.counted_queries is None else problem.counted_queries[:, rows]
    for query, key, key_mask, bias in zip(queries, keys, key_masks, biases, strict=True):
        yield query[:, :, rows], key, key_mask, None if bias is None else bias[:, :, rows], counted


def fake_outputs(problem: AttentionProblem, row_stats: int | None = None) -> tuple[Tensor, ...]:
    """Empty tensors like the sums ``[B, H]`` and, if ``row_stats`` numbers are saved of a query, those."""
    _, heads, length, _ = problem.query.shape
    dtype = compute_dtype(problem.query.dtype)
    sums = problem.query.new_empty((problem.pairs, heads), dtype=dtype)
    if row_stats is None:
        return (sums,)
    return sums, problem.query.new_empty((row_stats, problem.pairs, heads, length), dtype=dtype)


def attention_problem(
    query: Tensor,
    key: Tensor,
    query_aug: Tensor | None,
    key_aug: Tensor | None,
    *,
    attention_mask: Tensor | None,
    attention_mask_aug: Tensor | None,
    query_mask: Tensor | None,
    query_mask_aug: Tensor | None,
    attn_bias: Tensor | None,
    attn_bias_aug: Tensor | None,
    scale: float | None,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    temperature: float = 1.0,
    count_padded_queries: bool,
    heads: str = "each",
) -> tuple[AttentionProblem, Tensor | None]:
    """The problem that a user's arguments describe, and the ``[B]`` number of counted (query, key) pairs of each head.

    The number is None where all pairs count. ``count_padded_queries`` belongs to the reduction ``"padded_mean"``; for
    the other arguments see :func:`ear_ops.qk_attention_mse`. With ``heads="mean"`` the views may have different numbers
    of heads and head dimensions, and ``scale`` is that of the first. ``temperature`` divides all that the scores are
    made of, so that kernels need not know of it.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    stacked = _check_queries_and_keys(query, key, query_aug, key_aug, heads)
    pairs, (_, _, query_length, head_dim) = query.shape[0] // 2 if stacked else query.shape[0], query.shape
    key_length = key.shape[2]
    if window is not None:
        if not isinstance(window, int) or isinstance(window, bool):
            raise TypeError(f"window: expected None or an integer, got {window!r}")
        if window < 1:
            raise ValueError(f"window: expected None or at least 1, got {window}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: expected True or False, got {is_causal!r}")
    if scale is not None:
        scale = checked_number("scale", scale, "multiply the queries by it and pass scale=1.0")
    if softcap is not None:
        softcap = checked_number("softcap", softcap, "pass softcap.item()")
        if softcap <= 0:
            raise ValueError(f"softcap: expected None or a positive number, got {softcap}")
    masks = resolve_attention_masks(
        attention_mask,
        attention_mask_aug,
        query_mask,
        query_mask_aug,
        batch=pairs,
        query_length=query_length,
        key_length=key_length,
        stacked=stacked,
        device=query.device,
        count_padded_queries=count_padded_queries,
    )
    shapes = [
        (pairs, like.shape[1], query_length, key_length) for like in (query, query if query_aug is None else query_aug)
    ]
    bias, bias_aug = _resolve_biases(attn_bias, attn_bias_aug, shapes, stacked, query, temperature)
    problem = AttentionProblem(
        query=query,
        key=key,
        query_aug=query_aug,
        key_aug=key_aug,
        key_mask=masks.key_mask,
        counted_queries=masks.counted_queries,
        attn_bias=bias,
        attn_bias_aug=bias_aug,
        scale=(1.0 / math.sqrt(head_dim) if scale is None else scale) / temperature,
        is_causal=is_causal,
        window=window or 0,
        softcap=None if softcap is None else softcap / temperature,
    )
    return problem, masks.counted_pairs


def _check_queries_and_keys(
    query: Tensor, key: Tensor, query_aug: Tensor | None, key_aug: Tensor | None, heads: str
) -> bool:
    """True where both views came in one tensor."""
    may_differ = (1, 3) if heads == "mean" else ()
    stacked = check_two_views("query", query, query_aug, ndim=4, layout="[B, H, L, D]", may_differ=may_differ)
    if (query_aug is None) != (key_aug is None):
        present, missing = ("query", "key") if query_aug is not None else ("key", "query")
        raise ValueError(f"{missing}_aug: expected a tensor because {present}_aug was given, got None")
    check_two_views("key", key, key_aug, ndim=4, layout="[B, H_kv, S, D]", may_differ=may_differ)
    _check_view(query, key, "", heads)
    if query_aug is not None and key_aug is not None:
        _check_view(query_aug, key_aug, "_aug", heads)
    return stacked


def _check_view(query: Tensor, key: Tensor, suffix: str, heads: str) -> None:
    """Raise unless the queries and keys of one view go together; ``suffix`` is that of their names."""
    rows, count, _, head_dim = query.shape
    if key.shape[0] != rows or key.shape[3] != head_dim:
        raise ValueError(
            f"key{suffix}: expected [{rows}, H_kv, S, {head_dim}] to go with query{suffix} {list(query.shape)}, got "
            f"{list(key.shape)}"
        )
    if head_dim < 1:
        raise ValueError(f"query{suffix}: expected a head dimension of at least 1, got shape {list(query.shape)}")
    if key.shape[1] == 0 or count % key.shape[1]:
        raise ValueError(
            f"key{suffix}: expected a number of heads that divides the {count} heads of query{suffix} (grouped-query "
            f"attention), got shape {list(key.shape)}"
        )
    if heads == "mean" and count == 0:
        raise ValueError(f"query{suffix}: expected at least one head to average, got shape {list(query.shape)}")
    for what in ("dtype", "device"):
        if getattr(key, what) != getattr(query, what):
            raise TypeError(
                f"key{suffix}: expected {what} {getattr(query, what)} like query{suffix}, got {getattr(key, what)}"
            )


def _resolve_biases(
    bias: Tensor | None,
    bias_aug: Tensor | None,
    shapes: Sequence[tuple[int, int, int, int]],
    stacked: bool,
    like: Tensor,
    temperature: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Each view's bias expanded to its ``[B, H, L, S]`` in the compute dtype; the second None where both share it."""
    if bias is None:
        if bias_aug is not None:
            raise ValueError("attn_bias: expected a tensor because attn_bias_aug was given, got None")
        return None, None
    if stacked and bias_aug is not None:
        raise ValueError("attn_bias_aug: expected None, because both views came in one tensor, got a tensor")
    shape, shape_aug = shapes
    first = _expand_bias("attn_bias", bias, (2 * shape[0], *shape[1:]) if stacked else shape, like, temperature)
    if stacked:
        shared = bias.dim() < 4 or bias.shape[0] == 1
        return (first[: shape[0]], None) if shared else split_views(first, None)
    if bias_aug is not None:
        return first, _expand_bias("attn_bias_aug", bias_aug, shape_aug, like, temperature)
    return first, None if shape_aug == shape else _expand_bias("attn_bias", bias, shape_aug, like, temperature)


def _expand_bias(name: str, bias: Tensor, shape: tuple[int, ...], like: Tensor, temperature: float) -> Tensor:
    check_tensor(name, bias, "pass a tensor that broadcasts to the scores")
    if bias.requires_grad:
        raise ValueError(
            f"{name}: expected a constant, got a tensor that requires grad; the loss has no gradient for it, "
            f"so pass {name}.detach()"
        )
    dtype = compute_dtype(like.dtype)
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device).masked_fill(~bias, -math.inf)
    elif not bias.dtype.is_floating_point:
        raise TypeError(f"{name}: expected float (additive) or bool (True = attend), got {bias.dtype}")
    bias = bias.to(device=like.device, dtype=dtype)
    if temperature != 1.0:  # what is finite stays finite, since -inf masks
        cooled, limits = bias / temperature, torch.finfo(dtype)
        bias = torch.where(torch.isinf(bias), cooled, cooled.clamp(limits.min, limits.max))
    try:
        return bias.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name}: expected a shape broadcastable to {list(shape)}, got {list(bias.shape)}") from None
