"""The losses as functions: tensors in, loss out.

Every function takes the two views either as two tensors (``query``, ``query_aug``, ...) or as one tensor ``[2B, ...]``
that holds both, x first, with masks ``[2B, ...]`` too. The ``_aug`` arguments are then left out. One tensor in means
one gradient out, which is cheaper for a model that runs both views in one batch.

``backend`` is ``"auto"`` (kernels for the device where there are any, else the reference), ``"reference"``, ``"cpu"``
or ``"cuda"``. None reads the environment variable ``EAR_OPS_BACKEND``, whose default is ``"auto"``. A backend that is
asked for by name and cannot run raises :class:`ear_ops.BackendUnavailableError` with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ear_ops.arguments import check_choice, check_temperature
from ear_ops.ops.attention_divergences import ATTENTION_DIVERGENCES
from ear_ops.ops.attention_mse import ATTENTION_MSE, MapsProblem, maps_problem
from ear_ops.ops.divergences import InfiniteDivergenceError
from ear_ops.ops.masks import resolve_attention_masks
from ear_ops.ops.mean_heads import QK_MEAN_HEADS, MeanHeadsProblem, mean_heads_problem, normalized_weights
from ear_ops.ops.operator import ReferenceOperator
from ear_ops.ops.pooled_distance import POOLED_DISTANCE, pooled_problem
from ear_ops.ops.probabilities import compute_dtype
from ear_ops.ops.problem import AttentionProblem, attention_problem
from ear_ops.ops.qk_attention_mse import QK_ATTENTION_MSE
from ear_ops.ops.qk_divergences import QK_DIVERGENCES, QK_SCORES_MSE
from ear_ops.ops.qk_words import QK_WORD_ATTENTION, QK_WORD_ATTENTION_ON_SHARED_WORDS, WordsProblem, count_pieces
from ear_ops.ops.reductions import check_reduction, reduce_attention, reduce_pooled

HEADS = ("each", "mean")


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
        backend: see the module.

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
        sums = QK_MEAN_HEADS["mse"].sums(averages, backend, averages.unsupported)
    else:
        sums = _weigh_heads(QK_ATTENTION_MSE.sums(problem, backend, problem.unsupported), head_weights)
    return reduce_attention(sums, reduction, query.shape[2], key.shape[2], counted_pairs)


def attention_mse(
    attn: Tensor,
    attn_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    heads: str = "each",
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Mean squared error between two sets of attention probabilities that already exist.

    For models whose attention cannot be recomputed from Q and K (DeBERTa, ...), and for distilling from stored maps.

    Args:
        attn: ``[B, H, L, S]`` probabilities, or ``[2B, H, L, S]`` with both views.
        attn_aug: ``[B, H, L, S]`` or None.
        attention_mask, attention_mask_aug, query_mask, query_mask_aug, heads, head_weights, reduction, backend: as for
            :func:`qk_attention_mse`; probabilities at padded keys count as zero.

    Returns:
        A scalar, or ``[B, H]`` for ``"none"`` (``[B]`` with ``heads="mean"``); float32 (float64 for float64 inputs).
    """
    check_reduction(reduction)
    check_choice("heads", heads, HEADS)
    problem, counted_pairs = maps_problem(
        attn,
        attn_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=query_mask,
        query_mask_aug=query_mask_aug,
        count_padded_queries=reduction == "padded_mean",
        heads=heads,
    )
    if heads == "mean":
        sums = ATTENTION_MSE.sums(problem.averaged(_weights_of_maps(problem, head_weights)), backend)[:, 0]
    else:
        sums = _weigh_heads(ATTENTION_MSE.sums(problem, backend), head_weights)
    return reduce_attention(sums, reduction, attn.shape[2], attn.shape[3], counted_pairs)


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
        _kl_name(direction),
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
    sums = _weigh_heads(QK_SCORES_MSE.sums(problem, backend, problem.unsupported), head_weights)
    counted_pairs = problem.shared_pairs() if reduction == "mean" else None
    return reduce_attention(sums, reduction, query.shape[2], key.shape[2], counted_pairs)


def qk_word_attention(
    query: Tensor,
    key: Tensor,
    query_aug: Tensor | None = None,
    key_aug: Tensor | None = None,
    *,
    word_ids: Tensor,
    words: int,
    divergence: str = "mse",
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_bias_aug: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    support: str = "all",
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """A comparison of the attention between words in two views, straight from Q and K.

    The attention of word i to word j is the mean over the pieces of i of the sum over the pieces of j, so a row still
    sums to 1. Words count where they would be tokens elsewhere: a row of a word that both views have, and columns of
    words that either has. The memory grows with L. :class:`ear_ops.AttentionPull` with ``alignment="word"`` uses this.

    Args:
        query, key, query_aug, key_aug: as for :func:`qk_attention_mse`, of a self-attention: S = L.
        word_ids: ``[2B, L]`` int64, the word of each token, x first; negative where a token has none. One number means
            one word in both views.
        words: W; every word id is less.
        divergence: ``"mse"``, ``"kl"``, ``"reverse_kl"`` or ``"js"``, as for :class:`ear_ops.AttentionPull`.
        attention_mask, attention_mask_aug, attn_bias, attn_bias_aug: as for :func:`qk_attention_mse`.
        scale, is_causal, window, softcap, head_weights, backend: as for :func:`qk_attention_mse`.
        support, reduction: as for :func:`attention_kl` (``"mse"``: :func:`attention_mse`) on maps of words;
            ``"padded_mean"`` is refused.

    Returns:
        A scalar, or ``[B, H]`` for ``"none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument does not fit, or KL is infinite; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run.
    """
    check_reduction(reduction)
    check_choice("divergence", divergence, QK_WORD_ATTENTION)
    check_choice("support", support, ("all",) if divergence == "mse" else ("all", "shared"))
    if reduction == "padded_mean":
        raise ValueError("reduction: 'padded_mean' counts padded tokens, which words do not have; use 'mean'")
    tokens, _ = attention_problem(
        query,
        key,
        query_aug,
        key_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=None,
        query_mask_aug=None,
        attn_bias=attn_bias,
        attn_bias_aug=attn_bias_aug,
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        count_padded_queries=False,
    )
    expected = [2 * tokens.pairs, query.shape[2]]
    if list(word_ids.shape) != expected or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"word_ids: expected {expected} to go with {query.shape[2]} queries and {key.shape[2]} keys of a "
            f"self-attention, got {list(word_ids.shape)}"
        )
    if word_ids.dtype != torch.int64:
        raise TypeError(f"word_ids: expected int64, got {word_ids.dtype}")
    words = max(words, 1)  # where no token has a word, one that no sequence has
    if tokens.key_mask is not None:
        word_ids = word_ids.masked_fill(~tokens.key_mask, -1)
    fields = tokens._asdict()
    problem = WordsProblem(
        **{name: fields[name] for name in WordsProblem._fields if name in fields}, word_ids=word_ids, words=words
    )
    has_word = count_pieces(word_ids, words) > 0
    masks = resolve_attention_masks(
        has_word,
        None,
        None,
        None,
        batch=problem.pairs,
        query_length=words,
        key_length=words,
        stacked=True,
        count_padded_queries=False,
    )
    operators = QK_WORD_ATTENTION if support == "all" else QK_WORD_ATTENTION_ON_SHARED_WORDS  # which have no "mse"
    sums = operators[divergence].sums(problem, backend, problem.unsupported)
    if divergence == "mse":
        return reduce_attention(_weigh_heads(sums, head_weights), reduction, words, words, masks.counted_pairs)
    sums = _weigh_heads(sums, head_weights)
    return _reduce_rows(sums, divergence, masks.counted_queries, reduction, words, of_maps=True)


def attention_kl(
    attn: Tensor,
    attn_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    direction: str = "forward",
    support: str = "all",
    heads: str = "each",
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Kullback-Leibler divergence between two sets of attention probabilities that already exist.

    The sum of ``T log(T / P) - T + P``, which is KL(T || P) where rows sum to 1, and never negative where they do not.
    A probability of exactly 0 has the gradient 0. Where P is 0 and T is not, KL is infinite:
    :func:`qk_attention_kl` takes logarithms from scores, so it stays finite where P underflows.

    Args:
        attn: ``[B, H, L, S]`` probabilities, or ``[2B, H, L, S]`` with both views.
        attn_aug: ``[B, H, L, S]``, the target, or None.
        attention_mask, attention_mask_aug, query_mask, query_mask_aug, heads, head_weights, backend: as for
            :func:`attention_mse`.
        direction, reduction: as for :func:`qk_attention_kl`.
        support: ``"all"``, or ``"shared"``: rows are renormalised over the keys at which both views are positive.

    Returns:
        A scalar, or ``[B, H]`` for ``"none"`` (``[B]`` with ``heads="mean"``); float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: as for :func:`qk_attention_kl`.
    """
    return _maps_divergence(
        _kl_name(direction),
        attn,
        attn_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=query_mask,
        query_mask_aug=query_mask_aug,
        support=support,
        heads=heads,
        head_weights=head_weights,
        reduction=reduction,
        backend=backend,
    )


def attention_js(
    attn: Tensor,
    attn_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    support: str = "all",
    heads: str = "each",
    head_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Jensen-Shannon divergence between two sets of attention probabilities that already exist.

    The equation is that of :func:`qk_attention_js`. Arguments, results and errors are as for :func:`attention_kl`,
    without ``direction``.
    """
    return _maps_divergence(
        "js",
        attn,
        attn_aug,
        attention_mask=attention_mask,
        attention_mask_aug=attention_mask_aug,
        query_mask=query_mask,
        query_mask_aug=query_mask_aug,
        support=support,
        heads=heads,
        head_weights=head_weights,
        reduction=reduction,
        backend=backend,
    )


def pooled_distance(
    hidden: Tensor,
    hidden_aug: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Squared distance between the mean-pooled hidden states of two views: ``sum (M(E) - M(E^a))^2``, reduced.

    M is the mean over real tokens. Its negative is Embedding-Push (Ding et al. 2022, eq. 1), itself the sentence pull
    (section 4.3).

    Args:
        hidden: ``[B, L, C]``, or ``[2B, L, C]`` with both views.
        hidden_aug: ``[B, L, C]`` or None.
        attention_mask, attention_mask_aug: ``[B, L]`` (``[2B, L]``) bool or integer, 1 = real. A sequence without any
            real token pools to the zero vector.
        reduction, backend: as for :func:`qk_attention_mse`.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 inputs).
    """
    check_reduction(reduction)
    problem = pooled_problem(hidden, hidden_aug, attention_mask=attention_mask, attention_mask_aug=attention_mask_aug)
    return reduce_pooled(POOLED_DISTANCE.sums(problem, backend), reduction, hidden.shape[2])


def robust_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """``CE(x) + CE(x^a)``, each the mean over its view (Ding et al. 2022, eq. 4).

    Args:
        logits: ``[2B, K]``, or ``[2B, L, K]`` for labels of tokens; rows 0..B-1 of x, the rest of x^a. The logits of a
            causal language model belong to the next token: pass ``logits[:, :-1]`` and ``labels[:, 1:]``.
        labels: int64 class indices ``[B]`` (``[B, L]``) that both views share, or ``[2B]`` (``[2B, L]``) with those of
            each view, x first; or class probabilities ``[B, K]``, ``[2B, K]`` (``[B, L, K]``, ``[2B, L, K]``). Class
            indices ``[2B]`` are the same in both views, but for rows that do not count.
        ignore_index: rows and tokens with this label do not count; a view in which none counts gives 0.

    Returns:
        A scalar in the dtype of ``logits``.

    Raises:
        ValueError: shapes do not fit. Or class indices ``[2B]`` say that x and x^a are of different classes, so the
            batch does not hold two views. Only indices on the CPU are checked, since looking at a GPU would wait for
            it; under ``torch.compile``, transforms of ``torch.func`` and with fake tensors none are.
    """
    if logits.dim() not in (2, 3) or logits.shape[0] % 2:
        raise ValueError(f"logits: expected [2B, K] or [2B, L, K] with both views, x first, got {list(logits.shape)}")
    shapes = [[rows, *logits.shape[1:-1]] for rows in (logits.shape[0] // 2, logits.shape[0])]
    if labels.is_floating_point():
        shapes = [[*shape, logits.shape[-1]] for shape in shapes]
    if list(labels.shape) not in shapes:
        kind = "class probabilities" if labels.is_floating_point() else "class indices"
        raise ValueError(
            f"labels: expected {kind} {shapes[0]} that both views share, or {shapes[1]}, to go with logits "
            f"{list(logits.shape)}, got {list(labels.shape)}"
        )
    if list(labels.shape) == shapes[0]:
        labels = repeat_labels(labels)
    elif not labels.is_floating_point():
        if logits.dim() == 2:
            check_labels_of_views("labels", labels, ignore_index)
        return sum(
            (_cross_entropy(*view, ignore_index) for view in zip(logits.chunk(2), labels.chunk(2), strict=True)),
            start=logits.new_zeros(()),
        )
    return 2.0 * _cross_entropy(logits, labels, ignore_index)


def repeat_labels(labels: Tensor) -> Tensor:
    """Labels ``[B, ...]`` for a batch ``[2B, ...]`` that holds both views, x first; each view gets all of them."""
    return torch.cat([labels, labels])


def check_labels_of_views(name: str, labels: Tensor, ignore_index: int) -> None:
    """Raises ValueError where class indices ``[2B]`` on the CPU are not those of pairs, x first."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or _has_no_values(labels):
        return
    first, second = labels.chunk(2)
    wrong = (first != second) & (first != ignore_index) & (second != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected one class for both views of a pair, got {int(first[row])} in row {row} and "
            f"{int(second[row])} in row {row + len(first)} of {len(labels)}: does the batch hold both views, rows "
            "0..B-1 of x and rows B..2B-1 of its augmentation? Classes that are meant to differ go in as probabilities"
        )


def _has_no_values(tensor: Tensor) -> bool:
    """Whether numbers cannot be read of ``tensor``: under a transform of torch.func, with fake tensors, in a trace."""
    return (
        torch._C._are_functorch_transforms_active()
        or detect_fake_mode((tensor,)) is not None
        or get_proxy_mode() is not None
    )


def _cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean over the counted rows of ``logits`` ``[N, K]`` or ``[N, L, K]``; 0 where none counts."""
    logits = logits.flatten(0, -2)
    if labels.is_floating_point():
        return F.cross_entropy(logits, labels.flatten(0, -2))
    labels = labels.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def _weigh_heads(sums: Tensor, head_weights: Tensor | None) -> Tensor:
    """``sums`` ``[B, H]`` times ``head_weights`` ``[H]``."""
    if head_weights is None:
        return sums
    if list(head_weights.shape) != [sums.shape[1]]:
        raise ValueError(
            f"head_weights: expected one number for each of the {sums.shape[1]} heads, got shape "
            f"{list(head_weights.shape)}"
        )
    weights = head_weights.to(sums.dtype)
    return sums.masked_fill((weights == 0) & torch.isinf(sums), 0.0) * weights


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
    one_scale = scale is not None
    if temperature != 1.0:  # as a scale of everything that the scores are made of, so that kernels need not know of it
        scale = (query.shape[-1] ** -0.5 if scale is None else scale) / temperature
        softcap = None if softcap is None else softcap / temperature
        attn_bias, attn_bias_aug = (
            None if bias is None else _cooled_bias(bias, temperature, compute_dtype(query.dtype))
            for bias in (attn_bias, attn_bias_aug)
        )
    problem, _ = attention_problem(
        query,
        *other_tensors,
        attn_bias=attn_bias,
        attn_bias_aug=attn_bias_aug,
        scale=scale,
        softcap=softcap,
        count_padded_queries=reduction == "padded_mean",
        heads=heads,
        **masks,
    )
    compared: AttentionProblem | MeanHeadsProblem = problem
    operator: ReferenceOperator = QK_DIVERGENCES[name]
    if heads == "mean":
        compared, operator = _averages(problem, head_weights, one_scale), QK_MEAN_HEADS[name]
    if support == "shared":
        compared = compared.on_shared_keys()
    sums = operator.sums(compared, backend, compared.unsupported)
    sums = sums if heads == "mean" else _weigh_heads(sums, head_weights)
    return _reduce_rows(sums, name, problem.counted_queries, reduction, query.shape[2])


def _maps_divergence(
    name: str,
    *views: Any,
    support: str,
    heads: str,
    head_weights: Tensor | None,
    reduction: str,
    backend: str | None,
    **masks: Any,
) -> Tensor:
    """The divergence called ``name`` of maps; ``masks`` as for :func:`attention_mse`."""
    check_reduction(reduction)
    check_divergence_options(support=support, heads=heads)
    problem, _ = maps_problem(*views, count_padded_queries=reduction == "padded_mean", heads=heads, **masks)
    operator = ATTENTION_DIVERGENCES[name]
    if heads == "mean":
        problem = problem.averaged(_weights_of_maps(problem, head_weights), support)
        sums = operator.sums(problem, backend)[:, 0]
    else:
        problem = problem.on_shared_keys() if support == "shared" else problem
        sums = _weigh_heads(operator.sums(problem, backend), head_weights)
    length = problem.attn.shape[2]
    return _reduce_rows(sums, name, problem.counted_queries, reduction, length, of_maps=True)


def _averages(problem: AttentionProblem, head_weights: Tensor | None, one_scale: bool) -> MeanHeadsProblem:
    """The problem of the averages over the heads; ``one_scale``: the user gave a scale, which both views have."""
    check_weights = _can_be_read(head_weights)
    return mean_heads_problem(problem, head_weights, one_scale=one_scale, check_weights=check_weights)


def _weights_of_maps(problem: MapsProblem, head_weights: Tensor | None) -> Tensor | None:
    """The weights ``[H]`` of the averages over the heads of maps."""
    second = problem.attn if problem.attn_aug is None else problem.attn_aug
    heads, heads_aug = problem.attn.shape[1], second.shape[1]
    return normalized_weights(head_weights, heads, heads_aug, problem.attn, _can_be_read(head_weights))


def _can_be_read(tensor: Tensor | None) -> bool:
    """Whether the numbers of ``tensor`` can be looked at without waiting for a device, and not in a trace."""
    return tensor is not None and tensor.is_cpu and not torch.compiler.is_compiling() and not _has_no_values(tensor)


def _reduce_rows(
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
    if _can_be_read(sums) and torch.isinf(sums).any():
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


def _cooled_bias(bias: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """``bias / temperature`` in ``dtype``; what is finite stays finite, since -inf masks."""
    if not bias.is_floating_point():
        return bias
    cooled, limits = bias.to(dtype) / temperature, torch.finfo(dtype)
    return torch.where(torch.isinf(bias), cooled, cooled.clamp(limits.min, limits.max))


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


def _kl_name(direction: str) -> str:
    check_divergence_options(direction=direction)
    return "kl" if direction == "forward" else "reverse_kl"
