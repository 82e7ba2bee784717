"""Attention between words, compared straight from queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ear_ops.arguments import check_choice, check_tensor
from ear_ops.functional.options import reduce_rows, weigh_heads
from ear_ops.functional.values import can_be_read
from ear_ops.ops.masks import resolve_attention_masks
from ear_ops.ops.problem import attention_problem
from ear_ops.ops.qk_words import QK_WORD_ATTENTION, QK_WORD_ATTENTION_ON_SHARED_WORDS, WordsProblem, count_pieces
from ear_ops.ops.reductions import check_reduction, reduce_attention


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

    The attention of word i to word j is a sum over the pieces of j and a mean over the pieces of i. So a row still sums
    to 1. A row counts where both views have its word, a column where either has. The memory grows with L.
    :class:`ear_ops.AttentionPull` with ``alignment="word"`` uses this.

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
    check_tensor("word_ids", word_ids, "pass torch.tensor(word_ids), with -1 where a token has no word")
    expected = [2 * tokens.pairs, query.shape[2]]
    if list(word_ids.shape) != expected or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"word_ids: expected {expected} to go with {query.shape[2]} queries and {key.shape[2]} keys of a "
            f"self-attention, got {list(word_ids.shape)}"
        )
    if word_ids.dtype != torch.int64:
        raise TypeError(f"word_ids: expected int64, got {word_ids.dtype}")
    if word_ids.device != query.device:
        raise ValueError(f"word_ids: expected a tensor on {query.device}, as query is, got one on {word_ids.device}")
    if not isinstance(words, int) or isinstance(words, bool):
        raise TypeError(f"words: expected an integer, got {words!r}")
    if can_be_read(word_ids) and word_ids.numel() and word_ids.max() >= max(words, 1):
        raise ValueError(f"words: expected more than the largest word id, {int(word_ids.max())}, got {words}")
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
        device=query.device,
        count_padded_queries=False,
    )
    operators = QK_WORD_ATTENTION if support == "all" else QK_WORD_ATTENTION_ON_SHARED_WORDS  # which have no "mse"
    sums = operators[divergence].sums(problem, backend)
    if divergence == "mse":
        return reduce_attention(weigh_heads(sums, head_weights), reduction, words, words, masks.counted_pairs)
    sums = weigh_heads(sums, head_weights)
    return reduce_rows(sums, divergence, masks.counted_queries, reduction, words, of_maps=True)
