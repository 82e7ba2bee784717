"""Random draws that depend on their key alone: the same in every process, in any order, on any Python version.

Of `random.Random` only `random()` is promised to give the same numbers for a seed in every version, so nothing
here calls `choice`, `sample` or `shuffle`, and nothing uses `hash()`, which differs between processes.
"""

from __future__ import annotations

import random


def draw_rng(seed: int, epoch: int, index: int) -> random.Random:
    """Return the generator of item `index` in `epoch` of a run with `seed`; distinct keys are unrelated streams."""
    return random.Random(f"{seed}/{epoch}/{index}")


def draw_index(rng: random.Random, length: int) -> int:
    """Draw uniformly from 0, ..., length - 1."""
    return int(rng.random() * length)
