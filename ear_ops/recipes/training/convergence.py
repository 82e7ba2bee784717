"""Whether a run has learnt anything, by its log: the last means of the loss terms, against the chance level."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ear_ops.recipes.training.evaluation import wilson_interval

CROSS_ENTROPIES = ("cross_entropy", "cross_entropy_augmented")
TOLERANCE = 0.01  # a cross-entropy this close to the chance level, as a share of it, counts as chance
DIVERGED = 3  # times the chance level, or that of two equally frequent labels where it is higher
_NOT_TERMS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


def last_quarter(log: Sequence[dict[str, Any]], max_steps: int) -> dict[str, float]:
    """The means of the loss terms over the last quarter of the training, of whole lines of the log.

    Args:
        log: the Trainer's `log_history`. The terms of a line are means over the steps since the line before.
        max_steps: how many steps the training has.
    """
    sums: Counter[str] = Counter()
    steps = previous = 0
    for line in (line for line in log if "cross_entropy" in line):
        weight, previous = line["step"] - previous, line["step"]
        if line["step"] > 0.75 * max_steps:
            steps += weight
            sums.update({name: weight * value for name, value in line.items() if name not in _NOT_TERMS})
    return {name: value / steps for name, value in sums.items()}


def chance_level(labels: Iterable[int]) -> float:
    """The cross-entropy, in nats, of the best classifier that ignores its input.

    It is the entropy of the labels: log(number of labels) where all are equally frequent.
    """
    counts = Counter(labels)
    total = sum(counts.values())
    return sum(n / total * math.log(total / n) for n in counts.values())


def beats_majority(accuracy: float, labels: Sequence[int]) -> bool:
    """Whether the 95% interval of an accuracy is above the share of the most frequent of these labels."""
    total, majority = len(labels), max(Counter(labels).values())
    return wilson_interval(round(accuracy * total), total)[0] > majority / total


def collapse_notice(
    terms: dict[str, float],
    chance: float,
    steps: int,
    *,
    regularised: bool,
    perturbed: bool = False,
    learnt: bool = False,
) -> str | None:
    """A warning where the mean cross-entropy over the views ended above 99% of the chance level, or far above it.

    Args:
        terms: from `last_quarter`.
        chance: from `chance_level`.
        steps: that the run took.
        regularised: whether the method has regularisers; the advice is then about their weights too.
        perturbed: whether the method perturbs embeddings; the advice is then about the perturbation.
        learnt: whether the accuracy on dev is above chance. The cross-entropy of perturbed embeddings may then stay
            high without harm.
    """
    views = [terms[name] for name in CROSS_ENTROPIES if name in terms]
    if not views:
        return None
    mean = sum(views) / len(views)
    if math.isfinite(mean) and perturbed and learnt:
        return None
    if not mean < DIVERGED * max(chance, math.log(2)):
        weights = "and alpha/beta " if regularised else ""
        return (
            f"the training diverged: the mean cross-entropy over its last quarter is {mean:.4g}, and ignoring the "
            f"input gives {chance:.4f}. Only a checkpoint of an earlier step can be of use; lower the learning rate "
            f"{weights}(this run took {steps} steps)"
        )
    if mean < (1 - TOLERANCE) * chance:
        return None
    if perturbed:
        advice = "the perturbation may be too large; lower it, change the learning rate or train longer"
    elif regularised:
        advice = (
            "the model has not learnt the task; change the learning rate or train longer. If `finetune` learns it with "
            "the same settings, the regulariser overpowers the cross-entropy: lower alpha/beta or choose another preset"
        )
    else:
        advice = "the model has not learnt the task; change the learning rate or train longer"
    return (
        f"cross-entropy stayed at chance: its mean over the last quarter of training is {mean:.4f}, and ignoring the "
        f"input gives {chance:.4f}: {advice} (this run took {steps} steps)"
    )
