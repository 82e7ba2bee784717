"""What every regulariser is: a loss, a place in a model and a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ear_ops.arguments import is_finite_number
from ear_ops.capture.layout import Layout
from ear_ops.capture.sites import Site
from ear_ops.ops.reductions import REDUCTIONS

Weight = float | Callable[[int], float]
"""A number, or a function of the optimiser step, which is then given by ``ear.loss(step=...)``."""


class Regularizer:
    """Base class: a subclass says where it looks (:meth:`site`) and what it computes there (:meth:`term`).

    Args:
        name: key of the term in ``ear.components()``; unique within one :func:`ear_ops.attach`.
        weight: see :data:`Weight`.
        reduction: one of :data:`ear_ops.ops.reductions.REDUCTIONS` except ``"none"``.
    """

    uses_word_ids = False  # whether term() takes word_ids

    def __init__(self, name: str, weight: Weight, reduction: str) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: expected a text that is not empty, got {name!r}")
        if not callable(weight) and not is_finite_number(weight):
            raise TypeError(f"weight: expected a finite number or a function of the step, got {weight!r}")
        allowed = [known for known in REDUCTIONS if known != "none"]
        if reduction not in allowed:
            raise ValueError(
                f"reduction: expected one that gives a scalar, {', '.join(map(repr, allowed))}; got {reduction!r}"
            )
        self.name = name
        self.weight = weight
        self.reduction = reduction

    def expand(self, layout: Layout) -> list[Regularizer]:
        """The regularisers that this one stands for on a model, each at one place; by default itself alone."""
        return [self]

    def site(self, layout: Layout) -> Site:
        """The place to look at; raises where the model does not have it, and changes nothing."""
        raise NotImplementedError

    def term(self, reading: Any, reading_aug: Any | None) -> Tensor:
        """The unweighted scalar of what the site read.

        ``reading`` holds both views, ``[2B, ...]`` with x first, where ``reading_aug`` is None; else each holds one.
        """
        raise NotImplementedError

    def weight_at(self, step: int | None) -> float:
        """The weight at an optimiser step. Raises TypeError where the weight needs a step, or is no finite number."""
        if not callable(self.weight):
            return self.weight
        if step is None:
            raise TypeError(f"{self.name}: the weight is a function of the step; call ear.loss(step=...)")
        weight = self.weight(step)
        if not is_finite_number(weight):
            raise TypeError(f"{self.name}: expected the weight at step {step} to be a finite number, got {weight!r}")
        return weight

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, weight={self.weight!r}, reduction={self.reduction!r})"


def scaled(weight: Weight, factor: float) -> Weight:
    """``factor`` times ``weight``, a number or a function of the step."""
    if factor == 1.0:
        return weight
    return (lambda step: factor * weight(step)) if callable(weight) else factor * weight
