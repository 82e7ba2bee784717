"""Real pairs to measure with: the first ones of XNLI, each text beside a version with synonyms."""

from __future__ import annotations

from pathlib import Path

from ear_ops.data import PairViews, SynonymAugmenter, get_task, load_split, load_synonyms


def xnli_views(folder: Path, pairs: int, synonyms: str = "synonyms/counterfitted_neighbors.json") -> PairViews:
    """Return the first `pairs` of the training split in `folder`, where the path of the synonyms begins, too."""
    examples = load_split(folder, get_task("xnli"), "train", "en")[:pairs]
    return PairViews(examples, SynonymAugmenter(load_synonyms(folder / synonyms)), seed=1)
