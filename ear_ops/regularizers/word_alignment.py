"""Attention between words in place of attention between tokens (pieces of words).

A synonym may split into another number of pieces than its original, and then position i of the two views is not the
same word from there on. The attention of word i to word j is what its pieces give to all pieces of j: a sum over the
pieces of j, and a mean over those of i, so that a row still sums to 1 (as in Clark et al. 2019, "What Does BERT Look
At?", section 4.1).

Composed of torch operations: the maps ``[B, H, L, L]`` of both views are materialised, unlike in the losses on tokens,
and the number of words is read from the device.
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
    view: AttentionInputs | AttentionMaps,
    view_aug: AttentionInputs | AttentionMaps | None,
    word_ids: WordIds,
    *,
    head_weights: Tensor | None,
    reduction: str,
    what: str,
) -> Tensor:
    """Mean squared error between the attention of the words of two views; the reductions count words, not tokens.

    Args:
        view, view_aug: both views in one ``[2B, ...]`` (``view_aug`` None), or one each; lengths may differ.
        head_weights, reduction: as for :func:`ear_ops.attention_mse`.
        what: names the regulariser in errors.
    """
    if view_aug is None:
        joined = word_ids if isinstance(word_ids, Tensor) else torch.cat(word_ids)
        words = int(joined.max()) + 1
        maps, present = _word_attention(view, joined, words, what)
        maps_aug = present_aug = None
    else:
        ids, ids_aug = word_ids.chunk(2) if isinstance(word_ids, Tensor) else word_ids
        words = int(torch.stack([ids.max(), ids_aug.max()]).max()) + 1
        maps, present = _word_attention(view, ids, words, what)
        maps_aug, present_aug = _word_attention(view_aug, ids_aug, words, what)
    return functional.attention_mse(
        maps,
        maps_aug,
        attention_mask=present,
        attention_mask_aug=present_aug,
        head_weights=head_weights,
        reduction=reduction,
    )


def _word_attention(
    view: AttentionInputs | AttentionMaps, word_ids: Tensor, words: int, what: str
) -> tuple[Tensor, Tensor]:
    """``[B, H, W, W]`` of W = ``words`` words, rows and columns of words that are not there zero; and ``[B, W]`` bool,
    which are there. ``word_ids``: ``[B, L]``."""
    rows, _, queries, keys = view.shape
    if list(word_ids.shape) != [rows, queries] or keys != queries:
        raise ValueError(
            f"{what}: expected word_ids {[rows, queries]} to go with {queries} queries and {keys} keys of a "
            f"self-attention, got {list(word_ids.shape)}"
        )
    word_ids = word_ids.to(view[0].device)
    if view.attention_mask is not None:
        word_ids = word_ids.masked_fill(~view.attention_mask, -1)
    probabilities = view.probabilities(word_ids >= 0)  # [B, H, L, L]
    member = word_ids[:, None, :] == torch.arange(words, device=word_ids.device)[:, None]  # [B, W, L]
    sums = member.to(probabilities.dtype)
    pieces = sums.sum(-1, keepdim=True)  # [B, W, 1]
    means = sums / pieces.clamp(min=1)
    return means[:, None] @ probabilities @ sums[:, None].transpose(-1, -2), pieces[:, :, 0] > 0
