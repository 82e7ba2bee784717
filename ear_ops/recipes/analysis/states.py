"""The vectors that a model gives sentences in every layer, and words in the embedding layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ear_ops.models.classifier import masked_mean
from ear_ops.recipes.analysis.measures import centred_kernel_alignment, language_separation, retrieval_accuracy


@torch.inference_mode()
def sentence_states(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 64, max_length: int = 128
) -> Tensor:
    """The mean over tokens of the hidden states of each text, [layers + 1, N, C], float32. Layer 0 is the embeddings.

    Args:
        model: any model of transformers that returns `hidden_states`; it is put into evaluation mode.
        tokenizer: of the model.
        texts: N of them.
        batch_size: texts of a forward.
        max_length: pieces of a text; longer texts are cut.
    """
    model.eval()
    by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # texts of like length need little padding
    pooled = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            [texts[row] for row in by_length[start : start + batch_size]],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(model.device)
        states = model(**inputs, output_hidden_states=True).hidden_states  # each [B, L, C]
        pooled.append(torch.stack([masked_mean(layer, inputs["attention_mask"]).float().cpu() for layer in states]))
    return torch.cat(pooled, dim=1)[:, torch.tensor(by_length).argsort()]


@torch.inference_mode()
def word_vectors(model: Any, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """The word embedding of each word, [N, C], float32. A word of several pieces has their mean."""
    table = model.get_input_embeddings().weight
    rows = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    if empty := [word for word, ids in zip(words, rows, strict=True) if not ids]:
        raise ValueError(f"words: expected words of at least one piece, got {empty[0]!r}")
    return torch.stack([table[ids].mean(dim=0).float().cpu() for ids in rows])


def alignment_by_layer(
    model: Any,
    tokenizer: Any,
    parallel: Mapping[str, Sequence[tuple[str, str]]],
    *,
    clustered: int = 100,
    batch_size: int = 64,
) -> dict[str, Any]:
    """The measures of every layer, beginning with the embedding layer.

    Args:
        model: any model of transformers that returns `hidden_states`.
        tokenizer: of the model.
        parallel: pairs of a sentence and its English translation by language, as `load_parallel` returns them.
        clustered: the sentences of each language that the separation is computed on. Its cost grows with their square.
        batch_size: texts of a forward.

    Returns:
        `retrieval` and `alignment` with English, by language: [layers + 1]. `separation` of all languages, also
        English: [layers + 1]. `sentences`: their number by language.
    """
    result: dict[str, Any] = {"retrieval": {}, "alignment": {}, "sentences": {}}
    clouds: list[Tensor] = []  # each [layers + 1, n, C]
    names: list[str] = []
    for language, pairs in parallel.items():
        states, english = (
            sentence_states(model, tokenizer, [pair[side] for pair in pairs], batch_size=batch_size) for side in (0, 1)
        )
        layers = list(zip(states, english, strict=True))
        result["sentences"][language] = len(pairs)
        result["retrieval"][language] = [retrieval_accuracy(*pair) for pair in layers]
        result["alignment"][language] = [centred_kernel_alignment(*pair) for pair in layers]
        for name, cloud in ((language, states), *([("en", english)] if not clouds else [])):
            clouds.append(cloud[:, :clustered])
            names += [name] * clouds[-1].shape[1]
    result["separation"] = [language_separation(layer, names) for layer in torch.cat(clouds, dim=1)]
    return result
