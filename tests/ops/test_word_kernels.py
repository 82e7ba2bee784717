"""Attention between words by the kernels of every device, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from support.words import CASES, check_words


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("divergence", "dtype"), [("mse", torch.bfloat16), ("js", torch.float32)], ids=["mse, bfloat16", "js, float32"]
)
def test_features(divergence: str, dtype: torch.dtype, case: str, device: str) -> None:
    ids, sizes, options = CASES[case]
    check_words(ids, sizes, {**options, "divergence": divergence}, dtype, device)
