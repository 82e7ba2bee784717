"""Datasets of two views of every training pair: the original, and an augmentation that every epoch draws anew.

Both classes are map-style datasets for `torch.utils.data.DataLoader`. Item i in epoch e depends on (seed, e, i) only.
So the order of the items, the number of workers and a resumed run do not change it.

Do not pass `persistent_workers=True` to the loader: such workers would stay in the epoch in which they started.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from ear_ops.data.draws import draw_index, draw_rng
from ear_ops.data.pairs import PairExample
from ear_ops.data.synonyms import SynonymAugmenter
from ear_ops.data.variants import VariantGroup


class _Original(TypedDict):
    original: tuple[str, str]
    label: int


class PairItem(_Original, total=False):
    """What a dataset gives the collator: both texts of each view, and the class index. `augmented` may be absent."""

    augmented: tuple[str, str]


class PairViews:
    """Pairs whose texts are augmented when an item is asked for.

    Args:
        examples: the originals.
        augmenter: augments each text. With None, as for plain fine-tuning and evaluation, items have no `augmented`
            view.
        seed: the seed of the draws.
    """

    def __init__(
        self, examples: Sequence[PairExample], augmenter: SynonymAugmenter | None = None, seed: int = 0
    ) -> None:
        self.examples = examples
        self.augmenter = augmenter
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, whose draws the items have from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> PairItem:
        index = range(len(self))[index]  # so that -1, tensors and NumPy integers give the same draw as a plain index
        example = self.examples[index]
        item: PairItem = {"original": (example.text1, example.text2), "label": example.label}
        augmented = self._augmented(index)
        if augmented is not None:
            item["augmented"] = augmented
        return item

    def _augmented(self, index: int) -> tuple[str, str] | None:
        if self.augmenter is None:
            return None
        rng = draw_rng(self.seed, self.epoch, index)
        example = self.examples[index]
        return self.augmenter.augment(example.text1, rng), self.augmenter.augment(example.text2, rng)


class VariantViews(PairViews):
    """Pairs with a variant from a file. Each epoch draws one variant of each original, uniformly.

    Args:
        groups: the groups of `read_variants`. After `one_row_per_variant`, every variant is an item.
        seed: the seed of the draws.
    """

    def __init__(self, groups: Sequence[VariantGroup], seed: int = 0) -> None:
        super().__init__([group.original for group in groups], seed=seed)
        self.groups = groups

    def _augmented(self, index: int) -> tuple[str, str]:
        variants = self.groups[index].variants
        return variants[draw_index(draw_rng(self.seed, self.epoch, index), len(variants))]
