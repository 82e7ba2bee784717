"""Two views of every training pair: the original, and an augmentation drawn anew in every epoch.

Both classes are map-style datasets for `torch.utils.data.DataLoader`. What item i holds in epoch e depends on
(seed, e, i) alone, so that order, workers and a resumed run change nothing. Workers that outlive an epoch
(`persistent_workers=True`) keep the epoch they started with: leave that off.
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
    """What a dataset gives the collator: both texts of each view and the class index; `augmented` may be absent."""

    augmented: tuple[str, str]


class PairViews:
    """Pairs with both texts augmented on the fly.

    Args:
        examples: the originals.
        augmenter: augments each text; None leaves items without an `augmented` view (plain fine-tuning, evaluation).
        seed: of the draws.
    """

    def __init__(
        self, examples: Sequence[PairExample], augmenter: SynonymAugmenter | None = None, seed: int = 0
    ) -> None:
        self.examples = examples
        self.augmenter = augmenter
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose draws the items show from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> PairItem:
        index = range(len(self))[index]  # one key an item: -1 is the last one, and tensors and NumPy integers are ints
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
    """Pairs with one of their written variants, drawn uniformly for each original and epoch.

    Args:
        groups: from `read_variants`; passed through `one_row_per_variant` first, every variant of every original is an
            item of its own, k rows an original.
        seed: of the draws.
    """

    def __init__(self, groups: Sequence[VariantGroup], seed: int = 0) -> None:
        super().__init__([group.original for group in groups], seed=seed)
        self.groups = groups

    def _augmented(self, index: int) -> tuple[str, str]:
        variants = self.groups[index].variants
        return variants[draw_index(draw_rng(self.seed, self.epoch, index), len(variants))]
