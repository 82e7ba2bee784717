"""Means over seeds, and paired differences over items with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ear_ops.recipes.training.errors import NotComparableError

DRAWS = 2000
# The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom; with more the last, which is a little too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Items(NamedTuple):
    """What a run was scored on.

    Attributes:
        correct: whether each item was right, by language: [items], parallel line by line.
        groups: the group of each item, from 0: [items]. Items with one first sentence, as the three of a premise in
            XNLI, are no independent draws.
        source: the language trained on.
    """

    correct: Mapping[str, NDArray[np.bool_]]
    groups: NDArray[np.integer]
    source: str


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


def interval_over_seeds(differences: Sequence[float]) -> Difference | None:
    """Mean of one difference a seed, with the 95% interval of Student's t. None of a single seed, which has no spread.

    Raises ValueError without differences.
    """
    value = estimate(differences)
    if value.deviation is None:
        return None
    half = _T[min(len(differences) - 2, len(_T) - 1)] * value.deviation / len(differences) ** 0.5
    return Difference(value.mean, value.mean - half, value.mean + half)


def paired_bootstrap(
    differences: NDArray[np.floating], groups: NDArray[np.integer], draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Percentile bootstrap of a mean over paired differences of items, drawn by groups (Davison and Hinkley, 1997,
    section 3.8).

    Args:
        differences: [items], at least one.
        groups: of each item, from 0, none of them empty: [items].
    """
    rng = np.random.default_rng(seed)
    sums, sizes = np.bincount(groups, weights=differences), np.bincount(groups)
    count = len(sizes)
    drawn = (rng.integers(0, count, count) for _ in range(draws))
    means = [sums[each].sum() / sizes[each].sum() for each in drawn]
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(differences.mean()), float(low), float(high))


def accuracy_differences(runs: Sequence[Items], baselines: Sequence[Items]) -> dict[str, Difference]:
    """Difference in accuracy, as a share, between runs and their baselines: by language, `average` over languages, and
    `average_other` over those that none of the runs was trained on, if there are any.

    An item is drawn in all languages at once, since it is one item and its translations, and with the other items of
    its group. Several pairs of runs are averaged item by item first: how much a run changes with its seed is not in the
    interval.

    Args:
        runs, baselines: pairs, as the seeds match; the same languages everywhere, as many items in each.

    Raises:
        NotComparableError: the runs were not scored on the same items.
        ValueError: not as many runs as baselines.
    """
    if not runs or len(runs) != len(baselines):
        raise ValueError(f"expected as many runs as baselines, at least one, got {len(runs)} and {len(baselines)}")
    languages, groups = list(runs[0].correct), runs[0].groups
    for each in (*runs, *baselines):
        if sorted(each.correct) != sorted(languages):
            raise NotComparableError(
                f"runs that were scored in the same languages can be compared, got {', '.join(languages)} and "
                f"{', '.join(each.correct)}"
            )
        if {len(right) for right in each.correct.values()} != {len(groups)}:
            raise NotComparableError("the runs must be scored on as many items in every language, translated in order")
    paired = [
        np.stack([run.correct[name].astype(float) - baseline.correct[name] for name in languages])  # [languages, items]
        for run, baseline in zip(runs, baselines, strict=True)
    ]
    differences = np.mean(paired, axis=0)
    result = {name: paired_bootstrap(rows, groups) for name, rows in zip(languages, differences, strict=True)}
    result["average"] = paired_bootstrap(differences.mean(axis=0), groups)
    sources = {each.source for each in (*runs, *baselines)}
    others = [row for name, row in zip(languages, differences, strict=True) if name not in sources]
    if others:
        result["average_other"] = paired_bootstrap(np.mean(others, axis=0), groups)
    return result
