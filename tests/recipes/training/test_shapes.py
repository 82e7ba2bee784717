from __future__ import annotations

from typing import Any

import pytest

from ear_ops.recipes.training.shapes import NUMBER, misfit

SHAPE = {"steps": int, "best?": (type(None), {"accuracy": NUMBER}), "languages": {"*": {"labels": [int]}}}
FITTING = {"steps": 3, "languages": {"en": {"labels": [0, 1]}}, "more": "is ignored"}


@pytest.mark.parametrize("best", [{}, {"best": None}, {"best": {"accuracy": 1}}, {"best": {"accuracy": 0.5}}])
def test_what_fits_has_no_misfit(best: dict[str, Any]) -> None:
    assert misfit({**FITTING, **best}, SHAPE) is None
    assert misfit({**FITTING, "languages": {}}, SHAPE) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "the content should be an object, but is []"),
        ({}, "steps is missing"),
        ({**FITTING, "steps": True}, "steps should be a whole number, but is True"),
        ({**FITTING, "steps": 3.0}, "steps should be a whole number, but is 3.0"),
        ({**FITTING, "best": {"accuracy": "1"}}, "best.accuracy should be a number, but is '1'"),
        ({**FITTING, "best": {}}, "best.accuracy is missing"),
        ({**FITTING, "languages": {"en": 3}}, "languages.en should be an object, but is 3"),
        ({**FITTING, "languages": {"en": {"labels": [0, None]}}}, "languages.en.labels.1 should be a whole number"),
    ],
)
def test_the_first_misfit_is_named_with_its_place(content: Any, problem: str) -> None:
    assert (misfit(content, SHAPE) or "").startswith(problem)
