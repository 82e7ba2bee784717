"""Schedules: weights as functions of the optimiser step. Any other function of the step serves as well.

pull = ear_ops.AttentionPull(layer=6, weight=ear_ops.LinearWarmupSchedule(0.1, steps=1000))
loss = task_loss + ear.loss(step=step)                       # step counts optimiser steps from 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ear_ops.arguments import is_finite_number


@dataclass(frozen=True)
class LinearWarmupSchedule:
    """From 0 at step 0 to ``weight`` at step ``steps``, in a straight line; constant from there on.

    Raises:
        TypeError, ValueError: ``weight`` is no finite number, or ``steps`` is no whole number of at least 1.
    """

    weight: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.steps, weight=self.weight)

    def __call__(self, step: int) -> float:
        return self.weight * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class CosineSchedule:
    """From ``start`` at step 0 to ``end`` at step ``steps`` along half a cosine; constant from there on.

    Raises:
        TypeError, ValueError: ``start`` or ``end`` is no finite number, or ``steps`` no whole number of at least 1.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.steps, start=self.start, end=self.end)

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2.0


def _check(steps: int, **weights: float) -> None:
    for name, weight in weights.items():
        if not is_finite_number(weight):
            raise TypeError(f"{name}: expected a finite number, got {weight!r}")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps: expected a whole number of steps, at least 1, got {steps!r}")
