"""Checks of arguments that several modules make."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def check_tensor(argument: str, value: Any, advice: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}; {advice}")


def check_one_layer(value: Any, regularizer: str) -> None:
    """``regularizer``: the name of the class, which takes one layer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"layer: expected a number, got {value!r}; write a {regularizer} for each layer")
    check_layer(value)


def check_layer(value: Any) -> None:
    if isinstance(value, int) and value < 1:
        raise ValueError(f"layer: expected at least 1 (layers are counted from 1), got {value}")
    check_count("layer", value)


def check_count(argument: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: expected at least 1, got {value}")


def checked_number(argument: str, value: Any, advice: str) -> float:
    """``value``, a number or a constant tensor of one, as a finite ``float``; ``advice``: in place of a gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{argument}: expected a constant, got a tensor that requires grad; the loss has no gradient for it, so "
            f"{advice}"
        )
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{argument}: expected a number, got {value!r}") from None
    if not -math.inf < number < math.inf:
        raise ValueError(f"{argument}: expected a finite number, got {value!r}")
    return number


def check_temperature(value: Any) -> None:
    if not (is_finite_number(value) and value > 0):
        raise ValueError(f"temperature: expected a positive, finite number, got {value!r}")


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    choices = list(choices)  # a value of any type can be looked for in a list
    if value not in choices:
        expected = " or ".join(map(repr, choices)) if len(choices) == 2 else f"one of {', '.join(map(repr, choices))}"
        raise ValueError(f"{argument}: expected {expected}, got {value!r}")


def is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
