"""The error rule refuses a kernel that rounds to one side, and admits one whose errors cancel."""

from __future__ import annotations

import pytest
import torch
from support.rules import check_gradient
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def oracle() -> Tensor:
    """A gradient whose length differs from row to row, as those of nearly equal views do."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 2, 65, 1, generator=generator, dtype=torch.float64)
    return rows * torch.randn(2, 2, 65, 32, generator=generator, dtype=torch.float64)


def test_errors_of_rows_that_cancel_pass(oracle: Tensor) -> None:
    for seed in range(20):
        noise = torch.randn(2, 2, 65, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        actual, plain = ((oracle * (1 + 100 * EPS * error)).float() for error in (noise, noise.flip(2)))
        check_gradient("gradient", actual, plain, oracle)


def test_errors_to_one_side_fail(oracle: Tensor) -> None:
    noise = torch.randn(2, 2, 65, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = oracle.square() / oracle.square().sum()
    plain = (oracle * (1 + 100 * EPS * (noise - (weights * noise).sum()))).float()
    shortened = (oracle * (1 - 100 * EPS)).float()
    with pytest.raises(AssertionError, match="signed bias"):
        check_gradient("gradient", shortened, plain, oracle)
