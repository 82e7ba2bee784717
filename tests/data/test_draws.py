from __future__ import annotations

import random
from collections import Counter

from ear_ops.data.draws import draw_index, draw_rng


def test_draws_are_the_same_in_every_process_and_python_version() -> None:
    # These numbers change if a draw uses hash(), or if Python's random module changes.
    rng = draw_rng(seed=7, epoch=2, index=31)
    assert [draw_index(rng, 1000) for _ in range(6)] == [673, 416, 613, 180, 528, 689]


def test_every_part_of_the_key_counts() -> None:
    keys = [(seed, epoch, index) for seed in range(12) for epoch in range(12) for index in range(12)]
    assert len({draw_rng(*key).random() for key in keys}) == len(keys)


def test_an_index_is_uniform_and_in_range() -> None:
    rng = random.Random(0)
    counts = Counter(draw_index(rng, 5) for _ in range(10_000))
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert sum((count - 2000) ** 2 / 2000 for count in counts.values()) < 23.5  # chi squared, 4 degrees, p = 1e-4
    assert {draw_index(rng, 1) for _ in range(100)} == {0}
