"""Number the words of a sentence pair, and say which word each piece belongs to.

A word is a run of characters other than a space, because the augmentation replaces such words one by one. The
tokenizer also has words, but it splits them at punctuation: a hyphen in a synonym would shift all later numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BatchEncoding


def pair_word_ids(encoded: BatchEncoding, texts: Sequence[tuple[str, str]]) -> torch.Tensor:
    """Return the word ids of a batch of encoded sentence pairs.

    Let S be the largest number of words of a text in the batch. The words of the first text are numbered from 0, those
    of the second from S, and special tokens from 2S. Padding has -1. So a number means the same word in both views,
    even where truncation has cut a view.

    Args:
        encoded: what a fast tokenizer returned, with `offset_mapping` and `attention_mask`.
        texts: the two texts of each row. Both views of a pair must have the same number of words.

    Returns:
        [rows, L] int64.
    """
    ends = [[_word_ends(text) for text in pair] for pair in texts]
    size = max(1, *(len(word_ends) for row_ends in ends for word_ends in row_ends))
    ids = torch.full(tuple(encoded["attention_mask"].shape), -1, dtype=torch.int64)
    for row, row_ends in enumerate(ends):
        offsets, real = encoded["offset_mapping"][row].tolist(), encoded["attention_mask"][row].tolist()
        specials = 0
        for position, sequence in enumerate(encoded.sequence_ids(row)):
            if sequence is not None:
                start = offsets[position][0]
                word = bisect_right(row_ends[sequence], start)  # how many words end before the piece starts
                ids[row, position] = sequence * size + min(word, max(len(row_ends[sequence]) - 1, 0))
            elif real[position]:
                ids[row, position] = 2 * size + specials
                specials += 1
    return ids


def count_words(text: str) -> int:
    """Return how many words a text has."""
    return len(_word_ends(text))


def _word_ends(text: str) -> list[int]:
    """Return the index after the last character of each word."""
    return [i + 1 for i, character in enumerate(text) if character != " " and text[i + 1 : i + 2] in ("", " ")]
