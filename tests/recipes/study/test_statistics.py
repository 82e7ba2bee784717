from __future__ import annotations

from statistics import mean
from typing import Any

import numpy as np
import pytest

from ear_ops.recipes.study.statistics import (
    Items,
    accuracy_differences,
    estimate,
    interval_over_seeds,
    paired_bootstrap,
    students_t,
)
from ear_ops.recipes.training.errors import NotComparableError


def items(**correct: Any) -> Items:
    """Each in a group of its own."""
    arrays = {language: np.array(right, bool) for language, right in correct.items()}
    return Items(arrays, np.arange(len(next(iter(arrays.values())))), "en")


def test_mean_and_sample_deviation() -> None:
    assert estimate([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert estimate([2.0]) == (2.0, None)
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


@pytest.mark.parametrize("seeds", [*range(2, 12), 30])
def test_the_interval_over_seeds_is_that_of_students_t(seeds: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [0.01 * seed**2 - 0.1 for seed in range(seeds)]
    low, high = stats.t.interval(0.95, seeds - 1, loc=mean(values), scale=stats.sem(values))
    assert interval_over_seeds(values) == pytest.approx((mean(values), low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (29, 2.045), (1000, 1.962)]
)
def test_students_t_has_the_printed_quantiles(degrees: int, quantile: float) -> None:
    assert students_t(degrees) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_students_t_is_that_of_scipy(confidence: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (*range(1, 40), 100, 10_000):
        expected = stats.t.ppf((1 + confidence) / 2, degrees)
        assert students_t(degrees, confidence) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="degrees: expected at least 1, got 0"):
        students_t(0)


def test_one_seed_has_no_interval_over_seeds() -> None:
    assert interval_over_seeds([0.1]) is None


def test_the_interval_is_that_of_the_normal_approximation_where_that_holds() -> None:
    rng = np.random.default_rng(1)
    differences = rng.choice([-1.0, 0.0, 1.0], size=4000, p=[0.1, 0.75, 0.15])
    alone = np.arange(4000)
    mean, low, high = paired_bootstrap(differences, alone)
    half = 1.96 * differences.std() / 4000**0.5
    assert mean == differences.mean()
    assert (low, high) == (pytest.approx(mean - half, abs=0.1 * half), pytest.approx(mean + half, abs=0.1 * half))
    assert paired_bootstrap(differences, alone) == (mean, low, high), "the same data give the same interval"

    thrice = paired_bootstrap(differences.repeat(3), alone.repeat(3))
    assert thrice == pytest.approx((mean, low, high)), "three items that always agree are worth one"


def test_a_group_counts_with_all_its_items() -> None:
    """Groups of one item with a difference of 1, and groups of nine without: the items differ by 0.1 on average."""
    groups = np.repeat(np.arange(200), [1, 9] * 100)
    differences = np.repeat([1.0, 0.0] * 100, [1, 9] * 100)
    mean, low, high = paired_bootstrap(differences, groups)
    assert mean == pytest.approx(0.1)
    assert 0.07 < low < 0.1 < high < 0.14, "a mean of means of groups would be 0.5"


def test_an_item_is_drawn_in_all_languages_at_once_and_seeds_are_averaged_first() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.5  # where the runs differ, they do so in both languages
    run, baseline = items(en=~hard, de=~hard), items(en=hard | ~hard, de=hard | ~hard)
    result = accuracy_differences([run], [baseline])
    assert result["average"] == result["en"] == result["de"], "drawn apart, the average would have a narrower interval"
    assert result["average"].mean == pytest.approx(-hard.mean()) and result["average_other"] == result["de"]
    assert "average_other" not in accuracy_differences([items(en=~hard)], [items(en=hard)])

    flipped = items(en=[True, False, True], de=[True, True, True])
    none = items(en=[False] * 3, de=[False] * 3)
    both = accuracy_differences([flipped, none], [none, none])
    assert both["en"].mean == pytest.approx(1 / 3) and both["average"].mean == pytest.approx(5 / 12)


def test_the_other_languages_are_those_that_neither_side_was_trained_on() -> None:
    right = {"en": [True, True], "de": [True, True], "sw": [True, False]}
    run, baseline = items(**right), items(**{language: [False, False] for language in right})._replace(source="de")
    result = accuracy_differences([run], [baseline])
    assert result["average"].mean == pytest.approx(5 / 6) and result["average_other"].mean == 0.5


def test_runs_on_other_items_are_refused() -> None:
    a, b = items(en=[False] * 3), items(en=[False] * 4)
    with pytest.raises(NotComparableError, match="as many items"):
        accuracy_differences([a], [b])
    with pytest.raises(NotComparableError, match=r"same languages.*got en and de"):
        accuracy_differences([a], [items(de=[False] * 3)])
    with pytest.raises(ValueError, match="as many runs"):
        accuracy_differences([a, a], [a])
