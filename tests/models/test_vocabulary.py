from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from ear_ops.models.classifier import MeanPoolingClassifier, MeanPoolingConfig
from ear_ops.models.vocabulary import prune_vocabulary, restore_vocabulary

MakeUnigram = Callable[[list[tuple[str, float]]], PreTrainedTokenizerFast]
MakeWordPiece = Callable[[list[str]], PreTrainedTokenizerFast]

TEXTS = ["low lower", "new lowest", "lone we <mask> low", "", "Ω low"]
OTHER = ["slower slow", "newest wolf", "東 x"]
PIECES = [
    *[("▁low", -2.0), ("er", -2.5), ("est", -2.7), ("▁new", -3.0), ("▁sl", -3.5), ("ow", -3.6), ("ewest", -4.0)],
    *[(character, -6.0) for character in "▁lowernst"],
]


def pieces(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts)["input_ids"]]


@torch.no_grad()
def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    pairs = tokenizer(texts, list(reversed(texts)), padding=True, return_tensors="pt", return_token_type_ids=False)
    return model.eval()(**pairs).logits


def classifiers(tokenizer: PreTrainedTokenizerFast) -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer) + 3,  # multilingual-e5-small also has spare rows
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 70,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "num_labels": 3,
    }
    return {
        "bert": BertForSequenceClassification(BertConfig(**sizes)),
        "xlm-roberta": XLMRobertaForSequenceClassification(XLMRobertaConfig(**sizes)),
        "mean": MeanPoolingClassifier(MeanPoolingConfig(encoder_config=BertConfig(**sizes), num_labels=3)),
    }


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "mean"])
def test_nothing_changes_on_the_given_texts(make_unigram: MakeUnigram, tmp_path: Path, name: str) -> None:
    tokenizer = make_unigram(PIECES)
    model = classifiers(tokenizer)[name]
    split, before = pieces(tokenizer, TEXTS), logits(model, tokenizer, TEXTS)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    pruned, small = prune_vocabulary(model, tokenizer, iter(TEXTS))
    assert pruned is model and len(tokenizer) == len(PIECES) + 5  # the old tokenizer is unchanged
    assert set(small.get_vocab()) == set(tokenizer.get_vocab()) - {"▁sl", "ow", "ewest"}
    assert pieces(small, TEXTS) == split
    assert torch.equal(logits(pruned, small, TEXTS), before)
    rows = pruned.get_input_embeddings().weight.shape[0]
    assert rows == pruned.get_input_embeddings().num_embeddings == len(small)
    assert sum(parameter.numel() for parameter in pruned.parameters()) == parameters - 6 * 32
    assert getattr(pruned.config, "encoder_config", pruned.config).vocab_size == rows

    pruned.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    loaded, tokenizer = type(model).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert pieces(tokenizer, TEXTS + OTHER) == pieces(small, TEXTS + OTHER)
    assert torch.equal(logits(loaded, tokenizer, TEXTS), before)


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "mean"])
def test_after_training_the_whole_vocabulary_can_come_back(make_unigram: MakeUnigram, name: str) -> None:
    tokenizer = make_unigram(PIECES)
    whole = classifiers(tokenizer)[name]
    pruned, small = prune_vocabulary(copy.deepcopy(whole), tokenizer, TEXTS)
    with torch.no_grad():  # in place of a training
        for parameter in pruned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    untrained = whole.get_input_embeddings().weight.detach().clone()
    restore_vocabulary(pruned, small, whole, tokenizer)
    assert torch.equal(logits(whole, tokenizer, TEXTS), logits(pruned, small, TEXTS))
    changed = (whole.get_input_embeddings().weight != untrained).all(dim=1)
    assert changed.sum() == len(small) and not changed[tokenizer.convert_tokens_to_ids(["▁sl", "ow", "ewest"])].any()

    other = make_unigram([entry for entry in PIECES if entry[0] not in ("er", "est")])
    with pytest.raises(ValueError, match="lacks pieces"):
        restore_vocabulary(pruned, small, whole, other)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_restoring_equals_training_unpruned_only_without_weight_decay(
    make_unigram: MakeUnigram, weight_decay: float
) -> None:
    tokenizer = make_unigram(PIECES)
    initial = classifiers(tokenizer)["mean"].eval()
    unpruned = copy.deepcopy(initial)
    pruned, small = prune_vocabulary(copy.deepcopy(initial), tokenizer, TEXTS)
    for model, its_tokenizer in ((unpruned, tokenizer), (pruned, small)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=weight_decay)
        batch = its_tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
        model(**batch, labels=torch.arange(len(TEXTS)) % 3).loss.backward()
        optimizer.step()
    dropped = tokenizer.convert_tokens_to_ids(["▁sl", "ow", "ewest"])
    before, after = (model.get_input_embeddings().weight[dropped] for model in (initial, unpruned))
    assert torch.equal(before, after) == (weight_decay == 0.0)
    if weight_decay != 0.0:
        untouched = copy.deepcopy(initial.state_dict())
        with pytest.raises(ValueError, match=r"weight_decay: expected 0, .* got 0\.1"):
            restore_vocabulary(pruned, small, initial, tokenizer, weight_decay=weight_decay)
        assert all(torch.equal(initial.state_dict()[name], value) for name, value in untouched.items())
        return
    restore_vocabulary(pruned, small, initial, tokenizer, weight_decay=weight_decay)
    torch.testing.assert_close(initial.state_dict(), unpruned.state_dict())


def test_other_text_is_split_into_what_is_left(make_unigram: MakeUnigram) -> None:
    tokenizer = make_unigram(PIECES)
    model, small = prune_vocabulary(classifiers(tokenizer)["mean"], tokenizer, TEXTS)
    assert pieces(tokenizer, ["slow newest"]) == [["<s>", "▁sl", "ow", "▁new", "est", "</s>"]]
    assert pieces(small, ["slow newest"]) == [["<s>", "▁", "s", "l", "o", "w", "▁new", "est", "</s>"]]
    assert pieces(small, ["東 x"]) == [["<s>", "▁", "<unk>", "▁", "<unk>", "</s>"]]
    assert logits(model, small, OTHER).isfinite().all()


def test_the_new_tokenizer_behaves_as_the_old(make_unigram: MakeUnigram) -> None:
    tokenizer = make_unigram(PIECES)
    tokenizer.padding_side = "left"
    _, small = prune_vocabulary(classifiers(tokenizer)["mean"], tokenizer, TEXTS)
    assert small.special_tokens_map == tokenizer.special_tokens_map
    assert (small.padding_side, small.model_max_length) == ("left", 64)
    assert small.model_input_names == tokenizer.model_input_names
    assert small.pad_token_id == 1
    for options in ({"padding": True}, {"truncation": True, "max_length": 5, "padding": "max_length"}):
        old, new = tokenizer(TEXTS, TEXTS[::-1], **options), small(TEXTS, TEXTS[::-1], **options)
        assert old["attention_mask"] == new["attention_mask"]
        for a, b in zip(old["input_ids"], new["input_ids"], strict=True):
            assert tokenizer.convert_ids_to_tokens(a) == small.convert_ids_to_tokens(b)


def test_pruning_twice_changes_nothing_more(make_unigram: MakeUnigram) -> None:
    tokenizer = make_unigram(PIECES)
    model, small = prune_vocabulary(classifiers(tokenizer)["mean"], tokenizer, TEXTS)
    before = logits(model, small, TEXTS)
    model, again = prune_vocabulary(model, small, TEXTS)
    assert again.get_vocab() == small.get_vocab()
    assert torch.equal(logits(model, again, TEXTS), before)


def test_the_price_of_an_unknown_character_stays(make_unigram: MakeUnigram) -> None:
    # "xabcdef" can be four pieces, or an unknown "x" and "abcdef". The unknown costs 10 more than the worst piece.
    tokenizer = make_unigram(
        [(piece, -8.0) for piece in ("▁", "xa", "bc", "de", "f", "abcdef")] + [("never used", -20.0)]
    )
    texts = ["xabcdef", "abcdef"]
    split = pieces(tokenizer, texts)
    assert split == [["<s>", "▁", "xa", "bc", "de", "f", "</s>"], ["<s>", "▁", "abcdef", "</s>"]]
    model = classifiers(tokenizer)["mean"]
    assert pieces(prune_vocabulary(model, tokenizer, texts)[1], texts) == split


letters = st.text("abcdeZ", min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    vocabulary=st.dictionaries(letters, st.floats(-20, -1, width=32), min_size=1, max_size=30),
    texts=st.lists(st.lists(letters, max_size=4).map(" ".join), max_size=6),
)
def test_any_unigram_vocabulary_splits_the_given_texts_alike(
    make_unigram: MakeUnigram, vocabulary: dict[str, float], texts: list[str]
) -> None:
    tokenizer = make_unigram([("▁", -3.0), *((piece, score) for piece, score in vocabulary.items() if piece != "Z")])
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=2, num_hidden_layers=0, num_attention_heads=1, intermediate_size=2
        )
    )
    _, small = prune_vocabulary(model, tokenizer, texts)
    assert [pieces(small, [text]) for text in texts] == [pieces(tokenizer, [text]) for text in texts]


WORDPIECES = ["ab", "abc", "abcd", "##c", "##d", "##cd", "##x", "##xy", "a", "b", "zz", "zzz", "."]


def test_wordpiece_keeps_splits_and_predictions(make_wordpiece: MakeWordPiece) -> None:
    tokenizer = make_wordpiece(WORDPIECES)
    texts = ["abd abx.", "ABCD", "b?"]
    model = classifiers(tokenizer)["bert"]
    split, before = pieces(tokenizer, texts), logits(model, tokenizer, texts)
    model, small = prune_vocabulary(model, tokenizer, texts)
    assert set(tokenizer.get_vocab()) - set(small.get_vocab()) == {
        "[unused1]",
        "[unused2]",
        *["abc", "##cd", "##xy", "zz", "zzz"],
    }
    assert pieces(small, texts) == split
    assert torch.equal(logits(model, small, texts), before)
    assert (model.config.pad_token_id, model.config.bos_token_id) == (small.pad_token_id, small.cls_token_id)


def test_wordpiece_unknown_words_stay_unknown(make_wordpiece: MakeWordPiece) -> None:
    # "abcxq" begins with "abc", and no piece matches after it. Without "abc", it would be "ab" and "##cxq".
    tokenizer = make_wordpiece(["ab", "abc", "##cxq", "b"])
    texts = ["abcxq", "ab", "b abcxq bcxq"]
    assert pieces(tokenizer, texts)[0] == ["[CLS]", "[UNK]", "[SEP]"]
    split = pieces(tokenizer, texts)
    _, small = prune_vocabulary(classifiers(tokenizer)["bert"], tokenizer, texts)
    assert pieces(small, texts) == split


def test_the_padding_id_does_not_move(make_wordpiece: MakeWordPiece) -> None:
    # Models such as RoBERTa count positions from the padding id.
    tokenizer = make_wordpiece(WORDPIECES)
    tokenizer.pad_token = "[MASK]"
    model, small = prune_vocabulary(classifiers(tokenizer)["bert"], tokenizer, ["ab"])
    assert small.pad_token_id == tokenizer.pad_token_id == model.config.pad_token_id == 6
    assert len(small) < len(tokenizer)


def test_several_end_tokens_are_renumbered(make_wordpiece: MakeWordPiece) -> None:
    tokenizer = make_wordpiece(WORDPIECES)
    model = classifiers(tokenizer)["bert"]
    ends = [tokenizer.sep_token, "ab"]
    model.config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    before = list(model.config.eos_token_id)
    model, small = prune_vocabulary(model, tokenizer, ["ab"])
    assert model.config.eos_token_id == small.convert_tokens_to_ids(ends) != before


def test_tied_output_embeddings_shrink_too(make_unigram: MakeUnigram) -> None:
    tokenizer = make_unigram(PIECES)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=1,
    )
    model = BertForMaskedLM(config)
    torch.nn.init.normal_(model.cls.predictions.bias)
    old_ids = [token for token in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(token) not in ("▁sl", "ow")]
    texts = [*TEXTS, "ewest"]
    before = logits(model, tokenizer, texts)[..., old_ids]
    model, small = prune_vocabulary(model, tokenizer, texts)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert model.get_output_embeddings().out_features == len(small) == len(old_ids)
    torch.testing.assert_close(logits(model, small, texts), before)


def test_frozen_embeddings_stay_frozen(make_unigram: MakeUnigram) -> None:
    tokenizer = make_unigram(PIECES)
    model = classifiers(tokenizer)["mean"]
    model.get_input_embeddings().weight.requires_grad_(False)
    model, _ = prune_vocabulary(model, tokenizer, TEXTS)
    assert not model.get_input_embeddings().weight.requires_grad


def test_bpe_is_refused(tiny_config: BertConfig) -> None:
    backend = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="Unigram or WordPiece vocabulary, got BPE"):
        prune_vocabulary(BertModel(tiny_config), tokenizer, ["ab"])


def test_a_tokenizer_of_another_model_is_refused(make_unigram: MakeUnigram) -> None:
    tokenizer = make_unigram(PIECES)
    model = BertModel(
        BertConfig(vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ValueError, match="token id 20, but model embeds only 10 ids"):
        prune_vocabulary(model, tokenizer, TEXTS)
    assert model.get_input_embeddings().num_embeddings == 10
