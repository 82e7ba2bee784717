"""Attention of two views, or its scores, compared straight from queries and keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ear_ops.arguments import check_choice
from ear_ops.functional.options import (
    HEADS,
    check_divergence_options,
    check_head_weights,
    kl_name,
    reduce_rows,
    weigh_heads,
)
from ear_ops.functional.values import can_be_read
from ear_ops.ops.mean_heads import QK_MEAN_HEADS, MeanHeadsProblem, mean_heads_problem
from ear_ops.ops.operator import ReferenceOperator
from ear_ops.ops.problem import AttentionProblem, attention_problem
from ear_ops.ops.qk_attention_mse import QK_ATTENTION_MSE
from ear_ops.ops.qk_divergences import QK_DIVERGENCES, QK_SCORES_MSE
from ear_ops.ops.reductions import check_reduction, reduce_attention


def qk_attention_mse(
    query: Tensor,
    key: Tensor,
    query_aug: Tensor | None = None,
    key_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_bias_aug: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    heads: str = "each",
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Mean squared error between the attention matrices of two views, straight from Q and K.

    With ``P = softmax(scale * Q K^T + mask)`` and T the same of the augmented view: ``sum (P - T)^2``, reduced. This is
    Attention-Pull (Ding et al. 2022, eq. 2); on compiled backends neither P nor T is ever materialised. The comparison
    is of probabilities before any attention dropout.

    Args:
        query: ``[B, H, L, D]``, or ``[2B, H, L, D]`` with both views.
        key: ``[B, H_kv, S, D]`` (``[2B, ...]``); H is a multiple of H_kv (grouped-query attention).
        query_aug, key_aug: the augmented view, same shapes and dtype, or both None. H, H_kv and D may be others with
            ``heads="mean"``.
        attention_mask, attention_mask_aug: ``[B, S]`` bool or integer, 1 = real; masks keys.
        query_mask, query_mask_aug: ``[B, L]``; masks queries. By default ``attention_mask`` where L = S, as in
            self-attention; pass it for cross-attention, where L may equal S by coincidence.
        attn_bias, attn_bias_aug: float (added to the scaled scores) or bool (True = attend), broadcastable to
            ``[B, H, L, S]`` (``[2B, ...]``); ``attn_bias_aug=None`` means the same bias for both views. A constant: a
            bias that requires grad raises.
        scale: 1/sqrt(D) of each view by default.
        is_causal: mask the future, aligned to the bottom right.
        window: attend only to keys less than this many positions away.
        softcap: ``c * tanh(scores / c)`` before bias and mask; computed by the reference.
        heads: ``"each"`` compares head with head; ``"mean"`` compares the averages of P and of T over the heads, for
            views with different numbers of heads. The average counts as one head in every reduction.
        head_weights: ``[H]``, multiplies each head's sum before the reduction, whose divisor stays as it is: all ones
            change nothing, a zero leaves a head out. With ``heads="mean"`` they weight the averages of both views, as
            ``w / w.sum()``; they are constants of at least 0, and views with different numbers of heads take none.
        reduction: ``"mean"``, ``"padded_mean"``, ``"equations"``, ``"sum"`` or ``"none"``, see
            :mod:`ear_ops.ops.reductions`.
        backend: ``"auto"`` (kernels where there are any, else the reference), ``"reference"`` (plain PyTorch),
            ``"cpu"`` or ``"cuda"``. None reads the environment variable ``EAR_OPS_BACKEND``, else it is ``"auto"``.

    Returns:
        A scalar, or ``[B, H]`` for ``"none"`` (``[B]`` with ``heads="mean"``); float32 (float64 for float64 inputs). A
        row without any real key is a zero row in that view; NaN or infinity in real inputs propagates.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailableError: the backend asked for cannot run.
    """
    check_reduction(reduction)
    check_choice("heads", heads, HEADS)
    problem, counted_pairs = attention_problem(
        query,
        key,
        query_aug,
        key_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=query_mask,
        query_mask_aug=query_mask_aug,
        attn_bias=attn_bias,
        attn_bias_aug=attn_bias_aug,
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        count_padded_queries=reduction == "padded_mean",
        heads=heads,
    )
    if heads == "mean":
        averages = _averages(problem, head_weights, one_scale=scale is not None)
        sums = QK_MEAN_HEADS["mse"].sums(averages, backend)
    else:
        sums = weigh_heads(QK_ATTENTION_MSE.sums(problem, backend), head_weights)
    return reduce_attention(sums, reduction, query.shape[2], key.shape[2], counted_pairs)


def qk_attention_kl(
    query: Tensor,
    key: Tensor,
    query_aug: Tensor | None = None,
    key_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_bias_aug: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    direction: str = "forward",
    support: str = "all",
    heads: str = "each",
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Kullback-Leibler divergence between the attention matrices of two views, straight from Q and K.

    With P of the first view and T of the second, which is the target, as in :func:`qk_attention_mse`: the sum of
    ``KL(T || P) = sum_j T_j log(T_j / P_j)`` over counted queries, reduced. This is the attention loss of MiniLM (Wang
    et al. 2020), with the teacher as the second view. The gradient is not clipped: it tends to -T where P underflows.

    A key that only the target has makes KL infinite by definition. On the CPU this raises; on CUDA, and where
    ``torch.compile`` traces the call, the loss is +inf and the target's gradient is not finite. A key that only the
    other view has adds nothing, nor does a row in which the target has no key.

    Args:
        query, key, query_aug, key_aug: as for :func:`qk_attention_mse`.
        attention_mask, attention_mask_aug, query_mask, query_mask_aug: as for :func:`qk_attention_mse`.
        attn_bias, attn_bias_aug, scale, is_causal, window, softcap: as for :func:`qk_attention_mse`.
        heads, head_weights, backend: as for :func:`qk_attention_mse`.
        temperature: divides the final scores of both views, biases included. No factor temperature^2 is applied.
        direction: ``"forward"`` is KL(T || P), ``"reverse"`` is KL(P || T).
        support: ``"all"``, or ``"shared"``: each view attends only to keys that both views have, so that its rows are
            renormalised over these. Masks and biases of -inf decide. With ``heads="mean"``, a view has a key where one
            of its heads has it.
        reduction: as for :func:`qk_attention_mse`, but ``"mean"`` divides by the number of counted (head, query) rows
            and ``"padded_mean"`` by B * H * L.

    Returns:
        A scalar, or ``[B, H]`` for ``"none"`` (``[B]`` with ``heads="mean"``); float32 (float64 for float64 inputs).
        Never negative, and exactly 0 with a gradient of 0 for equal views.

    Raises:
        ValueError, TypeError: an argument does not fit, or KL is infinite; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run.
    """
    return _qk_divergence(
        kl_name(direction),
        query,
        key,
        query_aug,
        key_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=query_mask,
        query_mask_aug=query_mask_aug,
        attn_bias=attn_bias,
        attn_bias_aug=attn_bias_aug,
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        temperature=temperature,
        support=support,
        heads=heads,
        head_weights=head_weights,
        reduction=reduction,
        backend=backend,
    )


def qk_attention_js(
    query: Tensor,
    key: Tensor,
    query_aug: Tensor | None = None,
    key_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_bias_aug: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    support: str = "all",
    heads: str = "each",
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Jensen-Shannon divergence between the attention matrices of two views, straight from Q and K.

    With M = (P + T) / 2, the sum of ``JS = KL(P || M) / 2 + KL(T || M) / 2`` over counted queries, reduced (Lin 1991).
    It is symmetric, at most log 2 in a row, and finite where the views have different keys. A row that is empty in one
    view adds log(2) / 2 and has no gradient.

    Arguments, results and errors are as for :func:`qk_attention_kl`, without ``direction``.
    """
    return _qk_divergence(
        "js",
        query,
        key,
        query_aug,
        key_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=query_mask,
        query_mask_aug=query_mask_aug,
        attn_bias=attn_bias,
        attn_bias_aug=attn_bias_aug,
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        temperature=temperature,
        support=support,
        heads=heads,
        head_weights=head_weights,
        reduction=reduction,
        backend=backend,
    )


def qk_scores_mse(
    query: Tensor,
    key: Tensor,
    query_aug: Tensor | None = None,
    key_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_bias_aug: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Mean squared error between the attention scores of two views, before the softmax, straight from Q and K.

    The sum of ``(S - S^a)^2`` over pairs of a counted query and a key that both views allow, reduced; S are the scores
    after scale, softcap and bias. This is the attention loss of TinyBERT (Jiao et al. 2020).

    Arguments, results and errors are as for :func:`qk_attention_mse`, except for ``reduction``: ``"mean"`` divides by
    the number of the pairs that enter the sum. So structure and biases of -inf change the count.
    """
    check_reduction(reduction)
    problem, _ = attention_problem(
        query,
        key,
        query_aug,
        key_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=query_mask,
        query_mask_aug=query_mask_aug,
        attn_bias=attn_bias,
        attn_bias_aug=attn_bias_aug,
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        count_padded_queries=reduction == "padded_mean",
    )
    sums = weigh_heads(QK_SCORES_MSE.sums(problem, backend), head_weights)
    counted_pairs = problem.shared_pairs() if reduction == "mean" else None
    return reduce_attention(sums, reduction, query.shape[2], key.shape[2], counted_pairs)


def _qk_divergence(
    name: str,
    query: Tensor,
    *other_tensors: Any,
    attn_bias: Tensor | None,
    attn_bias_aug: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    support: str,
    heads: str,
    head_weights: Tensor | None,
    reduction: str,
    backend: str | None,
    **masks: Any,
) -> Tensor:
    """The divergence called ``name``; ``masks``: masks and structure, as for :func:`qk_attention_mse`."""
    check_reduction(reduction)
    check_divergence_options(temperature=temperature, support=support, heads=heads)
    problem, _ = attention_problem(
        query,
        *other_tensors,
        attn_bias=attn_bias,
        attn_bias_aug=attn_bias_aug,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        count_padded_queries=reduction == "padded_mean",
        heads=heads,
        **masks,
    )
    compared: AttentionProblem | MeanHeadsProblem = problem
    operator: ReferenceOperator = QK_DIVERGENCES[name]
    if heads == "mean":
        compared, operator = _averages(problem, head_weights, one_scale=scale is not None), QK_MEAN_HEADS[name]
    if support == "shared":
        compared = compared.on_shared_keys()
    sums = operator.sums(compared, backend)
    sums = sums if heads == "mean" else weigh_heads(sums, head_weights)
    return reduce_rows(sums, name, problem.counted_queries, reduction, query.shape[2])


def _averages(problem: AttentionProblem, head_weights: Tensor | None, one_scale: bool) -> MeanHeadsProblem:
    """The problem of the averages over the heads; ``one_scale``: the user gave a scale, which both views have."""
    check_head_weights(head_weights)
    check_weights = can_be_read(head_weights)
    return mean_heads_problem(problem, head_weights, one_scale=one_scale, check_weights=check_weights)
