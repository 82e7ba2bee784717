"""Make batches of sentence pairs: both views are padded together, and the originals come first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ear_ops.data.views import PairItem
from ear_ops.data.words import count_words, pair_word_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDINGS = ("longest", "max_length")


class PairCollator:
    """Turns B items into one batch of 2B rows: rows 0..B-1 are x, rows B..2B-1 are x^a.

    The losses compare the views of a pair position by position, so all rows have the same length L. Items without an
    `augmented` view give B rows.

    Args:
        tokenizer: encodes a sentence pair as the model expects it.
        max_length: the largest number of tokens in a row, with the special tokens. A longer row loses pieces of its
            longer text first.
        padding: `"longest"` sets L to the length of the longest row, `"max_length"` sets it to `max_length`.
        word_ids: whether batches say which word each piece belongs to. `AttentionPull(alignment="word")` needs this.
            The tokenizer must be a fast one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 128,
        padding: str = "longest",
        *,
        word_ids: bool = False,
    ) -> None:
        if padding not in PADDINGS:
            raise ValueError(f"unknown padding {padding!r}: expected one of {', '.join(PADDINGS)}")
        special = tokenizer.num_special_tokens_to_add(pair=True)
        if not special < max_length <= tokenizer.model_max_length:
            raise ValueError(
                f"max_length: expected more than the {special} special tokens of a row and at most the tokenizer's "
                f"model_max_length of {tokenizer.model_max_length}, got {max_length}"
            )
        if word_ids and not tokenizer.is_fast:
            raise ValueError(
                "word_ids: expected a fast tokenizer, because a slow one does not say where its pieces are in the text"
            )
        self.tokenizer = tokenizer
        self.word_ids = word_ids
        self.max_length = max_length
        self.padding = padding

    def __call__(self, items: Sequence[PairItem]) -> dict[str, torch.Tensor]:
        """Encode a batch.

        Args:
            items: B items, at least one. Either all of them have an `augmented` view or none has.

        Returns:
            int64 tensors: `input_ids` [2B, L], `attention_mask` [2B, L] (1 = real), `labels` [B], and two that not
            every batch has. `token_type_ids` [2B, L] depend on the tokenizer, `word_ids` [2B, L] on the argument
            `word_ids`. Without augmented views, every [2B, L] is [B, L].

        Raises:
            ValueError: there are no items, or only some items have an `augmented` view. With `word_ids`, also where
                the two views of an item differ in their number of words.
        """
        if not items:
            raise ValueError("items: expected at least one, got none")
        texts = [item["original"] for item in items]
        augmented = [item["augmented"] for item in items if "augmented" in item]
        if len(augmented) not in (0, len(items)):
            raise ValueError(
                f"items: expected an 'augmented' view in all or in none, got it in {len(augmented)} of {len(items)}"
            )
        if self.word_ids:
            _check_word_counts(texts, augmented)
        texts += augmented
        encoded = self.tokenizer(
            [text1 for text1, _ in texts],
            [text2 for _, text2 in texts],
            padding=self.padding,
            truncation="longest_first",
            max_length=self.max_length,
            return_attention_mask=True,
            return_offsets_mapping=self.word_ids,
            return_tensors="pt",
        )
        batch: dict[str, torch.Tensor] = dict(encoded)
        if self.word_ids:
            del batch["offset_mapping"]
            batch["word_ids"] = pair_word_ids(encoded, texts)
        batch["labels"] = torch.tensor([item["label"] for item in items], dtype=torch.int64)
        return batch


def _check_word_counts(originals: Sequence[tuple[str, str]], augmented: Sequence[tuple[str, str]]) -> None:
    """Raise where a text has more or fewer words in one view: word k of x is compared with word k of x^a."""
    for number, views in enumerate(zip(originals, augmented, strict=False)):
        for text, text_aug in zip(*views, strict=True):
            count, count_aug = count_words(text), count_words(text_aug)
            if count != count_aug:
                raise ValueError(
                    f"items: with word_ids both views must have as many words, but item {number} has {count} "
                    f"in {text!r} and {count_aug} in {text_aug!r}: replace words one by one, or leave out word_ids"
                )
