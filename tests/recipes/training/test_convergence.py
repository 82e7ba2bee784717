from __future__ import annotations

import math

import pytest

from ear_ops.recipes.training.convergence import beats_majority, chance_level, collapse_notice, last_quarter


def log(values: list[tuple[int, float, float]]) -> list[dict[str, float]]:
    return [
        {"step": step, "loss": 9.0, "epoch": 0.5, "cross_entropy": x, "cross_entropy_augmented": xa}
        for step, x, xa in values
    ]


def test_last_quarter_weighs_lines_by_their_steps() -> None:
    lines = log([(50, 5.0, 5.0), (80, 1.0, 2.0), (100, 2.0, 3.0)])
    lines.insert(2, {"step": 80, "eval_accuracy": 0.3})
    terms = last_quarter(lines, max_steps=100)  # the last two lines: 30 and 20 steps
    assert terms == pytest.approx({"cross_entropy": 1.4, "cross_entropy_augmented": 2.4})


def test_chance_is_the_entropy_of_the_labels() -> None:
    assert chance_level([0, 1, 2] * 4) == pytest.approx(math.log(3))
    assert chance_level([0, 0, 0, 1]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


@pytest.mark.parametrize("value", [math.log(3), 1.2])
def test_a_cross_entropy_at_chance_is_noticed(value: float) -> None:
    terms = last_quarter(log([(50, 1.0, 1.0), (100, value, value)]), max_steps=100)
    notice = collapse_notice(terms, math.log(3), 100, regularised=True)
    assert notice is not None
    assert "cross-entropy stayed at chance" in notice
    assert "If `finetune` learns it with the same settings, the regulariser overpowers" in notice
    assert "lower alpha/beta or choose another preset" in notice
    assert "alpha" not in (collapse_notice(terms, math.log(3), 100, regularised=False) or "alpha")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("perturbed", [False, True])
def test_a_loss_that_is_not_a_number_is_no_chance_level(value: float, perturbed: bool) -> None:
    terms = last_quarter(log([(50, 1.0, 1.0), (90, 1.0, 1.0), (100, value, value)]), max_steps=100)
    for regularised in (False, True):
        notice = collapse_notice(terms, math.log(3), 100, regularised=regularised, perturbed=perturbed, learnt=True)
        assert notice is not None and "the training diverged" in notice and "stayed at chance" not in notice
        assert f"over its last quarter is {value}" in notice and "lower the learning rate" in notice
        assert ("alpha/beta" in notice) is regularised


def test_a_loss_far_above_chance_is_no_chance_level() -> None:
    terms = {"cross_entropy": 881965.28, "cross_entropy_augmented": 900.0}
    notice = collapse_notice(terms, math.log(3), 9, regularised=True)
    assert notice is not None and "the training diverged" in notice and "4.414e+05" in notice and "1.0986" in notice
    assert collapse_notice(terms, math.log(3), 9, regularised=False, perturbed=True, learnt=True) is None


def test_rare_labels_are_no_divergence() -> None:
    chance = chance_level([0] * 99 + [1])
    notice = collapse_notice({"cross_entropy": math.log(2)}, chance, 9, regularised=False)
    assert notice is not None and "stayed at chance" in notice


def test_perturbed_embeddings_may_stay_at_chance_where_dev_says_that_the_model_has_learnt() -> None:
    terms = {"cross_entropy": 1.2}
    for perturbed, learnt in ((True, False), (False, True)):
        notice = collapse_notice(terms, math.log(3), 9, regularised=False, perturbed=perturbed, learnt=learnt)
        assert notice is not None and ("perturbation" in notice) is perturbed
    assert collapse_notice(terms, math.log(3), 9, regularised=False, perturbed=True, learnt=True) is None


def test_a_run_that_learnt_is_left_in_peace() -> None:
    terms = last_quarter(log([(50, 1.2, 1.2), (100, 0.9, 1.0)]), max_steps=100)
    assert collapse_notice(terms, math.log(3), 100, regularised=True) is None


def test_an_accuracy_beats_the_majority_when_its_interval_does() -> None:
    labels = [0] * 500 + [1] * 500
    assert beats_majority(0.55, labels) and not beats_majority(0.52, labels)
    assert not beats_majority(0.55, labels[:20] + labels[-20:]), "of forty items that says nothing"
    assert not beats_majority(0.85, [0] * 900 + [1] * 100), "always 0 would have been better"
