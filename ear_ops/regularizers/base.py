"""What every regulariser is: a loss, a place in a model and a weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

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

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
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

    def prepare(self, model: nn.Module, teacher: nn.Module | None) -> None:
        """What :func:`ear_ops.attach` calls before it hangs anything on the model, such as to make a projection."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of this regulariser itself: those that it keeps as attributes, and those of such modules.

        Several modules belong into one ``nn.ModuleList``; in a list of Python they are not found.
        """
        for value in vars(self).values():
            if isinstance(value, nn.Parameter):
                yield value
            elif isinstance(value, nn.Module):
                yield from value.parameters()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint has to hold: the same with the buffers of such modules, by the names of the attributes."""
        for attribute, value in vars(self).items():
            if isinstance(value, nn.Parameter):
                yield attribute, value
            elif isinstance(value, nn.Module):
                for name, tensor in value.state_dict(prefix=f"{attribute}.", keep_vars=True).items():
                    if isinstance(tensor, Tensor):  # and no extra state
                        yield name, tensor

    def site(self, layout: Layout) -> Site:
        """The place to look at; raises where the model does not have it, and changes nothing."""
        raise NotImplementedError(
            f"{type(self).__name__}: expected a method site(self, layout) that returns a place, such as "
            f"layout.attention(6), found none; define it"
        )

    def term(self, reading: Any, reading_aug: Any | None) -> Tensor:
        """The unweighted scalar of what the site read.

        ``reading`` holds both views, ``[2B, ...]`` with x first, where ``reading_aug`` is None; else each holds one.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected a method term(self, reading, reading_aug) that returns a scalar tensor, "
            f"found none; define it"
        )

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


def check_constructed(regularizer: Regularizer) -> None:
    """Raises TypeError where a subclass did not call ``super().__init__``."""
    missing = [name for name in ("name", "weight", "reduction") if not hasattr(regularizer, name)]
    if missing:
        raise TypeError(
            f"{type(regularizer).__name__}: expected the attributes name, weight and reduction, {', '.join(missing)} "
            f"not set; call super().__init__(name, weight, reduction) in its __init__"
        )


def site_of(regularizer: Regularizer, layout: Layout) -> Site:
    """``regularizer.site(layout)``; raises TypeError where that is no site."""
    site: Any = regularizer.site(layout)
    if not all(hasattr(site, name) for name in ("model", "install", "read")):
        raise TypeError(
            f"{type(regularizer).__name__}: expected site(layout) to return a place, such as layout.attention(6), "
            f"layout.hidden_states(6) or layout.embeddings(), got {site!r}; is a return missing?"
        )
    return site


def check_term(regularizer: Regularizer, term: Any) -> None:
    """Raises TypeError or ValueError where a term is no scalar tensor."""
    expected = f"{type(regularizer).__name__}: expected term() to return a scalar tensor (shape []) of floats"
    if not isinstance(term, Tensor):
        raise TypeError(
            f"{expected}, got {term!r} ({type(term).__name__}); return the tensor that was computed from the reading, "
            f"without .item() or float()"
        )
    if term.dim():
        raise ValueError(
            f"{expected}, got the shape {list(term.shape)}; return a mean or a sum over what is counted, such as "
            f"term.mean()"
        )
    if not term.is_floating_point():
        raise TypeError(f"{expected}, got {term.dtype}, which has no gradient; compute it in floats")


def scaled(weight: Weight, factor: float) -> Weight:
    """``factor`` times ``weight``, a number or a function of the step."""
    if factor == 1.0:
        return weight
    return functools.partial(_scaled_at, weight, factor) if callable(weight) else factor * weight


def weight_text(weight: Weight) -> str:
    """A weight for people: ``0.1``, ``0.5 * CosineSchedule(...)``, or the name of a function."""
    if isinstance(weight, functools.partial) and weight.func is _scaled_at:
        return f"{weight.args[1]:g} * {weight_text(weight.args[0])}"
    return getattr(weight, "__name__", repr(weight)) if callable(weight) else f"{weight:g}"


def _scaled_at(weight: Callable[[int], float], factor: float, step: int) -> float:
    return factor * weight(step)  # a function of the module, since a closure cannot be pickled
