"""Test the word ids of encoded sentence pairs."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ear_ops.data import PairCollator

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "big", "cat", "##s", "##ty", "sat", "-", "mat", "room", "##y"]


def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return wrap(tokenizer)


def sentence_piece() -> PreTrainedTokenizerFast:
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "▁",
        "▁a",
        "▁big",
        "▁cat",
        "s",
        "ty",
        "▁sat",
        "-",
        "mat",
        "▁room",
        "y",
    ]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return wrap(tokenizer)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=32,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def collate(tokenizer, original, augmented, **options):
    collator = PairCollator(tokenizer, **{"max_length": 16, "word_ids": True, **options})
    batch = collator([{"original": original, "augmented": augmented, "label": 0}])
    pieces = [tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"]]
    return pieces, batch["word_ids"].tolist()


@pytest.mark.parametrize("make", [word_piece, sentence_piece])
def test_pieces_of_one_word_have_one_number_in_both_views(make) -> None:
    """A synonym with two pieces and a synonym with a hyphen, which the words of BERT would split, keep the numbers."""
    pieces, ids = collate(make(), ("a big cat", "cats sat"), ("a roomy cat-mat", "cats sat"))
    assert [piece.strip("#▁") for piece in pieces[1]] == (
        ["[CLS]", "a", "room", "y", "cat", "-", "mat", "[SEP]", "cat", "s", "sat", "[SEP]"]
    )
    # The longer text has 3 words: the second text starts at 3, the special tokens start at 6.
    assert ids[1] == [6, 0, 1, 1, 2, 2, 2, 7, 3, 3, 4, 8]
    assert ids[0] == [6, 0, 1, 2, 7, 3, 3, 4, 8, -1, -1, -1]


@pytest.mark.parametrize("make", [word_piece, sentence_piece])
def test_spaces_do_not_count_as_words(make) -> None:
    pieces, ids = collate(make(), ("  a  big ", "cat "), ("a big", "cat"))
    by_word = {}
    for piece, word in zip(pieces[0], ids[0], strict=True):
        by_word.setdefault(word, []).append(piece.strip("▁"))
    assert {word: "".join(parts) for word, parts in by_word.items() if 0 <= word < 4} == {0: "a", 1: "big", 2: "cat"}


def test_a_cut_word_is_missing_and_the_others_keep_their_numbers() -> None:
    _, ids = collate(word_piece(), ("a big cat", "sat"), ("a roomy cats", "sat"), max_length=8)
    assert ids[0] == [6, 0, 1, 2, 7, 3, 8, -1] and ids[1] == [6, 0, 1, 1, 2, 7, 3, 8]


def test_word_ids_are_asked_for_and_need_offsets() -> None:
    batch = PairCollator(word_piece(), max_length=16)([{"original": ("a", "cat"), "label": 0}])
    assert "word_ids" not in batch and "offset_mapping" not in batch
    slow = word_piece()
    slow.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": property(lambda self: False)})
    with pytest.raises(ValueError, match="word_ids: expected a fast tokenizer"):
        PairCollator(slow, max_length=16, word_ids=True)


def test_views_of_different_numbers_of_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"item 0 has 2 in 'a cat' and 3 in 'a big cat'"):
        collate(word_piece(), ("sat", "a cat"), ("sat", "a big cat"))
