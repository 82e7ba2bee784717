"""A tiny random BERT with its tokenizer, and a small task that it can learn in a few dozen steps."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"{letter}{i}" for letter in "abcd" for i in range(8)]
KEYWORDS = {"contradiction": "never", "entailment": "indeed", "neutral": "maybe"}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_tiny_model(folder: Path) -> Path:
    words = [*WORDS, *KEYWORDS.values(), *(f"unused{i}" for i in range(9))]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.2,  # attention that is not flat, and quick learning
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)  # without a head: the seed of the run draws it
    fast.save_pretrained(folder)
    return folder


def write_split(path: Path, size: int, seed: int, keywords: dict[str, str] = KEYWORDS) -> None:
    rng = random.Random(seed)
    lines = []
    for i in range(size):
        label = list(keywords)[i % len(keywords)]
        first = rng.sample(WORDS, rng.randint(3, 7))
        second = [*rng.sample(WORDS, rng.randint(2, 4)), keywords[label]]
        lines.append(f"{' '.join(first)}\t{' '.join(second)}\t{label}\n")
    path.write_text("".join(lines), encoding="utf-8")


def write_data(folder: Path) -> Path:
    """60 training pairs, 15 dev and test items in en, de, sw, and a dictionary with two synonyms for each `a` word."""
    (folder / "xnli").mkdir()
    write_split(folder / "xnli" / "train-en.tsv", 60, seed=0)
    for split in ("dev", "test"):
        for i, language in enumerate(("en", "de", "sw")):
            write_split(folder / "xnli" / f"{split}-{language}.tsv", 15, seed=10 * i + len(split))
    synonyms = {f"a{i}": [f"b{i}", f"c{i}"] for i in range(8)}
    (folder / "synonyms.json").write_text(json.dumps(synonyms), encoding="utf-8")
    return folder
