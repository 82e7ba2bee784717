"""Attention between words in place of attention between tokens (pieces of words).

A synonym may split into another number of pieces than its original. From there on, position i of the two views is not
the same word. The attention of word i to word j is a sum over the pieces of j and a mean over the pieces of i, so a row
still sums to 1 (Clark et al. 2019, "What Does BERT Look At?", section 4.1).

Where both views have queries and keys, this runs straight from them, and its memory grows with L. Otherwise torch
operations hold matrices ``[B, H, L, L]``: for modules that give their matrices alone (DeBERTa), for views that attend
differently (one of them causally, say), and with ``heads="mean"``. Both ways read the number of words from the device.

Where words are what stands between spaces, a Chinese or Thai sentence is one word. Its attention to itself is 1 in both
views, so the loss would be near 0 whatever the model does. A pair in which both views are so is refused. That is a view
in which three quarters of the tokens (:data:`_MOST`) belong to at most two words, and one of these words has 8 pieces
or more (:data:`_MANY_PIECES`). A word of English has fewer. The other tokens are special ones, each a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_ops import functional
from ear_ops.capture.readings import AttentionInputs, AttentionMaps, align_attention, attend_alike
from ear_ops.ops.qk_words import count_pieces

WordIds = Tensor | tuple[Tensor, Tensor]
"""The word of each token from 0, -1 where it has none (padding): int64 ``[2B, L]`` of both views, x first; a pair of
``[B, L]`` and ``[B, L']``; or, with a teacher, the ``[B, L]`` of its batch. One number means one word in both views."""


def compare_words(
    reading: AttentionInputs | AttentionMaps,
    reading_aug: AttentionInputs | AttentionMaps | None,
    word_ids: WordIds,
    divergence: str,
    of_maps: Callable[..., Tensor],
    *,
    what: str,
    **options: Any,
) -> Tensor:
    """A comparison of the attention of the words of two views, straight from queries and keys where both have them.

    Args:
        reading, reading_aug, word_ids, what: as for :func:`word_attention`.
        divergence: names the comparison for :func:`ear_ops.functional.qk_word_attention`.
        of_maps: the same comparison of maps.
        options: what both take beyond maps, queries, keys and masks.
    """
    if isinstance(reading, AttentionInputs) and options.get("heads") != "mean":
        if reading_aug is None:
            return _qk_word_attention(reading, None, word_ids, divergence, what, options)
        if isinstance(reading_aug, AttentionInputs) and attend_alike(reading, reading_aug):
            return _qk_word_attention(reading, reading_aug, word_ids, divergence, what, options)
    return word_attention(reading, reading_aug, word_ids, of_maps, what=what, **options)


def _qk_word_attention(
    reading: AttentionInputs,
    reading_aug: AttentionInputs | None,
    word_ids: WordIds,
    divergence: str,
    what: str,
    options: dict[str, Any],
) -> Tensor:
    if reading_aug is None:
        ids = _ids_of(reading, _of_one_forward(word_ids, what), what)
        arguments = reading._asdict()
    else:
        reading, reading_aug = align_attention(reading, reading_aug, what)
        length = max(reading.shape[2], reading_aug.shape[2])
        pair = word_ids.chunk(2) if isinstance(word_ids, Tensor) else word_ids
        views = (reading, reading_aug)
        ids = torch.cat(
            [
                F.pad(_ids_of(view, of_view, what), (0, length - view.shape[2]), value=-1)
                for view, of_view in zip(views, pair, strict=True)
            ]
        )
        padded = [view.padded(length) for view in views] if views[0].shape[2] != views[1].shape[2] else views
        arguments = padded[0]._asdict()
        for name in ("query", "key", "attention_mask", "attn_bias"):
            arguments[f"{name}_aug"] = getattr(padded[1], name)
    del arguments["query_mask"]
    words = int(ids.max()) + 1
    pieces, pieces_aug = count_pieces(ids, words).chunk(2)
    _refuse_unspaced(pieces, pieces_aug, what)
    return functional.qk_word_attention(**arguments, word_ids=ids, words=words, divergence=divergence, **options)


def word_attention(
    reading: AttentionInputs | AttentionMaps,
    reading_aug: AttentionInputs | AttentionMaps | None,
    word_ids: WordIds,
    compare: Callable[..., Tensor],
    *,
    what: str,
    **options: Any,
) -> Tensor:
    """A comparison of the attention of the words of two views, whose matrices it holds.

    The reductions count words, not tokens.

    Args:
        reading, reading_aug: both views in one ``[2B, ...]`` (``reading_aug`` None), or one each; lengths may differ.
        compare: the comparison of maps, such as :func:`ear_ops.attention_mse`.
        options: what it takes beyond maps and masks.
        what: names the regulariser in errors.
    """
    if reading_aug is None:
        joined = _of_one_forward(word_ids, what)
        words = int(joined.max()) + 1
        maps, pieces = _word_attention(reading, joined, words, what)
        maps_aug = pieces_aug = None
        first, second = pieces.chunk(2)
        _refuse_unspaced(first, second, what)
    else:
        ids, ids_aug = word_ids.chunk(2) if isinstance(word_ids, Tensor) else word_ids
        words = int(torch.stack([ids.max(), ids_aug.max()]).max()) + 1
        maps, pieces = _word_attention(reading, ids, words, what)
        maps_aug, pieces_aug = _word_attention(reading_aug, ids_aug, words, what)
        _refuse_unspaced(pieces, pieces_aug, what)
    return compare(
        maps,
        maps_aug,
        attention_mask=pieces > 0,
        attention_mask_aug=None if pieces_aug is None else pieces_aug > 0,
        **options,
    )


_MANY_PIECES = 8
_MOST = 0.75


def _refuse_unspaced(pieces: Tensor, pieces_aug: Tensor, what: str) -> None:
    """Raises where a pair is a text without spaces in both views; ``pieces``: ``[B, W]`` of each."""
    unspaced = _is_unspaced(pieces) & _is_unspaced(pieces_aug).to(pieces.device)
    if bool(unspaced.any()):
        raise ValueError(
            f"{what}: expected word_ids with several words in a text, got only one or two of many pieces in both views "
            f"of {int(unspaced.sum())} of {len(unspaced)} pairs (the first is pair {int(unspaced.nonzero()[0])}). A "
            f"text without spaces, as in Chinese, Japanese or Thai, is one word, and comparing it with itself teaches "
            f'nothing; use alignment="token", or make word_ids with a word segmenter'
        )


def _is_unspaced(pieces: Tensor) -> Tensor:
    """``[B]`` bool: the sequences whose words are one or two texts without spaces; ``pieces``: ``[B, W]``."""
    split = pieces * (pieces > 1)
    most = split.sum(1) >= _MOST * pieces.sum(1)
    return most & ((split > 0).sum(1) <= 2) & (split >= _MANY_PIECES).any(1)


def _word_attention(
    reading: AttentionInputs | AttentionMaps, word_ids: Tensor, words: int, what: str
) -> tuple[Tensor, Tensor]:
    """The maps ``[B, H, W, W]`` of W = ``words`` words, and ``[B, W]``: how many pieces each has in a sequence.

    Rows and columns of words that a sequence lacks are zero. ``word_ids``: ``[B, L]``.
    """
    word_ids = _ids_of(reading, word_ids, what)
    probabilities = reading.probabilities(word_ids >= 0)  # [B, H, L, L]
    member = word_ids[:, None, :] == torch.arange(words, device=word_ids.device)[:, None]  # [B, W, L]
    sums = member.to(probabilities.dtype)
    pieces = sums.sum(-1, keepdim=True)  # [B, W, 1]
    means = sums / pieces.clamp(min=1)
    return means[:, None] @ probabilities @ sums[:, None].transpose(-1, -2), pieces[:, :, 0]


def _of_one_forward(word_ids: WordIds, what: str) -> Tensor:
    """``word_ids`` ``[2B, L]`` of the two views of one forward."""
    if isinstance(word_ids, Tensor):
        return word_ids
    if word_ids[0].shape[1:] != word_ids[1].shape[1:]:
        shapes = " and ".join(str(list(of_view.shape)) for of_view in word_ids)
        raise ValueError(f"{what}: expected word_ids of one length for both views of one forward, got {shapes}")
    return torch.cat(word_ids)


def _ids_of(reading: AttentionInputs | AttentionMaps, word_ids: Tensor, what: str) -> Tensor:
    """``word_ids`` ``[B, L]`` int64 of a reading, on its device; -1 also where a token is padding."""
    rows, _, queries, keys = reading.shape
    if list(word_ids.shape) != [rows, queries] or keys != queries:
        raise ValueError(
            f"{what}: expected word_ids {[rows, queries]} to go with {queries} queries and {keys} keys of a "
            f"self-attention, got {list(word_ids.shape)}"
        )
    word_ids = word_ids.to(reading[0].device, torch.int64)
    return word_ids if reading.attention_mask is None else word_ids.masked_fill(~reading.attention_mask, -1)
