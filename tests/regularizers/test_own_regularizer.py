"""Mistakes in a regulariser of one's own: each raises one message that names the class and what to return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ear_ops import Regularizer, attach


class Plain(nn.Module):
    """Two blocks on given vectors ``[B, L, C]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            vectors = block(vectors)
        return vectors


class Own(Regularizer):
    """Returns what it is given in place of the term that is right."""

    def __init__(self, returned: Any = None) -> None:
        super().__init__("own", 1.0, "mean")
        self.returned = returned

    def site(self, layout: Any) -> Any:
        return layout.hidden_states(1)

    def term(self, reading: Any, reading_aug: Any) -> Any:
        return self.returned(reading.states)


class WithoutSite(Own):
    def site(self, layout: Any) -> Any:
        layout.hidden_states(1)


class WithoutInit(Own):
    def __init__(self) -> None:
        self.layer = 1


class Empty(Regularizer):
    def __init__(self) -> None:
        super().__init__("empty", 1.0, "mean")


class WithoutTerm(Empty):
    def site(self, layout: Any) -> Any:
        return layout.hidden_states(1)


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (lambda states: states.mean(0), ValueError, r"got the shape \[3, 4\]; return a mean or a sum"),
        (lambda states: states.mean().reshape(1), ValueError, r"got the shape \[1\]; return a mean or a sum"),
        (lambda states: 0.5, TypeError, r"got 0\.5 \(float\); return the tensor .* without \.item\(\)"),
        (lambda states: None, TypeError, r"got None \(NoneType\)"),
        (lambda states: (states > 0).sum(), TypeError, r"got torch\.int64, which has no gradient"),
    ],
    ids=["matrix", "one number in a list", "float", "None", "integer"],
)
def test_a_term_that_is_no_scalar_tensor(returned: Any, error: type[Exception], words: str) -> None:
    model = Plain()
    with attach(model, [Own(returned)]) as ear:
        model(torch.randn(2, 3, 4))
        with pytest.raises(error, match=rf"Own: expected term\(\) to return a scalar tensor .*{words}"):
            ear.loss()


@pytest.mark.parametrize(
    ("regularizer", "error", "words"),
    [
        (WithoutSite, TypeError, r"WithoutSite: expected site\(layout\) to return a place.* got None; is a return mi"),
        (WithoutInit, TypeError, r"WithoutInit: expected .*name, weight, reduction not set; call super\(\)\.__init__"),
        (Empty, NotImplementedError, r"Empty: expected a method site\(self, layout\)"),
    ],
)
def test_a_regulariser_that_is_not_finished_leaves_the_model_as_it_was(
    regularizer: Any, error: type[Exception], words: str
) -> None:
    model = Plain()
    with pytest.raises(error, match=words):
        attach(model, [regularizer()])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_regulariser_without_a_term() -> None:
    model = Plain()
    with attach(model, [WithoutTerm()]) as ear:
        model(torch.randn(2, 3, 4))
        with pytest.raises(NotImplementedError, match=r"WithoutTerm: expected a method term\("):
            ear.loss()
