"""Random draws that depend on their key alone: process, order and Python version do not change them.

Python promises the same numbers in every version for `random.Random.random()` only. This module therefore calls no
`choice`, `sample` or `shuffle`. It does not use `hash()` either, which differs between processes.
"""

from __future__ import annotations

import random


def draw_rng(seed: int, epoch: int, index: int) -> random.Random:
    """Return the generator of item `index` in `epoch` of a run with `seed`. Other keys give unrelated generators."""
    return random.Random(f"{seed}/{epoch}/{index}")


def draw_index(rng: random.Random, length: int) -> int:
    """Draw an index from 0, ..., length - 1, each with the same probability."""
    return int(rng.random() * length)
