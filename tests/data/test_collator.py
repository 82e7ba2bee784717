from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from ear_ops.data.collator import PairCollator
from ear_ops.data.pairs import PairExample
from ear_ops.data.views import PairViews

VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghij"])}
BOS, EOS, PAD = 1, 2, 0


def tokenizer(*, token_types: bool = False, padding_side: str = "right") -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if token_types else [])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=32,
        model_input_names=names,
        padding_side=padding_side,
    )


def encoded(text1: str, text2: str) -> list[int]:
    return [BOS, *(VOCABULARY[w] for w in text1.split()), EOS, *(VOCABULARY[w] for w in text2.split()), EOS]


ITEMS = [
    {"original": ("a b", "c"), "augmented": ("a d", "c"), "label": 2},
    {"original": ("e", "f"), "augmented": ("e g h i", "f"), "label": 0},
    {"original": ("j", "a b c"), "augmented": ("j", "a"), "label": 1},
]


def real_tokens(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_originals_come_first_then_augmentations_in_the_same_order() -> None:
    batch = PairCollator(tokenizer(), max_length=32)(ITEMS)
    assert real_tokens(batch) == [
        encoded(*texts) for texts in [item["original"] for item in ITEMS] + [item["augmented"] for item in ITEMS]
    ]
    assert batch["labels"].tolist() == [2, 0, 1]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_both_views_are_padded_to_the_longest_row_of_either() -> None:
    batch = PairCollator(tokenizer(), max_length=32)(ITEMS)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (6, len(encoded("e g h i", "f")))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
    assert batch["attention_mask"].sum(1).min() < batch["input_ids"].shape[1]


def test_fixed_length() -> None:
    batch = PairCollator(tokenizer(), max_length=20, padding="max_length")(ITEMS)
    assert batch["input_ids"].shape == (6, 20)
    assert real_tokens(batch) == real_tokens(PairCollator(tokenizer(), max_length=32)(ITEMS))


def test_long_pairs_lose_the_end_of_their_longer_text() -> None:
    items = [{"original": ("a b c d e f g", "h i"), "augmented": ("a", "b"), "label": 0}]
    for padding in ("longest", "max_length"):
        batch = PairCollator(tokenizer(), max_length=8, padding=padding)(items)
        assert batch["input_ids"].shape == (2, 8)
        assert real_tokens(batch) == [encoded("a b c", "h i"), encoded("a", "b")]


def test_token_types_where_the_tokenizer_has_them() -> None:
    batch = PairCollator(tokenizer(token_types=True), max_length=32)(ITEMS)
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def test_padding_side_is_the_tokenizers() -> None:
    batch = PairCollator(tokenizer(padding_side="left"), max_length=32)(ITEMS)
    assert batch["attention_mask"][:, -1].all()
    assert real_tokens(batch) == real_tokens(PairCollator(tokenizer(), max_length=32)(ITEMS))


def test_without_augmented_views_there_are_b_rows() -> None:
    loader = DataLoader(
        PairViews([PairExample("a b", "c", 2), PairExample("d", "e", 1)]),
        batch_size=2,
        collate_fn=PairCollator(tokenizer(), max_length=32),
    )
    (batch,) = loader
    assert real_tokens(batch) == [encoded("a b", "c"), encoded("d", "e")]
    assert batch["labels"].tolist() == [2, 1]


def test_bad_input_is_an_error_that_names_it() -> None:
    collate = PairCollator(tokenizer(), max_length=32)
    with pytest.raises(ValueError, match="'augmented' view in all or in none, got it in 2 of 3"):
        collate([*ITEMS[:2], {"original": ("a", "b"), "label": 0}])
    with pytest.raises(ValueError, match="items: expected at least one"):
        collate([])
    with pytest.raises(ValueError, match="unknown padding 'left': expected one of longest, max_length"):
        PairCollator(tokenizer(), padding="left")
    for max_length in (0, 3, 33):
        with pytest.raises(
            ValueError, match=f"max_length: expected more than the 3 .* at most .* 32, got {max_length}"
        ):
            PairCollator(tokenizer(), max_length=max_length)
