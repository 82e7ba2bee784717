"""The operators that compare attention between words, straight from Q and K.

The attention of word i to word j is a mean over the pieces of i and a sum over the pieces of j: with P the attention
between tokens, ``M = A P B``. The views may split words into other numbers of pieces; M is ``[B, H, W, W]`` in both.

Neither P nor M is ever whole: the reference makes rows of M for blocks of words, and their rows of P for blocks of
tokens. So its memory grows with L.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ear_ops.ops.blocks import sum_over_blocks
from ear_ops.ops.divergences import DIVERGENCES, divergence_of_maps
from ear_ops.ops.maps import on_shared_keys, squared_difference_sums
from ear_ops.ops.masks import split_views
from ear_ops.ops.operator import Operator, ReferenceOperator
from ear_ops.ops.probabilities import attention_probabilities, compute_dtype


class WordsProblem(NamedTuple):
    """Queries, keys and words of two views, in one tensor (x first, ``query_aug`` and ``key_aug`` None) or in two."""

    query: Tensor  # [B, H, L, D], or [2B, H, L, D] with both views
    key: Tensor  # [B, H_kv, L, D], or [2B, H_kv, L, D]
    query_aug: Tensor | None  # [B, H, L, D]
    key_aug: Tensor | None  # [B, H_kv, L, D]
    key_mask: Tensor | None  # [2B, L] bool, the keys that are real in each view
    word_ids: Tensor  # [2B, L] int64, the word of each token, x first; negative where it has none, as padding
    attn_bias: Tensor | None  # [B, H, L, L] in the compute dtype, added to the scores; -inf masks
    attn_bias_aug: Tensor | None  # the same of the second view, None where both share one
    scale: float  # of the scores
    is_causal: bool  # the future is masked
    window: int  # keys less than this many positions away may be attended to; 0: all
    softcap: float | None  # c of c * tanh(scores / c), before the bias; kernels do not have it
    words: int  # W; every word id is less

    @property
    def pairs(self) -> int:
        """B, the number of pairs (x, x^a)."""
        return self.query.shape[0] // 2 if self.query_aug is None else self.query.shape[0]

    @property
    def unsupported(self) -> str | None:
        """Why no kernel can take this problem, None where they can."""
        return None if self.softcap is None else "softcap is computed by the reference only"

    def view(self, number: int) -> WordsOfView:
        """The first view (0) or the second (1)."""

        def of(both: Tensor, second: Tensor | None) -> Tensor:
            return split_views(both, second)[number]

        ids, order = of(self.word_ids, None).clamp(min=-1).sort(dim=1, stable=True)
        bounds = torch.arange(self.words + 1, device=ids.device).repeat(self.pairs, 1)
        return WordsOfView(
            query=of(self.query, self.query_aug),
            key=of(self.key, self.key_aug),
            key_mask=None if self.key_mask is None else of(self.key_mask, None),
            attn_bias=self.attn_bias_aug if number == 1 and self.attn_bias_aug is not None else self.attn_bias,
            word_ids=of(self.word_ids, None),
            order=order,
            first=torch.searchsorted(ids.contiguous(), bounds),
            options={"scale": self.scale, "softcap": self.softcap},
            is_causal=self.is_causal,
            window=self.window,
        )


def count_pieces(word_ids: Tensor, words: int) -> Tensor:
    """``[B, W]`` int64: into how many pieces each of the W = ``words`` words of a sequence splits.

    ``word_ids``: ``[B, L]`` int64, negative where a token has no word.
    """
    columns = word_ids.clamp(min=-1) + 1
    counts = columns.new_zeros(len(columns), words + 1)
    return counts.scatter_add_(1, columns, torch.ones_like(columns))[:, 1:]


class WordsOfView(NamedTuple):
    """One view, with its tokens in the order of their words."""

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, H_kv, L, D]
    key_mask: Tensor | None  # [B, L] bool
    attn_bias: Tensor | None  # [B, H, L, L]
    word_ids: Tensor  # [B, L]
    order: Tensor  # [B, L], the positions of the tokens, those of one word after the other
    first: Tensor  # [B, W + 1], where in `order` each word begins, and where the last one ends
    options: dict[str, Any]  # of the probabilities
    is_causal: bool
    window: int

    def rows(self, words: slice) -> Tensor:
        """M of some words: ``[B, H, words, W]``; rows and columns of words that a sequence lacks are zero."""
        (pairs, heads, length, _), count = self.query.shape, self.first.shape[1] - 1
        begin, end = self.first[:, words.start], self.first[:, words.stop]
        all_words = words.stop - words.start == count
        tokens = length if all_words else int((end - begin).max())  # all words: no need to ask the device
        pieces = self.first.diff().clamp(min=1)
        columns = self.word_ids.masked_fill(self.word_ids < 0, count)[:, None, None]  # [B, 1, 1, L]

        def of_tokens(block: slice) -> Tensor:
            place = begin[:, None] + torch.arange(block.start, block.stop, device=begin.device)  # [B, tokens] in order
            has_word = place < end[:, None]
            token = self.order.gather(1, place.clamp(max=length - 1))
            word = self.word_ids.gather(1, token).masked_fill(~has_word, 0)
            attn = self._probabilities(token, has_word) / pieces.gather(1, word)[:, None, :, None]  # [B, H, tokens, L]
            row = (word - words.start).masked_fill(~has_word, words.stop - words.start)[:, None, :, None]
            return _add_up(attn, row, 2, words.stop - words.start)

        of_words = sum_over_blocks(of_tokens, tokens, pairs * heads * length)  # [B, H, words, L]
        return _add_up(of_words, columns, 3, count)

    def _probabilities(self, token: Tensor, has_word: Tensor) -> Tensor:
        """P ``[B, H, tokens, L]`` of the tokens at these positions ``[B, tokens]``; zero where they have no word."""
        query = self.query.gather(2, token[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3]))
        bias = self.attn_bias
        if bias is not None:
            bias = bias.gather(2, token[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3]))
        if self.is_causal or self.window:
            distance = token[:, :, None] - torch.arange(self.key.shape[2], device=token.device)  # [B, tokens, L]
            allowed = distance >= 0 if self.is_causal else torch.ones_like(distance, dtype=torch.bool)
            allowed = (allowed & (distance.abs() < self.window) if self.window else allowed)[:, None]
            bias = allowed if bias is None else bias.masked_fill(~allowed, -math.inf)
        return attention_probabilities(query, self.key, self.key_mask, bias, has_word, **self.options)


def _add_up(tensor: Tensor, to: Tensor, dim: int, count: int) -> Tensor:
    """Sums of the slices of ``tensor`` along ``dim`` that go ``to`` each of ``count`` places; place ``count`` is lost.

    ``to``: int64, broadcastable to ``tensor``.
    """
    shape = [*tensor.shape[:dim], count + 1, *tensor.shape[dim + 1 :]]
    return tensor.new_zeros(shape).scatter_add(dim, to.expand(tensor.shape), tensor).narrow(dim, 0, count)


def reference(compare: Callable[[Tensor, Tensor], Tensor], problem: WordsProblem) -> Tensor:
    """``[B, H]`` sums of what ``compare`` makes of the rows of M of both views, over words that both views have.

    ``compare``: from two ``[B, H, words, W]`` to sums ``[B, H]``.
    """
    views = [problem.view(number) for number in range(2)]
    counted = functools.reduce(torch.logical_and, (view.first.diff() > 0 for view in views))  # [B, W]

    def sums_of(words: slice) -> Tensor:
        uncounted = ~counted[:, None, words, None]
        return compare(*(view.rows(words).masked_fill(uncounted, 0.0) for view in views))

    return sum_over_blocks(sums_of, problem.words, problem.pairs * problem.query.shape[1] * problem.words)


def _on_shared_words(name: str, attn: Tensor, attn_aug: Tensor) -> Tensor:
    return divergence_of_maps(name, *on_shared_keys(attn, attn_aug))


ROW_STATS = 4  # of a query: maximum and 1 / sum of exponentials, each of both views


def _fake(problem: WordsProblem) -> tuple[Tensor, Tensor]:
    pairs, (_, heads, length, _) = problem.pairs, problem.query.shape
    dtype = compute_dtype(problem.query.dtype)
    sums = problem.query.new_empty((pairs, heads), dtype=dtype)
    return sums, problem.query.new_empty((ROW_STATS, pairs, heads, length), dtype=dtype)


def _operator(name: str, compare: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return Operator(
        f"qk_word_attention_{name}",
        WordsProblem,
        reference=functools.partial(reference, compare),
        fake=_fake,
        saved=("row_stats",),
        differentiable=4,
    )


QK_WORD_ATTENTION = {
    "mse": _operator("mse", squared_difference_sums),
    **{name: _operator(name, functools.partial(divergence_of_maps, name)) for name in DIVERGENCES},
}
QK_WORD_ATTENTION_ON_SHARED_WORDS = {
    name: ReferenceOperator(
        f"qk_word_attention_{name}", functools.partial(reference, functools.partial(_on_shared_words, name))
    )
    for name in DIVERGENCES
}
