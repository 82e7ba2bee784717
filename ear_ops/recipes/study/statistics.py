"""Means over seeds, and differences between runs over the same items, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ear_ops.recipes.training.errors import NotComparableError

DRAWS = 2000


class Items(NamedTuple):
    """The items that a run was scored on.

    Attributes:
        correct: by language, whether each item was predicted correctly, [items]. Item i is the same in all languages.
        groups: the number of each item's group, from 0, [items]. Items with the same first sentence, such as the three
            of a premise in XNLI, are not independent and form a group.
        source: the language trained on.
    """

    correct: Mapping[str, NDArray[np.bool_]]
    groups: NDArray[np.integer]
    source: str


class Estimate(NamedTuple):
    """The mean over runs, and the sample standard deviation, which is None for a single run."""

    mean: float
    deviation: float | None


class Difference(NamedTuple):
    """A mean difference and its 95% interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and deviation of at least one value. Raises ValueError without values."""
    if not values:
        raise ValueError("values: expected at least one, got none")
    return Estimate(mean(values), stdev(values) if len(values) > 1 else None)


def interval_over_seeds(differences: Sequence[float]) -> Difference | None:
    """The mean of the differences of all seeds, with the 95% interval of Student's t.

    A single seed has no spread, so its result is None. Raises ValueError without differences.
    """
    value = estimate(differences)
    if value.deviation is None:
        return None
    half = students_t(len(differences) - 1) * value.deviation / math.sqrt(len(differences))
    return Difference(value.mean, value.mean - half, value.mean + half)


def students_t(degrees: int, confidence: float = 0.95) -> float:
    """The value that |t| stays below with this probability, for Student's t with `degrees` degrees of freedom.

    The probability of an angle arctan(t / sqrt(degrees)) is a finite sum (Abramowitz and Stegun, 1964, 26.7.3 and
    26.7.4). It rises with the angle, so bisection finds the angle. scipy is not needed for a report.
    """
    if degrees < 1:
        raise ValueError(f"degrees: expected at least 1, got {degrees}")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _probability_within(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _probability_within(angle: float, degrees: int) -> float:
    """The probability that |t| is below sqrt(degrees) * tan(angle)."""
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def paired_bootstrap(differences: NDArray[np.floating], groups: NDArray[np.integer]) -> Difference:
    """The percentile bootstrap of a mean over paired differences of items (Davison and Hinkley, 1997, section 3.8).

    It takes :data:`DRAWS` samples, the same in every call.

    Args:
        differences: at least one, [items].
        groups: the number of each item's group, from 0, [items]. Every group has items, and is drawn as a whole.
    """
    rng = np.random.default_rng(0)
    sums, sizes = np.bincount(groups, weights=differences), np.bincount(groups)
    count = len(sizes)
    drawn = (rng.integers(0, count, count) for _ in range(DRAWS))
    means = [sums[sample].sum() / sizes[sample].sum() for sample in drawn]
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(differences.mean()), float(low), float(high))


def accuracy_differences(runs: Sequence[Items], baselines: Sequence[Items]) -> dict[str, Difference]:
    """The differences in accuracy, as shares, between runs and their baselines.

    An item is drawn in all languages at once, together with the other items of its group. Several pairs of runs are
    averaged item by item first, so the intervals leave out how much a run changes with its seed.

    Args:
        runs: at least one.
        baselines: one for each run, in the same order. All have the same languages and items.

    Returns:
        Differences by language; `average` over all languages; and `average_other` over the languages that no run was
        trained on, if there are any.

    Raises:
        NotComparableError: the runs were not scored on the same items.
        ValueError: there are not as many runs as baselines.
    """
    if not runs or len(runs) != len(baselines):
        raise ValueError(f"expected as many runs as baselines, at least one, got {len(runs)} and {len(baselines)}")
    languages, groups = list(runs[0].correct), runs[0].groups
    for run in (*runs, *baselines):
        if sorted(run.correct) != sorted(languages):
            raise NotComparableError(
                f"runs that were scored in the same languages can be compared, got {', '.join(languages)} and "
                f"{', '.join(run.correct)}"
            )
        if {len(right) for right in run.correct.values()} != {len(groups)}:
            raise NotComparableError("the runs must be scored on as many items in every language, translated in order")
    paired = [
        np.stack([run.correct[name].astype(float) - baseline.correct[name] for name in languages])  # [languages, items]
        for run, baseline in zip(runs, baselines, strict=True)
    ]
    differences = np.mean(paired, axis=0)
    result = {name: paired_bootstrap(rows, groups) for name, rows in zip(languages, differences, strict=True)}
    result["average"] = paired_bootstrap(differences.mean(axis=0), groups)
    sources = {run.source for run in (*runs, *baselines)}
    others = [row for name, row in zip(languages, differences, strict=True) if name not in sources]
    if others:
        result["average_other"] = paired_bootstrap(np.mean(others, axis=0), groups)
    return result
