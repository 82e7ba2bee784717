"""The operators that compare the averages over the heads of two views, whose numbers of heads may differ.

The average of the first view is ``P = sum_h w_h P_h``, that of the second is T likewise. The weights are 1 / H, or add
up to 1. An operator sums ``(P - T)^2``, or the entries of a divergence (:mod:`ear_ops.ops.divergences`), over keys and
counted queries.

The gradient of the scores of head h is ``dS_h = f_h - P_h sum f_h``. Here ``f_h = r_h f``, with the slope f of the
average, and ``r_h = w_h P_h / P`` is the share that the head has in the average. The logarithm of P is a log-sum-exp
over the heads, taken from scores. So KL is finite where P underflows, and its gradient is not clipped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ear_ops.ops.blocks import sum_over_blocks
from ear_ops.ops.divergences import DIVERGENCES, apply_function, finite_where_left_out, softmax_of
from ear_ops.ops.gradient_operator import GradientOperator
from ear_ops.ops.maps import mean_over_heads
from ear_ops.ops.masks import split_views
from ear_ops.ops.probabilities import attention_scores, compute_dtype
from ear_ops.ops.problem import AttentionProblem, views_of


class MeanHeadsProblem(NamedTuple):
    """Queries, keys, masks and structure of two views; the order of the fields is the schema of the operators.

    Both views come in one tensor (``query_aug`` and ``key_aug`` None, x first) or in two. H, H_kv and D of the second
    view may be others than those of the first.
    """

    query: Tensor  # [B, H, L, D], or [2B, H, L, D] with both views
    key: Tensor  # [B, H_kv, S, D], or [2B, H_kv, S, D]
    query_aug: Tensor | None  # [B, H, L, D]
    key_aug: Tensor | None  # [B, H_kv, S, D]
    key_mask: Tensor | None  # [2B, S] bool, the keys that are real in each view
    counted_queries: Tensor | None  # [B, L] bool, the rows that enter the sum
    attn_bias: Tensor | None  # [B, H, L, S] in the compute dtype, added to the scores; -inf masks
    attn_bias_aug: Tensor | None  # the same of the second view, None where both share one
    head_weights: Tensor | None  # [H] of both views in the compute dtype, which add up to 1; None: 1 / H of each view
    scale: float  # of the scores of the first view
    scale_aug: float
    is_causal: bool  # the future is masked, aligned to the bottom right
    window: int  # keys less than this many positions away may be attended to; 0: all
    softcap: float | None  # c of c * tanh(scores / c), before the bias; kernels do not have it

    @property
    def pairs(self) -> int:
        """B, the number of pairs (x, x^a)."""
        return self.query.shape[0] // 2 if self.query_aug is None else self.query.shape[0]

    def scores(self, rows: slice) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Of both views: the scores ``[B, H, rows, S]`` of some queries, and a mask of those that the softmax sees."""
        first, second = (
            attention_scores(
                *view,
                scale=scale,
                is_causal=self.is_causal,
                window=self.window or None,
                softcap=self.softcap,
                first_position=self.key.shape[2] - self.query.shape[2] + rows.start,
            )
            for view, scale in zip(views_of(self, rows), (self.scale, self.scale_aug), strict=True)
        )
        return first, second

    def on_shared_keys(self) -> MeanHeadsProblem:
        """The same with the keys masked in both views, in all heads, that one of the averages lacks.

        That is a key that ``key_mask`` masks, or a bias of -inf in all heads.
        """
        problem = self
        if self.key_mask is not None:
            first, second = split_views(self.key_mask, None)
            problem = problem._replace(key_mask=torch.cat([first & second] * 2))
        if self.attn_bias is not None and self.attn_bias_aug is not None:
            left_out = False if self.head_weights is None else (self.head_weights == 0)[:, None, None]
            biases = (self.attn_bias, self.attn_bias_aug)
            masked = [((bias == -math.inf) | left_out).all(1, keepdim=True) for bias in biases]
            first, second = (bias.masked_fill(masked[0] | masked[1], -math.inf) for bias in biases)
            problem = problem._replace(attn_bias=first, attn_bias_aug=second)
        return problem

    @property
    def unsupported(self) -> str | None:
        """Why no kernel can take this problem, None where they can."""
        return None if self.softcap is None else "softcap is computed by the reference only"


def mean_heads_problem(
    problem: AttentionProblem, head_weights: Tensor | None, *, one_scale: bool, check_weights: bool
) -> MeanHeadsProblem:
    """The problem that compares the averages over the heads of the views of ``problem``.

    Args:
        problem: made with ``heads="mean"``.
        head_weights: ``[H]`` or None, see :func:`normalized_weights`.
        one_scale: whether the scale of the first view is that of the second, too; else it goes with 1/sqrt(D).
        check_weights: whether the values of the weights can be read.

    Raises:
        ValueError: the weights do not fit.
    """
    query, query_aug = problem.query, problem.query if problem.query_aug is None else problem.query_aug
    weights = normalized_weights(head_weights, query.shape[1], query_aug.shape[1], query, check_weights)
    scale_aug = problem.scale * (1.0 if one_scale else math.sqrt(query.shape[3] / query_aug.shape[3]))
    return MeanHeadsProblem(**problem._asdict(), head_weights=weights, scale_aug=scale_aug)


def normalized_weights(
    head_weights: Tensor | None, heads: int, heads_aug: int, like: Tensor, check_values: bool
) -> Tensor | None:
    """The weights ``[H]`` over their sum, in the compute dtype of ``like``; None where the user gave none.

    Raises:
        ValueError: they do not fit the ``heads`` of the first view and the ``heads_aug`` of the second.
    """
    if head_weights is None:
        return None
    if heads != heads_aug:
        raise ValueError(
            f"head_weights: expected None, because the views have {heads} and {heads_aug} heads, which share no "
            f"weights; got shape {list(head_weights.shape)}"
        )
    if list(head_weights.shape) != [heads]:
        raise ValueError(
            f"head_weights: expected one number for each of the {heads} heads, got shape {list(head_weights.shape)}"
        )
    if head_weights.requires_grad:
        raise ValueError(
            "head_weights: expected a constant, got a tensor that requires grad; the average over the heads has no "
            "gradient for it, so pass head_weights.detach()"
        )
    if check_values and not (torch.isfinite(head_weights).all() and (head_weights >= 0).all() and head_weights.any()):
        raise ValueError(
            f"head_weights: expected finite numbers of at least 0, not all of them 0, to average over the heads; got "
            f"{head_weights.tolist()}"
        )
    weights = head_weights.to(compute_dtype(like.dtype))
    return weights / weights.sum()


class _Average(NamedTuple):
    """The attention of all heads of one view, and its average."""

    attn: Tensor  # [B, H, L, S]
    logs: Tensor  # [B, H, L, S], the logarithm of weight times attention; 0 at keys that no head has
    mean: Tensor  # [B, 1, L, S]
    log_mean: Tensor  # [B, 1, L, S], finite also where the mean underflows
    present: Tensor  # [B, 1, L, S] bool, the keys that a head has

    def shares(self) -> Tensor:
        """``[B, H, L, S]``, what each head has of the average: they add up to 1, or are 0 where no head has the key."""
        return torch.softmax(self.logs, 1).masked_fill(~self.present, 0.0)


def _average(scores: Tensor, allowed: Tensor | None, weights: Tensor | None) -> _Average:
    attn, shifted, log_sum = softmax_of(scores, allowed)
    log_weights = -math.log(scores.shape[1]) if weights is None else torch.log(weights)[:, None, None]
    logs = shifted - log_sum + log_weights
    if allowed is not None:
        logs = logs.masked_fill(~allowed, -math.inf)
    present = logs.amax(1, keepdim=True) != -math.inf
    logs = logs.masked_fill(~present, 0.0)
    return _Average(attn, logs, mean_over_heads(attn, weights), torch.logsumexp(logs, 1, keepdim=True), present)


def _log_ratio(first: _Average, second: _Average) -> Tensor:
    """``x = log T - log P``, from T - P where they are nearly equal; ±inf at keys that only one of them has, else 0."""
    p, t = first.mean, second.mean
    near = ((t - p).abs() < p / 2.0) & (p > torch.finfo(p.dtype).tiny)
    change = (t - p).masked_fill(~near, 0.0) / p.masked_fill(~near, 1.0)
    x = torch.where(near, torch.log1p(change), second.log_mean - first.log_mean)
    x = x.masked_fill(~first.present, math.inf).masked_fill(~second.present, -math.inf)
    return x.masked_fill(~(first.present | second.present), 0.0)


class _DivergenceOfAverages(Function):
    """Its gradients are those of the table of divergences, shared out to the heads."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *tensors: Any) -> Tensor:
        scores, scores_aug, allowed, allowed_aug, weights = tensors
        first, second = _average(scores, allowed, weights), _average(scores_aug, allowed_aug, weights)
        return DIVERGENCES[name].entries(first.mean, second.mean, _log_ratio(first, second)).sum((-3, -2, -1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        scores, scores_aug, allowed, allowed_aug, weights = ctx.saved_tensors
        first, second = _average(scores, allowed, weights), _average(scores_aug, allowed_aug, weights)
        divergence, upstream = DIVERGENCES[ctx.name], grad_sums[..., None, None, None]
        x = finite_where_left_out(_log_ratio(first, second), upstream)
        views = (first, allowed, divergence.slopes), (second, allowed_aug, divergence.slopes_aug)
        gradients: list[Tensor | None] = [None, None]
        for view, (average, mask, slopes) in enumerate(views):
            if ctx.needs_input_grad[1 + view]:
                slope = average.shares() * slopes(first.mean, second.mean, x)
                gradient = upstream * torch.addcmul(slope, average.attn, slope.sum(-1, keepdim=True), value=-1.0)
                gradients[view] = gradient if mask is None else gradient.masked_fill(~mask, 0.0)
        return None, *gradients, None, None, None


def _squares(scores: Tensor, scores_aug: Tensor, *rest: Tensor | None) -> Tensor:
    allowed, allowed_aug, weights = rest
    first, second = (
        mean_over_heads(softmax_of(*view)[0], weights) for view in ((scores, allowed), (scores_aug, allowed_aug))
    )
    return (first - second).square().sum((-3, -2, -1))


def reference(compare: Callable[..., Tensor], problem: MeanHeadsProblem) -> Tensor:
    """``[B]`` sums over counted queries and all keys; ``compare`` makes those of some queries from the scores."""

    def sums_of(rows: slice) -> Tensor:
        (scores, allowed), (scores_aug, allowed_aug) = problem.scores(rows)
        return compare(scores, scores_aug, allowed, allowed_aug, problem.head_weights)

    heads = problem.query.shape[1] if problem.query_aug is None else problem.query_aug.shape[1]
    entries = problem.pairs * max(problem.query.shape[1], heads) * problem.key.shape[2]
    return sum_over_blocks(sums_of, problem.query.shape[2], entries)


_COMPARISONS: dict[str, Callable[..., Tensor]] = {
    "mse": _squares,
    **{name: functools.partial(apply_function, _DivergenceOfAverages, name) for name in DIVERGENCES},
}


QK_MEAN_HEADS = {
    name: GradientOperator(
        f"qk_mean_attention_{name}",
        MeanHeadsProblem,
        reference=functools.partial(reference, compare),
        differentiable=4,
    )
    for name, compare in _COMPARISONS.items()
}
