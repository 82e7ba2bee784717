"""Attention between words in place of attention between tokens (pieces of words).

A synonym may split into another number of pieces than its original. From there on, position i of the two views is not
the same word. The attention of word i to word j is a sum over the pieces of j and a mean over the pieces of i, so a row
still sums to 1 (Clark et al. 2019, "What Does BERT Look At?", section 4.1).

This is composed of torch operations. Unlike the losses on tokens, it materialises the maps ``[B, H, L, L]`` of both
views, and it reads the number of words from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ear_ops import functional
from ear_ops.capture.readings import AttentionInputs, AttentionMaps

WordIds = Tensor | tuple[Tensor, Tensor]
"""The word of each token from 0, -1 where it has none (padding): int64 ``[2B, L]`` of both views, x first; a pair of
``[B, L]`` and ``[B, L']``; or, with a teacher, the ``[B, L]`` of its batch. One number means one word in both views."""


def word_attention_mse(
    reading: AttentionInputs | AttentionMaps,
    reading_aug: AttentionInputs | AttentionMaps | None,
    word_ids: WordIds,
    *,
    head_weights: Tensor | None,
    reduction: str,
    what: str,
) -> Tensor:
    """Mean squared error between the attention of the words of two views; the reductions count words, not tokens.

    Args:
        reading, reading_aug: both views in one ``[2B, ...]`` (``reading_aug`` None), or one each; lengths may differ.
        head_weights, reduction: as for :func:`ear_ops.attention_mse`.
        what: names the regulariser in errors.
    """
    if reading_aug is None:
        joined = word_ids if isinstance(word_ids, Tensor) else torch.cat(word_ids)
        words = int(joined.max()) + 1
        maps, present = _word_attention(reading, joined, words, what)
        maps_aug = present_aug = None
    else:
        ids, ids_aug = word_ids.chunk(2) if isinstance(word_ids, Tensor) else word_ids
        words = int(torch.stack([ids.max(), ids_aug.max()]).max()) + 1
        maps, present = _word_attention(reading, ids, words, what)
        maps_aug, present_aug = _word_attention(reading_aug, ids_aug, words, what)
    return functional.attention_mse(
        maps,
        maps_aug,
        attention_mask=present,
        attention_mask_aug=present_aug,
        head_weights=head_weights,
        reduction=reduction,
    )


def _word_attention(
    reading: AttentionInputs | AttentionMaps, word_ids: Tensor, words: int, what: str
) -> tuple[Tensor, Tensor]:
    """The maps ``[B, H, W, W]`` of W = ``words`` words, and ``[B, W]`` bool: which words a sequence has.

    Rows and columns of words that a sequence lacks are zero. ``word_ids``: ``[B, L]``.
    """
    rows, _, queries, keys = reading.shape
    if list(word_ids.shape) != [rows, queries] or keys != queries:
        raise ValueError(
            f"{what}: expected word_ids {[rows, queries]} to go with {queries} queries and {keys} keys of a "
            f"self-attention, got {list(word_ids.shape)}"
        )
    word_ids = word_ids.to(reading[0].device)
    if reading.attention_mask is not None:
        word_ids = word_ids.masked_fill(~reading.attention_mask, -1)
    probabilities = reading.probabilities(word_ids >= 0)  # [B, H, L, L]
    member = word_ids[:, None, :] == torch.arange(words, device=word_ids.device)[:, None]  # [B, W, L]
    sums = member.to(probabilities.dtype)
    pieces = sums.sum(-1, keepdim=True)  # [B, W, 1]
    means = sums / pieces.clamp(min=1)
    return means[:, None] @ probabilities @ sums[:, None].transpose(-1, -2), pieces[:, :, 0] > 0
