from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from ear_ops.data.pairs import PairExample
from ear_ops.data.synonyms import SynonymAugmenter
from ear_ops.data.variants import VariantGroup, one_row_per_variant
from ear_ops.data.views import PairViews, VariantViews

LETTERS = "abcdefgh"
SYNONYMS = {letter: [letter + digit for digit in "123456789"] for letter in LETTERS}
EXAMPLES = [PairExample(f"{letter} is {letter}", f"not {letter}", i % 3) for i, letter in enumerate(LETTERS * 2)]
GROUPS = [
    VariantGroup(example, tuple((f"{example.text1} {v}", f"{example.text2} {v}") for v in range(3)))
    for example in EXAMPLES
]


def views(seed: int = 0) -> PairViews:
    return PairViews(EXAMPLES, SynonymAugmenter(SYNONYMS), seed)


def both_kinds() -> list[PairViews]:
    return [views(), VariantViews(GROUPS)]


def test_an_item_holds_the_original_the_augmentation_and_the_label() -> None:
    item = views()[1]
    assert sorted(item) == ["augmented", "label", "original"]
    assert item["original"] == ("b is b", "not b")
    assert item["label"] == 1
    text1, text2 = item["augmented"]
    assert [word[0] for word in text1.split(" ")] == ["b", "i", "b"]
    assert text2.split(" ")[0] == "not" and text2.split(" ")[1][0] == "b"


def test_both_texts_are_augmented() -> None:
    changed = Counter(side for item in views() for side in (0, 1) if item["augmented"][side] != item["original"][side])
    assert changed[0] > 10 and changed[1] > 10


def test_without_an_augmenter_there_is_no_augmented_view() -> None:
    assert PairViews(EXAMPLES)[0] == {"original": ("a is a", "not a"), "label": 0}
    assert len(PairViews(EXAMPLES)) == len(EXAMPLES) == len(list(PairViews(EXAMPLES)))


def test_a_draw_depends_on_seed_epoch_and_index_alone() -> None:
    for dataset, again in zip(both_kinds(), both_kinds(), strict=True):
        forward = [dataset[i] for i in range(len(dataset))]
        assert [again[i] for i in reversed(range(len(again)))][::-1] == forward
        again.set_epoch(5)
        assert [again[i] for i in range(len(again))] != forward
        again.set_epoch(0)
        assert [again[i] for i in range(len(again))] == forward


def test_seeds_epochs_and_items_draw_differently() -> None:
    first = [views(0)[i] for i in range(8)]
    assert first != [views(1)[i] for i in range(8)]
    # Items 0 and 8 have the same texts.
    pairs = [(views(seed)[0]["augmented"], views(seed)[8]["augmented"]) for seed in range(10)]
    assert sum(first_text == second_text for first_text, second_text in pairs) < 3


def test_draws_never_change() -> None:
    dataset = views(seed=7)
    dataset.set_epoch(2)
    assert [dataset[i]["augmented"] for i in (0, 3)] == [("a2 is a", "not a2"), ("d8 is d5", "not d2")]
    variants = VariantViews(GROUPS, seed=7)
    variants.set_epoch(2)
    assert [int(variants[i]["augmented"][0][-1]) for i in range(10)] == [0, 0, 0, 2, 0, 1, 0, 2, 1, 1]


def test_indices_are_those_of_a_sequence() -> None:
    for dataset in both_kinds():
        assert dataset[-1] == dataset[len(dataset) - 1]
        assert dataset[torch.tensor(3)] == dataset[3]
        for index in (len(dataset), -len(dataset) - 1):
            with pytest.raises(IndexError):
                dataset[index]


def test_workers_draw_what_the_main_process_draws() -> None:
    for dataset in both_kinds():
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            loader = DataLoader(dataset, batch_size=5, num_workers=2, collate_fn=list)
            assert [item for batch in loader for item in batch] == list(dataset)


def test_one_variant_of_its_own_is_drawn_for_each_original_and_epoch() -> None:
    dataset = VariantViews(GROUPS)
    assert len(dataset) == len(GROUPS)
    drawn: Counter[int] = Counter()
    for epoch in range(100):
        dataset.set_epoch(epoch)
        for item, group in zip(dataset, GROUPS, strict=True):
            assert item["original"] == (group.original.text1, group.original.text2)
            assert item["label"] == group.original.label
            drawn[group.variants.index(item["augmented"])] += 1
    assert sum((count - 1600 / 3) ** 2 / (1600 / 3) for count in drawn.values()) < 18.5  # chi squared, p = 1e-4
    assert set(drawn) == {0, 1, 2}


def test_all_variants_are_k_rows_an_original() -> None:
    dataset = VariantViews(one_row_per_variant(GROUPS))
    assert [(item["original"], item["augmented"], item["label"]) for item in dataset] == [
        ((group.original.text1, group.original.text2), variant, group.original.label)
        for group in GROUPS
        for variant in group.variants
    ]
