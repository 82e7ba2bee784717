"""The divergences between attention as forms: a function and its options, from queries and keys or from maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st
from support.cases import LOSSES, Case, attention_case, in_comparison, qk_case
from support.strategies import cases
from torch import Tensor

from ear_ops.ops import extension

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "qk forward": ("qk_attention_kl", {"direction": "forward"}),
    "qk reverse": ("qk_attention_kl", {"direction": "reverse"}),
    "qk js": ("qk_attention_js", {}),
    "qk scores": ("qk_scores_mse", {}),
    "maps forward": ("attention_kl", {"direction": "forward"}),
    "maps reverse": ("attention_kl", {"direction": "reverse"}),
    "maps js": ("attention_js", {}),
}
QK = [name for name in FORMS if name.startswith("qk")]
DIVERGENCES = [name for name in QK if name != "qk scores"]
RAGGED = {"lengths": ([9, 6], [9, 6])}  # real tokens of two pairs


def in_every_way(forms: Iterable[str]) -> pytest.MarkDecorator:
    """Each form by the reference; those straight from queries and keys by the kernels of the CPU, too.

    What all devices have in common is in ``test_properties.py``.
    """
    kernels = pytest.mark.skipif(not extension.CPU.loaded, reason=f"no cpu kernels: {extension.CPU.reason}")
    ways = [pytest.param(form, "reference") for form in forms]
    ways += [pytest.param(form, "cpu", marks=kernels) for form in forms if form in QK]
    return pytest.mark.parametrize(("form", "backend"), ways)


every_form = pytest.mark.parametrize("form", FORMS)
every_divergence = pytest.mark.parametrize("form", DIVERGENCES)


def in_form(case: Case, form: str, **options: Any) -> Case:
    """A case of an MSE as a case of another comparison, where KL may be infinite."""
    op, of_form = FORMS[form]
    return replace(case, op=op, options={**case.options, **of_form, **options})


def loss_of(form: str) -> Callable[..., Tensor]:
    return LOSSES[FORMS[form][0]]


def case_of(form: str, *args: Any, **rest: Any) -> Case:
    make = qk_case if form.startswith("qk") else attention_case
    return in_form(make(*args, **rest), form)


def drawn(data: st.DataObject, form: str, **limits: Any) -> Case:
    op = "qk_attention_mse" if form.startswith("qk") else "attention_mse"
    comparison, of_form = FORMS[form]
    return in_comparison(data.draw(cases(op, **limits)), comparison, **of_form)
