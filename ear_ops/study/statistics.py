"""Means over seeds, and paired differences over items with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000

Correct = Mapping[str, NDArray[np.bool_]]  # whether each item was right, by language: [items], parallel line by line


class Estimate(NamedTuple):
    """Mean over runs, with the sample standard deviation, which one run does not have."""

    mean: float
    deviation: float | None


class Difference(NamedTuple):
    """A mean difference and its 95% interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("values: expected at least one, got none")
    return Estimate(mean(values), stdev(values) if len(values) > 1 else None)


def paired_bootstrap(differences: NDArray[np.floating], draws: int = DRAWS, seed: int = 0) -> Difference:
    """Percentile bootstrap of a mean (Efron and Tibshirani, 1993) over paired differences of items.

    Args:
        differences: [items], at least one.
    """
    rng = np.random.default_rng(seed)
    items = len(differences)
    means = [differences[rng.integers(0, items, items)].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(differences.mean()), float(low), float(high))


def accuracy_differences(runs: Sequence[Correct], baselines: Sequence[Correct]) -> dict[str, Difference]:
    """Difference in accuracy, as a share, between runs and their baselines: by language, and `average` over languages.

    An item is drawn in all languages at once, since it is one item and its translations. Several pairs of runs are
    averaged item by item first: how much a run changes with its seed is not in the interval.

    Args:
        runs, baselines: pairs, as the seeds match; the same languages everywhere, as many items in each.

    Raises:
        ValueError: the lists or the items do not match.
    """
    if not runs or len(runs) != len(baselines):
        raise ValueError(f"expected as many runs as baselines, at least one, got {len(runs)} and {len(baselines)}")
    languages = list(runs[0])
    shapes = {
        (tuple(sorted(each)), tuple(sorted({len(items) for items in each.values()}))) for each in (*runs, *baselines)
    }
    if len(shapes) != 1 or len(next(iter(shapes))[1]) != 1:
        raise ValueError("the runs must be scored on the same languages, with as many items in each")
    paired = [
        np.stack([run[name].astype(float) - baseline[name] for name in languages])  # [languages, items]
        for run, baseline in zip(runs, baselines, strict=True)
    ]
    differences = np.mean(paired, axis=0)
    by_language = {name: paired_bootstrap(rows) for name, rows in zip(languages, differences, strict=True)}
    return {**by_language, "average": paired_bootstrap(differences.mean(axis=0))}
