"""Which word each piece of a pair of texts belongs to, so that words of two views can be compared.

Words are what the augmentation replaces one by one: runs of characters other than a space. (The tokenizer's own words
are not used: they split at punctuation, so that a hyphen in a synonym would shift all words behind it.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BatchEncoding


def pair_word_ids(encoded: BatchEncoding, texts: Sequence[tuple[str, str]]) -> torch.Tensor:
    """Word ids of a batch of encoded pairs.

    Args:
        encoded: of a fast tokenizer, with `offset_mapping` and `attention_mask`.
        texts: the pairs of its rows, both views of a pair with the same number of words.

    Returns:
        [rows, L] int64: words of the first text count from 0, those of the second from S, special pieces from 2S,
        where S is the largest number of words of a text in the batch; -1 is padding. So one number is one word in
        both views, also where a view was cut.
    """
    ends = [[_word_ends(text) for text in pair] for pair in texts]
    size = max(1, *(len(of_text) for of_pair in ends for of_text in of_pair))
    ids = torch.full(tuple(encoded["attention_mask"].shape), -1, dtype=torch.int64)
    for row, of_pair in enumerate(ends):
        offsets, real = encoded["offset_mapping"][row].tolist(), encoded["attention_mask"][row].tolist()
        specials = 0
        for position, sequence in enumerate(encoded.sequence_ids(row)):
            if sequence is not None:
                word = bisect_right(of_pair[sequence], offsets[position][0])  # how many end before the piece begins
                ids[row, position] = sequence * size + min(word, max(len(of_pair[sequence]) - 1, 0))
            elif real[position]:
                ids[row, position] = 2 * size + specials
                specials += 1
    return ids


def count_words(text: str) -> int:
    """How many words the ids of a text count."""
    return len(_word_ends(text))


def _word_ends(text: str) -> list[int]:
    """Where each word ends: the index after its last character."""
    return [i + 1 for i, character in enumerate(text) if character != " " and text[i + 1 : i + 2] in ("", " ")]
